"""How much faster frozen networks are than their float and simulated forms, runtime by runtime.

python benchmarks/inference.py [NAME …]   # of the figures; all without one

ResNet-18 at 224 pixels, one image at a time, on one core: the process keeps to one. Both sides of a
figure run in the same runtime, in turns. Weights are random, and calibrated on random images: what
an operation costs does not depend on them.
"""

import os

if hasattr(os, "sched_setaffinity"):  # Before XLA and the runtimes count the cores.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import argparse
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from measure import RESULTS, Result, alternately, keep

from uniq_jax import calibrate, deploy, models, quantize, rules
from uniq_jax.deploy.onnx_export import to_onnx
from uniq_jax.deploy.trace import trace
from uniq_jax.train.compilation import compiler_options

SIZE = 224
SHAPE = (SIZE, SIZE, 3)
UNIQ, N2UQ = {"name": "preact_resnet18"}, {"name": "resnet18", "activation": "biased_prelu"}

Run = Callable[[], object]


def images(count: int = 1) -> np.ndarray:
    """float32, like normalized photos."""
    return np.random.default_rng(0).normal(size=(count, *SHAPE)).astype(np.float32)


@functools.cache
def model(family: str, method: str | None, bits: int | None) -> Any:
    """A network in evaluation; float without a method."""
    options = N2UQ if family == "n2uq" else UNIQ
    if method is not None and family != "binary_shortcuts":
        options = {**options, "method": method, "weight_bits": bits, "activation_bits": bits}
    made: Any = models.create(**options, num_classes=1000, rngs=nnx.Rngs(0))
    if family == "binary_shortcuts" and bits is not None:
        # The preset keeps shortcuts float at one bit; here no path is one of theirs.
        quantize(made, rules.uniq(weight_bits=bits, activation_bits=bits, shortcut="(?!)"))
    if method is not None:
        calibrate(made, [images(2)])
    made.eval()
    return made


@functools.cache
def frozen(family: str, method: str, bits: int, integer_thresholds: bool) -> deploy.FrozenNetwork:
    """The integer network."""
    return deploy.freeze(model(family, method, bits), SHAPE, integer_thresholds=integer_thresholds)


def float_onnx(family: str) -> bytes:
    """The float network, as an ONNX file that runtimes fold further as they like."""
    traced = trace(model(family, None, None), SHAPE)
    network = deploy.FrozenNetwork(graph=traced.graph, arrays=traced.arrays)
    return to_onnx(network, "qdq", 1).SerializeToString()


def openvino(content: bytes | pathlib.Path) -> Run:
    """One image through OpenVINO."""
    compiled = deploy.compile_openvino(content, threads=1)
    request = compiled.create_infer_request()
    request.set_input_tensor(0, _tensor(images()))
    return lambda: request.infer()


def _tensor(array: np.ndarray) -> Any:
    from uniq_jax.deploy.runtimes import load_openvino

    return load_openvino().Tensor(array)


def onnxruntime(content: bytes) -> Run:
    """One image through ONNX Runtime."""
    session = deploy.open_onnxruntime(content, threads=1)
    inputs = {"images": images()}
    return lambda: session.run(["logits"], inputs)


def xla(function: Callable[[jax.Array], jax.Array], *, tuned: bool = False) -> Run:
    """One image through a compiled function, whose arrays are constants of it.

    Args:
      function: of a batch of images.
      tuned: for float convolutions, with the options that `uniq_jax.main` gives XLA.
    """
    compiled = jax.jit(function, compiler_options=compiler_options() if tuned else None)
    batch = jax.device_put(images())
    return lambda: jax.block_until_ready(compiled(batch))


def onnx(form: Any, *network: Any) -> bytes:
    """A frozen network's ONNX file."""
    return to_onnx(frozen(*network), form, 1).SerializeToString()


def openvino_file(*network: Any) -> Run:
    """A frozen network's OpenVINO file: binary convolutions."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "network.xml")
        deploy.export_openvino(frozen(*network), path, batch=1)
        return openvino(path)


# Name: goal, how the float or simulated side is made, and the integer side.
PAIRS: dict[str, tuple[float | None, str, Callable[[], Run], Callable[[], Run]]] = {
    "int_openvino_uniq": (
        3.1,
        "OpenVINO, UniQ W4A4: float / fast int8 form",
        lambda: openvino(float_onnx("uniq")),
        lambda: openvino(onnx("qdq", "uniq", "uniq", 4, False)),
    ),
    "int_openvino_uniq_exact": (
        None,
        "OpenVINO, UniQ W4A4: float / exact int8 form",
        lambda: openvino(float_onnx("uniq")),
        lambda: openvino(onnx("qdq", "uniq", "uniq", 4, True)),
    ),
    "int_openvino_n2uq2": (
        2.6,
        "OpenVINO, N2UQ W2A2: float / fast int8 form",
        lambda: openvino(float_onnx("n2uq")),
        lambda: openvino(onnx("qdq", "n2uq", "n2uq", 2, False)),
    ),
    "int_openvino_n2uq2_exact": (
        None,
        "OpenVINO, N2UQ W2A2: float / exact int8 form",
        lambda: openvino(float_onnx("n2uq")),
        lambda: openvino(onnx("qdq", "n2uq", "n2uq", 2, True)),
    ),
    "int_openvino_binary": (
        7.0,
        "OpenVINO, UniQ W1A1 between float ends: float / BinaryConvolution, exact",
        lambda: openvino(float_onnx("uniq")),
        lambda: openvino_file("binary_shortcuts", "uniq", 1, True),
    ),
    "int_openvino_binary_preset": (
        None,
        "OpenVINO, the same with the preset's float shortcuts: float / BinaryConvolution, exact",
        lambda: openvino(float_onnx("uniq")),
        lambda: openvino_file("uniq", "uniq", 1, True),
    ),
    "int_ort_uniq": (
        2.2,
        "ONNX Runtime, UniQ W4A4: float / exact integer form",
        lambda: onnxruntime(float_onnx("uniq")),
        lambda: onnxruntime(onnx("integer", "uniq", "uniq", 4, True)),
    ),
    "int_xla_uniq": (
        1.4,
        "XLA, UniQ W4A4: model.eval() / frozen network, exact",
        lambda: xla(model("uniq", "uniq", 4)),
        lambda: xla(frozen("uniq", "uniq", 4, True)),
    ),
    "int_xla_uniq_tuned": (
        None,
        "XLA, UniQ W4A4: model.eval(), compiled as uniq_jax.main does / frozen network",
        lambda: xla(model("uniq", "uniq", 4), tuned=True),
        lambda: xla(frozen("uniq", "uniq", 4, True)),
    ),
    "int_xla_binary": (
        4.3,
        "XLA, UniQ W1A1: model.eval() / frozen network, popcount, exact",
        lambda: xla(model("uniq", "uniq", 1)),
        lambda: xla(frozen("uniq", "uniq", 1, True)),
    ),
    "int_xla_binary_tuned": (
        None,
        "XLA, UniQ W1A1: model.eval(), compiled as uniq_jax.main does / frozen network",
        lambda: xla(model("uniq", "uniq", 1), tuned=True),
        lambda: xla(frozen("uniq", "uniq", 1, True)),
    ),
}


def packed() -> Result:
    """Bytes on disk of float32 parameters, and of the packed W2A2 network with 8-bit ends."""
    network = frozen("uniq", "uniq", 2, True)
    parameters = nnx.state(model("uniq", None, None), (nnx.Param, nnx.BatchStat))
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    with tempfile.TemporaryDirectory() as directory:
        found = deploy.save(network, pathlib.Path(directory, "network.safetensors"))
    detail = f"UniQ W2A2, 8-bit ends: {size:,} / {found:,} bytes"
    return Result("packed_w2a2", size / found, "ratio", 13.0, detail=detail)


def main() -> None:
    """Measures the figures that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*PAIRS, "packed_w2a2"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--turns", type=int, default=21, help="of both sides of a figure")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names)
    if unknown:
        parser.error(f"NAME (={', '.join(sorted(unknown))}) must be of {', '.join(names)}")
    wanted = arguments.names or names
    for name, (goal, detail, slow, fast) in PAIRS.items():
        if name not in wanted:
            continue
        times = alternately({"slow": slow(), "fast": fast()}, turns=arguments.turns)
        value, spread = times.ratio("slow", "fast")
        ms = f"{times.median('slow') * 1e3:.1f} / {times.median('fast') * 1e3:.1f} ms an image"
        detail = f"{detail}: {ms}, one core"
        keep([Result(name, value, "ratio", goal, spread=spread, detail=detail)], arguments.results)
    if "packed_w2a2" in wanted:
        keep([packed()], arguments.results)


if __name__ == "__main__":
    main()
