"""A binary network in plain JAX: one function of `uniq_jax.quantizers`, and no other library.

    python examples/plain_jax.py

Two dense layers learn which of two rings a point lies on, with 1-bit weights. The learned steps are
params like any others.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np

from uniq_jax.quantizers import uniq_weight, uniq_weight_encode, uniq_weight_initial_step

BITS = 1
WIDTH = 128


def rings(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points on two rings around 0, and which ring each lies on."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    radius = 1 + labels + 0.15 * random.normal(size=count)
    angle = random.uniform(0, 2 * math.pi, count)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return points.astype(np.float32), labels


def initial_params(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    params = {}
    for name, shape in {"hidden": (2, WIDTH), "output": (WIDTH, 1)}.items():
        key, subkey = jax.random.split(key)
        kernel = jax.random.normal(subkey, shape) / math.sqrt(shape[0])
        step = uniq_weight_initial_step(kernel, bits=BITS)
        params[name] = {"kernel": kernel, "step": step, "bias": jnp.zeros(shape[1])}
    return params


def logits(params, points):
    def dense(layer, x):
        return x @ uniq_weight(layer["kernel"], layer["step"], bits=BITS) + layer["bias"]

    return dense(params["output"], jax.nn.relu(dense(params["hidden"], points)))[:, 0]


@jax.jit
def train_step(params, velocity, points, labels):
    def loss_of(params):
        z = logits(params, points)
        return jnp.mean(jax.nn.softplus(z) - labels * z)

    gradients = jax.grad(loss_of)(params)
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradients)
    return jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity), velocity


def main(steps: int) -> float:
    params = initial_params(jax.random.key(0))
    velocity = jax.tree.map(jnp.zeros_like, params)
    for step in range(steps):
        params, velocity = train_step(params, velocity, *rings(256, seed=step))
    points, labels = rings(2000, seed=10**6)
    accuracy = float(((logits(params, points) > 0) == labels).mean())
    layer = params["hidden"]
    codes = uniq_weight_encode(layer["kernel"], layer["step"], bits=BITS).codes
    print(f"accuracy {accuracy:.1%}; codes of the first kernel: {codes[0, :16].tolist()} …")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of training")
    main(parser.parse_args().steps)
