"""Steps fitted to the data: the least squared error among multiples of the initial step.

The constants of `uniq_jax.quantizers.initial` are optimal for normal distributions. Weights and
activations have heavier tails. At few bits that matters little, since training moves the steps; at
8 bits a network is expected to work without any, and what the constants clip costs it accuracy.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from uniq_jax import data_parallel
from uniq_jax.quantizers.grid import SMALLEST_STEP, check_floating
from uniq_jax.quantizers.initial import (
    reduction_axes,
    uniq_activation_initial_step,
    uniq_weight_initial_step,
)
from uniq_jax.quantizers.uniq import uniq_activation, uniq_weight

# Multiples of the initial step that are tried, 9 % apart. Tails ask for wider grids; narrower ones
# are best where nearly everything is zero.
_SMALLEST, _LARGEST, _COUNT = 0.5, 4.0, 25


def uniq_weight_fitted_step(
    w: Float[ArrayLike, "*shape"], *, bits: int, channel_axis: int | None = None
) -> jax.Array:
    """The multiple of `uniq_weight_initial_step` with the least mean squared error on `w`.

    Args, result and errors as there.
    """
    w = check_floating("w", w)
    start = uniq_weight_initial_step(w, bits=bits, channel_axis=channel_axis)
    return _fit(w, start, lambda step: uniq_weight(w, step, bits=bits), channel_axis)


def uniq_activation_fitted_step(
    x: Float[ArrayLike, "*shape"],
    *,
    bits: int,
    signed: bool = False,
    channel_axis: int | None = None,
) -> jax.Array:
    """The multiple of `uniq_activation_initial_step` with the least mean squared error on `x`.

    Args, result and errors as there.
    """
    x = check_floating("x", x)
    start = uniq_activation_initial_step(x, bits=bits, signed=signed, channel_axis=channel_axis)

    def quantize(step: jax.Array) -> jax.Array:
        return uniq_activation(x, step, bits=bits, signed=signed)

    return _fit(x, start, quantize, channel_axis)


def _fit(
    x: jax.Array,
    start: jax.Array,
    quantize: Callable[[jax.Array], jax.Array],
    channel_axis: int | None,
) -> jax.Array:
    multiples = jnp.geomspace(_SMALLEST, _LARGEST, _COUNT, dtype=start.dtype)
    axes, keepdims = reduction_axes(x, channel_axis)

    def error(multiple: jax.Array) -> jax.Array:
        difference = (quantize(start * multiple) - x).astype(start.dtype)
        return data_parallel.mean(jnp.square(difference), axes, keepdims=keepdims)

    # One after another: all at once would take 25 times the memory of `x`.
    errors = jax.lax.map(error, multiples)
    return jnp.maximum(start * multiples[jnp.argmin(errors, axis=0)], SMALLEST_STEP)
