"""Initial steps: the mean-square-optimal uniform quantizer of the distribution at hand."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from uniq_jax import data_parallel
from uniq_jax.quantizers.grid import SMALLEST_STEP, check_bits, check_floating

# Steps, in standard deviations, that `optimal_step` derives; kept as data because the derivation
# takes a moment and every network needs them. A test holds the two together. The rectified ones at
# 1, 2, 3, 4 and 8 bits are the constants of UniQ's own code, up to 7e-5 from the optimum.
NORMAL_STEPS = {
    1: 1.5957691216057308,
    2: 0.9956866859435065,
    3: 0.5860194414434869,
    4: 0.3352006121999728,
    5: 0.1881387902799179,
    6: 0.1040630094420145,
    7: 0.0568676723823577,
    8: 0.0307623875823242,
}
RECTIFIED_NORMAL_STEPS = {
    1: 1.22399153,
    2: 0.65076985,
    3: 0.35340955,
    4: 0.19324868,
    5: 0.1054875860582804,
    6: 0.0572612807209767,
    7: 0.0308700860403488,
    8: 0.01652923,
}

# Of what varies less about its mean, the mean is what a step must reach.
_LEAST_SPREAD = 0.25


def uniq_weight_initial_step(
    w: Float[ArrayLike, "*shape"], *, bits: int, channel_axis: int | None = None
) -> jax.Array:
    """`std(w) · c[bits]`, c the optimal step for a unit normal and `uniq_weight`'s symmetric grid.

    Weights that hardly differ, as one weight a channel does not at all, would have a step of about
    0, which clips them all and gives them no gradient: so `std(w)` is a quarter of `rms(w)` at
    least. That is this project's addition.

    Args:
      w: the weights; their unbiased standard deviation (divisor N − 1) is taken, without the mean.
      bits: 1 to 8.
      channel_axis: None for one step, or the axis that has a step for each of its entries.

    Returns:
      A step of shape (), or of the shape of `w` with 1 on every other axis; float32 at least, and
      never below 2**-30.

    Raises:
      TypeError: if `w` is not floating, or `bits` not an integer.
      ValueError: if `bits` is not in 1..8, or `channel_axis` is no axis of `w`.
    """
    bits = check_bits(bits)
    w = check_floating("w", w)
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    axes, keepdims = reduction_axes(w, channel_axis)
    count = math.prod(w.shape[axis] for axis in axes)
    std = data_parallel.std(w, axes, keepdims=keepdims, ddof=1 if count > 1 else 0)
    rms = jnp.sqrt(data_parallel.mean(jnp.square(w), axes, keepdims=keepdims))
    spread = jnp.maximum(std, rms * _LEAST_SPREAD)
    return jnp.maximum(spread * NORMAL_STEPS[bits], SMALLEST_STEP)


def uniq_activation_initial_step(
    x: Float[ArrayLike, "*shape"],
    *,
    bits: int,
    signed: bool = False,
    channel_axis: int | None = None,
) -> jax.Array:
    """`std · c[bits]`, c the optimal step for a rectified unit normal, std² = 2 · mean(x²).

    Half of a normal's mass is cut off by the ReLU, hence the factor 2. Over several calibration
    batches the largest step wins (UniQ's running maximum).

    Args:
      x: one batch of activations.
      bits: 1 to 8.
      signed: take the rule of `uniq_weight_initial_step`, for the symmetric grid.
      channel_axis: None for one step, or the axis that has a step for each of its entries.

    Returns:
      A step of shape (), or of the shape of `x` with 1 on every other axis; float32 at least, and
      never below 2**-30.

    Raises:
      TypeError: if `x` is not floating, or `bits` not an integer.
      ValueError: if `bits` is not in 1..8, or `channel_axis` is no axis of `x`.
    """
    if signed:
        return uniq_weight_initial_step(x, bits=bits, channel_axis=channel_axis)
    bits = check_bits(bits)
    x = check_floating("x", x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes, keepdims = reduction_axes(x, channel_axis)
    std = jnp.sqrt(2 * data_parallel.mean(jnp.square(x), axes, keepdims=keepdims))
    return jnp.maximum(std * RECTIFIED_NORMAL_STEPS[bits], SMALLEST_STEP)


def reduction_axes(x: jax.Array, channel_axis: int | None) -> tuple[tuple[int, ...], bool]:
    """The axes that share a learned scalar, and whether their statistics keep them as 1."""
    if channel_axis is None:
        return tuple(range(x.ndim)), False
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(
            f"channel_axis (={channel_axis}) must be None or an axis of the array, which has "
            f"{x.ndim}: from {-x.ndim} to {x.ndim - 1}"
        )
    return tuple(i for i in range(x.ndim) if i != channel_axis % x.ndim), True


@functools.cache
def optimal_step(bits: int, distribution: Literal["normal", "rectified_normal"]) -> float:
    """The step that minimizes the mean squared error of a uniform quantizer of `distribution`.

    "normal": levels Δ·(k − n/2), k = 0..n, of a unit normal (Max 1960, table II).
    "rectified_normal": levels Δ·k of max(z, 0), z a unit normal, where half of the probability sits
    at exactly 0, which has a level of its own.

    With s_j·Δ the level of cell j and m_j, f_j the normal's mass and first moment in it, the
    error's derivative is `2·Σ s_j·(s_j·Δ·m_j − f_j)` (the moving edges cancel, as they lie halfway
    between levels); its only root is bracketed by bisection.

    Example:
      >>> round(optimal_step(2, "normal"), 4)
      0.9957
    """
    n = 2 ** check_bits(bits) - 1
    if distribution == "normal":
        # By symmetry the positive half: levels (j + 1/2)Δ, edges jΔ.
        levels, first_edge = [j + 0.5 for j in range((n + 1) // 2)], 0.0
    elif distribution == "rectified_normal":
        levels, first_edge = [float(j) for j in range(n + 1)], -0.5
    else:
        raise ValueError(f"distribution (={distribution!r}) must be 'normal' or 'rectified_normal'")

    def derivative(step: float) -> float:
        total = 0.0
        for j, level in enumerate(levels):
            low = max((j + first_edge) * step, 0.0)
            high = math.inf if j == len(levels) - 1 else (j + 1 + first_edge) * step
            mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
            total += level * (level * step * mass - (_density(low) - _density(high)))
        return total

    low, high = 1e-3, 4.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if derivative(middle) < 0 else (low, middle)
    return middle


def _density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
