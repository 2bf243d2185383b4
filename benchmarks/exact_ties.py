"""Parameters and images that put numbers exactly on thresholds; a part of `exact.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax import deploy, nn
from uniq_jax.models.activations import BiasedPRelu

# Dyadic numbers are multiples of this, unless they are powers of two.
_GRAIN = 2.0**-4


def tie(model: nnx.Module) -> None:
    """Makes parameters dyadic: no operation rounds, and sums are equal to thresholds."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            deviation = np.sqrt(np.asarray(module.var[...]) + np.float32(module.epsilon))
            factor = np.asarray(module.scale[...]) / deviation
            module.scale[...] = jnp.asarray(_power_of_two(factor) * deviation)
            module.mean[...], module.bias[...] = _dyadic(module.mean), _dyadic(module.bias)
        elif isinstance(module, BiasedPRelu):
            for variable in (module.before, module.slope, module.after):
                variable[...] = _dyadic(variable)
    for module in [m for _, m in nnx.iter_modules(model) if hasattr(m, "activation_quantizer")]:
        _tie_layer(module)


def _tie_layer(layer: Any) -> None:
    activation, weight = layer.activation_quantizer, layer.weight_quantizer
    if activation is not None:
        parameters = activation.parameters
        for name, value in parameters.items():
            is_threshold = isinstance(getattr(activation, name), nn.Threshold)
            dyadic = np.maximum(_dyadic(value), _GRAIN if name == "intervals" else -np.inf)
            new = dyadic if is_threshold else _power_of_two(value)
            if name == "output_scale":  # Levels are multiples of 2/n times this.
                new = new * activation.method.grid.max_code / 2
            getattr(activation, name)[...] = jnp.asarray(new, jnp.float32)
    kernel = layer.kernel
    if weight is None:
        kernel[...] = _dyadic(kernel)
    elif hasattr(weight, "step"):
        weight.step[...] = jnp.asarray(_power_of_two(weight.step))
    else:  # The scale of N2UQ's weights is of their mean magnitude.
        values = np.asarray(kernel[...])
        magnitude = _power_of_two(np.mean(np.abs(values), keepdims=True))
        kernel[...] = jnp.asarray(np.where(values < 0, -magnitude, magnitude), jnp.float32)
    if getattr(layer, "bias", None) is not None:
        layer.bias[...] = _dyadic(layer.bias)


def tied_images(model: nnx.Module, images: np.ndarray) -> np.ndarray:
    """Images whose numbers lie on the first quantizer's thresholds, which are multiples of it."""
    for _, module in nnx.iter_modules(model):
        quantizer = getattr(module, "activation_quantizer", None)
        if quantizer is not None and getattr(quantizer.method, "signed", False):
            step = np.float32(quantizer.step[...])
            return np.round(images / step) * step
    return np.asarray(_dyadic(images))


def ties(frozen: deploy.FrozenNetwork, images: np.ndarray) -> int:
    """How many numbers are the smallest that have their code, of these images."""
    values = _values(frozen, images)
    arrays = {name: np.asarray(array) for name, array in frozen.arrays.items()}
    total = 0
    for node in frozen.graph.nodes:
        if node.operation == "encode":
            x, limits = np.asarray(values[node.inputs[0]]), arrays[node.inputs[1]]
        elif node.operation == "encode_sums":
            x = np.asarray(values[node.inputs[0]]) * arrays[node.inputs[2]]
            limits = arrays[node.inputs[1]]
        else:
            continue
        total += sum(int(np.sum(x == limit)) for limit in limits)
    return total


@jax.jit
def _values(frozen: deploy.FrozenNetwork, images: jax.Array) -> dict[str, jax.Array]:
    return frozen.values(images)


def _dyadic(variable: Any) -> jax.Array:
    value = np.asarray(variable[...], np.float32)
    return jnp.asarray(np.round(value / _GRAIN) * _GRAIN, jnp.float32)


def _power_of_two(variable: Any) -> np.ndarray:
    value = np.asarray(variable[...], np.float32)
    magnitude = np.maximum(np.abs(value), 2.0**-20)
    sign = np.where(value < 0, -1, 1)
    return np.asarray(sign * 2.0 ** np.round(np.log2(magnitude)), np.float32)
