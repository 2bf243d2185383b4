"""Evenly spaced thresholds: what UniQ, LSQ, PACT and the N2UQ weights have in common.

**Why codes are corrected.** `round(x / step + offset)` is not a function that a compiler keeps:
XLA turns a division by one number into a multiplication by its reciprocal, and fuses a product and
a sum into one rounding, or not, depending on what surrounds them. Near a threshold that moves a
code. So the quotient only proposes a code, and comparisons decide: threshold i is
`step * (i - 1/2 - offset)`, one product, rounded once, whatever surrounds it, and x on a threshold
goes to the even code (round half to even). The same array and step thus have the same codes inside
a training step, alone, and in the frozen network. (Denormal x are left to the backend, which may
take them for zero.)
"""

import functools
import math

import jax
import jax.numpy as jnp

from uniq_jax.quantizers.encoding import Encoded, compute_dtype, decode, widen
from uniq_jax.quantizers.grid import SMALLEST_STEP, Grid


def usable_step(step: jax.Array) -> jax.Array:
    """The step that counts: `max(|step|, 2**-30)`, and nan for nan, inf and what is near inf.

    An optimizer may push a small step through zero. Its magnitude counts, so that it comes back on
    the other side instead of ending the training; the gradient carries its sign. Steps above 2**126
    (in float32), whose reciprocal is denormal, count as infinite: whether denormal numbers are
    flushed to zero is the backend's choice.
    """
    magnitude = jnp.abs(step)
    usable = magnitude <= 1 / jnp.finfo(step.dtype).tiny
    return jnp.where(usable, jnp.maximum(magnitude, SMALLEST_STEP), jnp.nan)


def uniform_codes(x: jax.Array, step: jax.Array, grid: Grid) -> jax.Array:
    """Codes `round_half_even(clip(x / step + offset, 0, n))`, in the dtype of x; nan marks nan."""
    step = usable_step(step)
    # Clipped before the division: XLA makes a/(b·step) of an x that is a/b, and b·step may be 0.
    code = jnp.round(jnp.clip(x, *_clip_range(step, grid)) / step + grid.offset)
    above = step * (code + (0.5 - grid.offset))
    below = step * (code - (0.5 + grid.offset))
    odd = 2 * jnp.floor(code / 2) != code
    too_low = (x > above) | ((x == above) & odd)
    too_high = (x < below) | ((x == below) & odd)
    code = code + too_low.astype(code.dtype) - too_high.astype(code.dtype)
    return jnp.clip(code, 0, grid.max_code)


def inside(x: jax.Array, step: jax.Array, grid: Grid) -> jax.Array:
    """1 within the clip range, 0 outside, 1/2 on its two edges (as minimum and maximum have it)."""
    low, high = _clip_range(step, grid)
    closed = ((x >= low) & (x <= high)).astype(x.dtype)
    opened = ((x > low) & (x < high)).astype(x.dtype)
    return (closed + opened) / 2


def _clip_range(step: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    return -grid.offset * step, (grid.max_code - grid.offset) * step


def encode(x: jax.Array, step: jax.Array, grid: Grid) -> Encoded:
    """Codes in floating point (nan kept) with their scale and offset."""
    dtype = compute_dtype(x, step)
    step = step.astype(dtype)
    return Encoded(uniform_codes(widen(x, dtype), step, grid), usable_step(step), grid.offset)


def shared_by(x: jax.Array, step: jax.Array) -> int:
    """How many elements of `x` share one learned scalar of `step`."""
    return max(x.size // max(step.size, 1), 1)


def sum_to_shape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums `x` over the axes along which an array of `shape` was broadcast against it."""
    lead = x.ndim - len(shape)
    axes = [*range(lead), *(lead + i for i, n in enumerate(shape) if n == 1)]
    return jnp.sum(x, axis=axes).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fake_quantize(x: jax.Array, step: jax.Array, grid: Grid, step_weight: float) -> jax.Array:
    """`decode(encode(x))`, with the gradients of UniQ and LSQ.

    `∂/∂x = inside`; `∂/∂step = (code − offset − inside · x/step) · step_weight`, summed over what
    shares a step. Only `x` and `step` are kept for the backward pass.
    """
    del step_weight
    return decode(encode(x, step, grid), dtype=x.dtype)


def _fake_quantize_fwd(x, step, grid, step_weight):
    return fake_quantize(x, step, grid, step_weight), (x, step)


def _fake_quantize_bwd(grid, step_weight, residuals, cotangent):
    x, step = residuals
    codes, scale, offset = encode(x, step, grid)
    x_, cotangent_ = widen(x, scale.dtype), cotangent.astype(scale.dtype)
    mask = inside(x_, scale, grid)
    # `where` and not a product with the mask: outside, x / step may be infinite.
    slope = codes - offset - jnp.where(mask > 0, mask * (x_ / scale), 0)
    grad_step = step_weight * sum_to_shape(cotangent_ * slope, step.shape)
    grad_step = jnp.where(step < 0, -grad_step, grad_step)
    return (cotangent_ * mask).astype(x.dtype), grad_step.astype(step.dtype)


fake_quantize.defvjp(_fake_quantize_fwd, _fake_quantize_bwd)


def gradient_weight(x: jax.Array, step: jax.Array, largest_level: int, enabled: bool) -> float:
    """`1 / sqrt(N · largest_level)`, N elements to a step (LSQ, eq. 5; UniQ); 1 if not enabled."""
    return 1 / math.sqrt(shared_by(x, step) * max(largest_level, 1)) if enabled else 1.0
