"""LSQ: learned step size quantization, the baseline with a zero level.

Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv:1902.08153).
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from uniq_jax import data_parallel
from uniq_jax.quantizers import uniform
from uniq_jax.quantizers.encoding import Encoded, as_codes
from uniq_jax.quantizers.grid import SMALLEST_STEP, Grid, check_broadcast, check_floating
from uniq_jax.quantizers.initial import reduction_axes


def lsq(
    x: Float[ArrayLike, "*shape"],
    step: Float[ArrayLike, "*step"],
    *,
    bits: int,
    signed: bool = True,
    gradient_scale: bool = True,
) -> Float[jax.Array, "*shape"]:
    """Fake-quantizes with a learned step s, on integer levels.

    Levels run from −Q_N to Q_P: −2**(bits−1) … 2**(bits−1) − 1 if `signed`, else 0 … 2**bits − 1.

        forward   value = s · round(clip(x/s, −Q_N, Q_P))       round half to even
        backward  ∂value/∂x = 1 inside the clip range, 1/2 on its edge, 0 outside
                  ∂value/∂s = g · (round(x/s) − x/s) inside, −g·Q_N below, g·Q_P above
                  g = 1/sqrt(N · Q_P), N elements to a step (Q_P = 0, at one signed bit, counts 1)

    Args:
      x: weights (`signed`) or rectified activations, any shape and floating dtype.
      step: s, broadcasts against `x`. Its magnitude counts, as in
        `uniq_weight`; inf and nan make every value that uses them nan.
      bits: 1 to 8. One signed bit has the levels −s and 0, as the paper's formula gives them; it
        trains nothing useful: binary networks are what `uniq_weight` is for.
      signed: whether the grid has negative levels.
      gradient_scale: whether the step's gradient carries the factor g.

    Returns:
      The quantized values, of the shape and dtype of `x`; nan stays nan, ±inf saturates.

    Raises:
      TypeError: if `x` or `step` is not floating, or `bits` not an integer.
      ValueError: if `bits` is not in 1..8, or `step` does not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> lsq(jnp.array([-2.0, -0.3, 0.1, 0.9]), 0.5, bits=2)
      Array([-1. , -0.5,  0. ,  0.5], dtype=float32)
    """
    grid = _grid(bits, signed)
    x, step = check_floating("x", x), check_floating("step", step)
    check_broadcast("step", step, x)
    weight = uniform.gradient_weight(x, step, grid.max_code - int(grid.offset), gradient_scale)
    return uniform.fake_quantize(x, step, grid, weight)


def lsq_encode(
    x: Float[ArrayLike, "*shape"],
    step: Float[ArrayLike, "*step"],
    *,
    bits: int,
    signed: bool = True,
    dtype: DTypeLike = jnp.uint8,
) -> Encoded:
    """The codes behind `lsq`, scale s, offset 2**(bits−1) (unsigned: 0). Arguments as there."""
    x, step = check_floating("x", x), check_floating("step", step)
    check_broadcast("step", step, x)
    grid = _grid(bits, signed)
    codes, scale, offset = uniform.encode(x, step, grid)
    return Encoded(as_codes(codes, dtype, grid.max_code), scale, offset)


def lsq_initial_step(
    x: Float[ArrayLike, "*shape"],
    *,
    bits: int,
    signed: bool = True,
    channel_axis: int | None = None,
) -> jax.Array:
    """The paper's first step, `2 · mean|x| / sqrt(Q_P)` (section 2.1), Q_P counting 1 at least.

    Args:
      x: the weights, or one batch of activations.
      bits: 1 to 8.
      signed: as in `lsq`.
      channel_axis: None for one step, or the axis that has a step for each of its entries.

    Returns:
      A step of shape () or of the shape of `x` with 1 on every other axis, float32 at least.
    """
    grid = _grid(bits, signed)
    x = check_floating("x", x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes, keepdims = reduction_axes(x, channel_axis)
    largest = max(grid.max_code - int(grid.offset), 1)
    step = 2 * data_parallel.mean(jnp.abs(x), axes, keepdims=keepdims) / math.sqrt(largest)
    return jnp.maximum(step, SMALLEST_STEP)


def _grid(bits: int, signed: bool) -> Grid:
    return Grid.twos_complement(bits) if signed else Grid.unsigned(bits)
