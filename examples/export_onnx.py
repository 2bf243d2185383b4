"""A quantized network as an ONNX file, run in ONNX Runtime. Needs uniq_jax[onnx].

    python examples/export_onnx.py --out=network.onnx

The network is not trained: its weights are random, and its steps calibrated on random images. Load
your own weights with `uniq_jax.interop`, see examples/nnx_own_loop.py for training.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import uniq_jax
from uniq_jax import deploy, models


def main(model_name: str, out: Path) -> None:
    model = models.create(
        model_name,
        num_classes=10,
        rngs=nnx.Rngs(0),
        method="uniq",
        weight_bits=4,
        activation_bits=4,
    )
    images = np.asarray(jax.random.normal(jax.random.key(0), (8, 8, 8, 3)))
    uniq_jax.calibrate(model, [images])
    frozen = uniq_jax.freeze(model, (8, 8, 3))
    deploy.export_onnx(frozen, out, form="integer")

    session = deploy.open_onnxruntime(out)
    (logits,) = session.run(["logits"], {"images": images})
    expected = jax.jit(frozen)(images)
    print(f"{out.name}: {out.stat().st_size} bytes")
    print("classes in ONNX Runtime:", logits.argmax(-1).tolist())
    print("classes in JAX:         ", expected.argmax(-1).tolist())
    # Every code of every layer, too:
    print(deploy.compare_onnx(frozen, out, [images]).summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet8", help="one of uniq_jax.models.MODELS")
    parser.add_argument("--out", type=Path, help="file of the network; by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        main(args.model, args.out or Path(directory) / "network.onnx")
