"""A model and a loop of your own in Flax NNX and optax: quantize, train, freeze, save, load.

    python examples/nnx_own_loop.py --out=digits.safetensors

A small network learns scikit-learn's digits with 4-bit weights and activations. The loop is a pure
function of optax; nothing of `uniq_jax.train` is used.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import uniq_jax
from uniq_jax import deploy, rules

TRAIN = 1437


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, rngs=rngs)
        self.body = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.stem(x)))
        x = nnx.relu(self.bn2(self.body(x)))
        return self.head(x.reshape(x.shape[0], -1))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8, 1) from -1 to 1, and labels, in a random order."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images[order, :, :, None] / 8 - 1).astype(np.float32)
    return images, data.target[order].astype(np.int32)


def main(steps: int, out: Path) -> None:
    images, labels = digits()
    model = Network(nnx.Rngs(0))
    uniq_jax.quantize(model, rules.uniq(bits=4))
    uniq_jax.calibrate(model, [images[:256]])

    model.train()
    # Weight decay leaves learned steps alone.
    learned = uniq_jax.nn.is_quantizer_state(model)
    decayed = jax.tree.map(lambda is_learned: not is_learned, learned)
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, max(steps, 1)), mask=decayed)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, rest, opt_state, images, labels):
        def loss_of(params):
            model = nnx.merge(graph, params, rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
            # Batch norms have new running statistics.
            return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

        gradients, rest = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state

    random = np.random.default_rng(1)
    for _ in range(steps):
        chosen = random.integers(0, TRAIN, 64)
        params, rest, opt_state = train_step(
            params, rest, opt_state, images[chosen], labels[chosen]
        )
    nnx.update(model, params, rest)

    # For `python -m uniq_jax.predict`, whose pixels are from 0 to 255.
    about = deploy.About(labels=tuple("0123456789"), mean=(127.5,), std=(127.5,))
    frozen = uniq_jax.freeze(model, (8, 8, 1), about=about)
    print(deploy.verify(model, frozen, [images[TRAIN:]]).summary())
    size = deploy.save(frozen, out)
    network = jax.jit(deploy.load(out))
    accuracy = np.mean(network(images[TRAIN:]).argmax(-1) == labels[TRAIN:])
    print(f"{out}: {size} bytes, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--out", type=Path, help="file of the network; by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        main(args.steps, args.out or Path(directory) / "digits.safetensors")
