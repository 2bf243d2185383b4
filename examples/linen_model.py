"""A Linen model that takes its layers from factories, with 2-bit ones.

    python examples/linen_model.py

The float network is trained, its checkpoint is loaded into the quantized one, and that is trained
on: a network of three dense layers, on scikit-learn's digits.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from uniq_jax.linen import QuantDense, calibrate
from uniq_jax.nn import UniqActivation, UniqWeight

TRAIN = 1437


class Network(nn.Module):
    body: Callable[..., nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="first")(x))
        x = nn.relu(self.body(128, name="body")(x))
        return nn.Dense(10, name="head")(x)


def train(model, params, images, labels, steps: int, learning_rate: float, seed: int):
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        def loss_of(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss_of)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = random.integers(0, TRAIN, 64)
        params, opt_state = train_step(params, opt_state, images[chosen], labels[chosen])
    return params


def main(steps: int) -> None:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.data[order] / 8 - 1).astype(np.float32)
    labels = data.target[order].astype(np.int32)

    def accuracy(model, params):
        logits = model.apply({"params": params}, images[TRAIN:])
        return np.mean(logits.argmax(-1) == labels[TRAIN:])

    model = Network()
    params = model.init(jax.random.key(0), images[:1])["params"]
    params = train(model, params, images, labels, steps, 3e-3, seed=0)
    print(f"float: {accuracy(model, params):.1%}")

    low_bit = functools.partial(QuantDense, weight=UniqWeight(2), activation=UniqActivation(2))
    model = Network(body=low_bit)
    params = calibrate(model, {"params": params}, [images[:256]])["params"]
    print(f"2 bits, calibrated: {accuracy(model, params):.1%}")
    params = train(model, params, images, labels, steps, 1e-3, seed=1)
    # In evaluation the layer multiplies integer levels, exactly.
    evaluated = Network(body=functools.partial(low_bit, deterministic=True))
    print(f"2 bits, trained: {accuracy(evaluated, params):.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of training, twice")
    main(parser.parse_args().steps)
