"""Evaluation on integer levels: exact sums, then one scale.

In training a layer multiplies fake-quantized values. Such sums are rounded, in an order that
depends on the compiler, and a code of the next layer that lies near a threshold may turn out
differently. In evaluation layers therefore multiply levels, which are integers: as long as every
sum stays below 2**24, float32 holds it exactly whatever the order, and any integer implementation
finds the same number. A single product with the scale follows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from uniq_jax.quantizers import Encoded, Grid

EXACT = 2**24
"""Sums of integers below this are exact in float32, whatever their order."""

# The digits that larger levels are split into.
_BASE = 16

Multiply = Callable[[jax.Array, jax.Array], jax.Array]


def largest_level(grid: Grid) -> int:
    """The largest magnitude of an integer level of `grid`."""
    factor = _factor(grid)
    return int(max(factor * grid.offset, factor * (grid.max_code - grid.offset)))


def check_accumulator(activation: Grid, weight: Grid, taps: int) -> None:
    """Raises a ValueError if a sum of `taps` products of levels could exceed an int32.

    Or, where sums are taken of digits (see `accumulate`), if that of one digit's products could
    exceed what float32 holds.
    """
    bound = taps * largest_level(activation) * largest_level(weight)
    if bound >= 2**31:
        raise ValueError(
            f"{taps} products of {activation.bits}-bit activations with {weight.bits}-bit weights "
            f"can sum to {bound}, beyond an int32 accumulator (2**31 - 1); use fewer bits"
        )
    if bound >= EXACT and taps * _BASE**2 >= EXACT:
        raise ValueError(
            f"{taps} products of {activation.bits}-bit activations with {weight.bits}-bit weights "
            f"can sum to {bound}: from 2**24 on at most {EXACT // _BASE**2 - 1} products are "
            "exact; use fewer bits"
        )


def integer_levels(encoded: Encoded, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Integer levels (in the codes' dtype) and the scale that takes them to values.

    Where the grid has half-integer levels these are the odd integers `2 * code - n`.
    """
    factor = _factor(grid)
    return factor * encoded.codes - factor * grid.offset, encoded.scale / factor


def joint_scale(input_scale: jax.Array, kernel_scale: jax.Array) -> jax.Array:
    """What one unit of the sums of products of levels is worth: the scales' product.

    A scale is often a learned number times a constant. Compilers take a product of two of these for
    one of the learned numbers and one of the constants, and round anew; not so behind the maximum,
    which changes no finite number.
    """
    least = jnp.finfo(input_scale.dtype).min
    return jnp.maximum(input_scale, least) * jnp.maximum(kernel_scale, least)


def accumulate(
    activations: jax.Array,
    weights: jax.Array,
    multiply: Multiply,
    *,
    activation_grid: Grid,
    weight_grid: Grid,
    taps: int,
) -> jax.Array:
    """The exact sums of products of integer levels, in the levels' floating dtype.

    Sums that float32 would round (8-bit layers with many inputs) are taken of base-16 digits, each
    product of digits exact, and joined in int32; the total is then rounded to float32 once, in the
    same way as an integer accumulator is.

    Args:
      activations: integer levels of the input, float32 or float64.
      weights: integer levels of the kernel, of the same dtype.
      multiply: the layer's bilinear map, a convolution or matrix product, of floating arrays.
      activation_grid: of `activations`.
      weight_grid: of `weights`.
      taps: products that one output sums.
    """
    bounds = largest_level(activation_grid), largest_level(weight_grid)
    if taps * bounds[0] * bounds[1] < EXACT or activations.dtype == jnp.float64:
        return multiply(activations, weights)
    total = jnp.zeros((), jnp.int32)
    for a_place, a_digits in _digits(activations):
        for w_place, w_digits in _digits(weights):
            product = multiply(a_digits, w_digits)
            total = total + a_place * w_place * product.astype(jnp.int32)
    # int32 has no nan: carry it around.
    lost = jnp.isnan(multiply(activations, weights))
    return jnp.where(lost, jnp.nan, total.astype(activations.dtype))


def _factor(grid: Grid) -> int:
    return 2 if grid.has_half_levels else 1


def _digits(levels: jax.Array) -> list[tuple[int, jax.Array]]:
    high = jnp.floor(levels / _BASE)
    return [(_BASE, high), (1, levels - _BASE * high)]
