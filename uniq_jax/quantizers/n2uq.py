"""N2UQ: learned, unequal input thresholds with equally spaced outputs.

Liu et al., "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized
Straight-Through Estimation", CVPR 2022 (arXiv:2111.14826).
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from uniq_jax.quantizers import uniform
from uniq_jax.quantizers.encoding import Encoded, as_codes, compute_dtype, decode, widen
from uniq_jax.quantizers.grid import SMALLEST_STEP, Grid, check_bits, check_floating
from uniq_jax.quantizers.interval_sums import interval_gradients

MAX_THRESHOLD_BITS = 5

# Intervals are floored here: thresholds stay in order, and slopes 1/a stay finite.
SMALLEST_INTERVAL = 1e-3


class N2uqActivationParameters(NamedTuple):
    """What `n2uq_activation` learns: the arguments that follow its input, in their order."""

    start: jax.Array
    intervals: jax.Array
    input_scale: jax.Array
    output_scale: jax.Array


def n2uq_activation(
    x: Float[ArrayLike, "*shape"],
    start: Float[ArrayLike, "..."],
    intervals: Float[ArrayLike, " n"],
    input_scale: Float[ArrayLike, "..."],
    output_scale: Float[ArrayLike, "..."],
) -> Float[jax.Array, "*shape"]:
    """Fake-quantizes activations with learned thresholds, n = 2**bits − 1 of them.

    With start s, intervals a₁ … aₙ (floored at 1e-3), input scale β₁, output scale β₂, u = β₁·x and
    d_i = s + a₁ + … + a_i:

        forward   code  = number of i in 1..n with u > d_{i−1} + a_i/2
                  value = β₂ · (2/n) · code
        backward  (G-STE: the derivatives of the piecewise linear function through (d_i, i·β₂·2/n))
                  for u in segment i, d_{i−1} < u ≤ d_i, and r = β₂·(2/n)/a_i:
                  ∂/∂x = r·β₁      ∂/∂s = −r      ∂/∂a_j = −r for j < i
                  ∂/∂a_i = −r·(u − d_{i−1})/a_i   ∂/∂β₁ = r·x   ∂/∂β₂ = (2/n)·code
                  outside the segments all are 0 but the last;
                  an interval below the floor gets no gradient

    Args:
      x: activations of any shape and floating dtype.
      start: s, one number: shape () or (1,).
      intervals: a, shape (n,); n = 1, 3, 7, 15 or 31 gives 1 to 5 bits.
      input_scale: β₁, one number.
      output_scale: β₂, one number.

    Returns:
      The quantized activations, of the shape and dtype of `x`. nan stays nan, ±inf saturates, and
      a learned scalar that is nan makes every value nan. The gradients of the learned scalars
      have their dtype and are summed in float32 at least; `x` is the only large residual.

    Raises:
      TypeError: if an argument is not floating.
      ValueError: if the number of intervals is not 1, 3, 7, 15 or 31, or another learned argument
        is not a single number.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([-1.0, 0.2, 0.9, 5.0])
      >>> n2uq_activation(x, *n2uq_activation_initial(bits=2))
      Array([0.       , 0.       , 0.6666667, 2.       ], dtype=float32)
    """
    return _n2uq_activation(*_checked(x, start, intervals, input_scale, output_scale))


def n2uq_activation_encode(
    x: Float[ArrayLike, "*shape"],
    start: Float[ArrayLike, "..."],
    intervals: Float[ArrayLike, " n"],
    input_scale: Float[ArrayLike, "..."],
    output_scale: Float[ArrayLike, "..."],
    *,
    dtype: DTypeLike = jnp.uint8,
) -> Encoded:
    """The codes behind `n2uq_activation`, scale β₂·2/n, offset 0. Arguments as there."""
    arguments = _checked(x, start, intervals, input_scale, output_scale)
    codes, scale, offset = _encode(*arguments)
    return Encoded(as_codes(codes, dtype, jnp.size(intervals)), scale, offset)


def n2uq_activation_edges(
    start: Float[ArrayLike, "..."],
    intervals: Float[ArrayLike, " n"],
    input_scale: Float[ArrayLike, "..."],
) -> Float[jax.Array, " edges"]:
    """Where `n2uq_activation`'s segments end, in its input: d_0/β₁ … d_n/β₁.

    Threshold i lies in the middle of segment i. A negative β₁ turns their order round. Arguments
    as there.

    Example:
      >>> start, intervals, input_scale, _ = n2uq_activation_initial(bits=1, step=3.0)
      >>> n2uq_activation_edges(start, intervals, input_scale)
      Array([0., 3.], dtype=float32)
    """
    intervals = check_floating("intervals", intervals)
    _, edges = _edges(check_floating("start", start), intervals)
    return edges / check_floating("input_scale", input_scale).reshape(())


def n2uq_activation_initial(
    *, bits: int, step: ArrayLike | None = None, dtype: DTypeLike = jnp.float32
) -> N2uqActivationParameters:
    """The first thresholds and scales.

    Without `step` those of N2UQ's code: s = 0, a_i = 2/n, both scales 1, which suits inputs that
    mostly lie in 0..2. With a calibrated `step` Δ the input scale becomes (2/n)/Δ and the output
    scale its inverse: N2UQ then starts as the uniform quantizer of step Δ.

    Args:
      bits: 1 to 5.
      step: None, or a positive number, for example of `uniq_activation_initial_step`.
      dtype: of the parameters.

    Returns:
      start (), intervals (n,), input scale (), output scale ().

    Raises:
      TypeError, ValueError: if `bits` is not an integer in 1..5.
    """
    n = 2 ** check_bits(bits, maximum=MAX_THRESHOLD_BITS) - 1
    output_scale = jnp.ones((), dtype) if step is None else jnp.asarray(step, dtype) * (n / 2)
    return N2uqActivationParameters(
        start=jnp.zeros((), dtype),
        intervals=jnp.full((n,), 2 / n, dtype),
        input_scale=1 / output_scale,
        output_scale=output_scale,
    )


def n2uq_weight(
    w: Float[ArrayLike, "*shape"],
    *,
    bits: int,
    channel_axis: int = -1,
    gradient: Literal["reference", "clipped"] = "reference",
) -> Float[jax.Array, "*shape"]:
    """Fake-quantizes weights rescaled to keep their entropy; nothing is learned.

    With n = 2**bits − 1 and, per output channel, σ = n/2**(bits−1) · mean|w|:

        forward   value = σ · (2·round((clip(w/σ, −1, 1) + 1)·n/2)/n − 1)
        backward  gradient="reference":  ∂value/∂w = 1/σ, everywhere
                  gradient="clipped":    ∂value/∂w = 1 for |w| < σ, 1/2 at |w| = σ, else 0

    Both hold σ constant. "reference" is what N2UQ's own program computes: its clip has no part in
    the gradient, and the division by σ is not undone, which multiplies each channel's gradient by
    1/σ (Adam, which N2UQ trains with, is all but blind to such a factor; SGD is not). "clipped"
    is the plain straight-through gradient of the formula.

    The value is `uniq_weight` with the step 2σ/n = 2**(2−bits) · mean|w|, and is computed so.

    Args:
      w: weights of any shape and floating dtype.
      bits: 1 to 8.
      channel_axis: the output channel's axis; Flax keeps it last.
      gradient: "reference" or "clipped".

    Returns:
      The quantized weights, of the shape and dtype of `w`. A channel of zeros stays zero, and its
      gradient is 0 ("reference") or passes ("clipped"); a channel with a nan or inf becomes nan.

    Raises:
      TypeError: if `w` is not floating, or `bits` not an integer.
      ValueError: if `bits` is not in 1..8, `gradient` is another word, or `w` has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> n2uq_weight(jnp.array([[-0.6, 0.1], [0.2, 0.3]]), bits=1)
      Array([[-0.4,  0.2],
             [ 0.4,  0.2]], dtype=float32)
    """
    if gradient not in ("reference", "clipped"):
        raise ValueError(f"gradient (={gradient!r}) must be 'reference' or 'clipped'")
    w, axis = _checked_weight(w, channel_axis)
    return _n2uq_weight(w, check_bits(bits), axis, gradient)


def n2uq_weight_encode(
    w: Float[ArrayLike, "*shape"],
    *,
    bits: int,
    channel_axis: int = -1,
    dtype: DTypeLike = jnp.uint8,
) -> Encoded:
    """The codes behind `n2uq_weight`, scale 2σ/n by channel, offset n/2. Arguments as there."""
    w, axis = _checked_weight(w, channel_axis)
    codes, scale, offset = _encode_weight(w, check_bits(bits), axis)
    return Encoded(as_codes(codes, dtype, 2**bits - 1), scale, offset)


def _checked(x, start, intervals, input_scale, output_scale) -> tuple[jax.Array, ...]:
    x, intervals = check_floating("x", x), check_floating("intervals", intervals)
    sizes = [2**bits - 1 for bits in range(1, MAX_THRESHOLD_BITS + 1)]
    if intervals.ndim != 1 or intervals.size not in sizes:
        raise ValueError(
            f"intervals of shape {intervals.shape} must have shape (n,) with n = 2**bits - 1 one "
            f"of {', '.join(map(str, sizes))}"
        )
    scalars = {"start": start, "input_scale": input_scale, "output_scale": output_scale}
    for name, value in scalars.items():
        scalars[name] = check_floating(name, value)
        if scalars[name].size != 1:
            raise ValueError(f"{name} of shape {scalars[name].shape} must be a single number")
    return (x, scalars["start"], intervals, scalars["input_scale"], scalars["output_scale"])


def _edges(start: jax.Array, intervals: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Floored intervals a (n,) and the segments' edges d_0 … d_n (n + 1,).

    Summed by doubling, in an order that the program states; `cumsum` leaves it to the backend.
    """
    floored = jnp.maximum(intervals, SMALLEST_INTERVAL)
    edges = jnp.concatenate([start.reshape(1), floored])
    for shift in [2**i for i in range(intervals.size.bit_length())]:
        edges = edges + jnp.pad(edges[:-shift], (shift, 0))
    return floored, edges


def _encode(x, start, intervals, input_scale, output_scale) -> Encoded:
    dtype = compute_dtype(x, start, intervals, input_scale, output_scale)
    n = intervals.size
    floored, edges = _edges(start.astype(dtype), intervals.astype(dtype))
    # Halving is exact, so this sum is rounded once however it is fused.
    thresholds = edges[:-1] + floored / 2
    # A bounded x: XLA would pull a constant factor of x into the scale, and round anew; and 0 · inf
    # is nan.
    largest = jnp.finfo(dtype).max
    u = input_scale.astype(dtype).reshape(()) * jnp.clip(widen(x, dtype), -largest, largest)
    codes = functools.reduce(jnp.add, [(u > thresholds[i]).astype(dtype) for i in range(n)])
    # A comparison with nan is false, which would look like code 0.
    codes = jnp.where(jnp.isnan(u) | jnp.isnan(edges[-1]), jnp.nan, codes)
    return Encoded(codes, output_scale.astype(dtype).reshape(()) * (2 / n), 0.0)


@jax.custom_vjp
def _n2uq_activation(x, start, intervals, input_scale, output_scale):
    return decode(_encode(x, start, intervals, input_scale, output_scale), dtype=x.dtype)


def _n2uq_activation_fwd(*arguments):
    return _n2uq_activation(*arguments), arguments


def _n2uq_activation_bwd(arguments, cotangent):
    x, start, intervals, input_scale, output_scale = arguments
    dtype = compute_dtype(*arguments)
    n = intervals.size
    floored, edges = _edges(start.astype(dtype), intervals.astype(dtype))
    slopes = output_scale.astype(dtype).reshape(()) * (2 / n) / floored
    thresholds = edges[:-1] + floored / 2
    grad_u, grad_in_interval, moment_in_interval, grad_times_code, grad_u_times_x = (
        interval_gradients(
            widen(x, dtype),
            cotangent.astype(dtype),
            input_scale.astype(dtype).reshape(()),
            edges,
            thresholds,
            slopes,
        )
    )
    # The slope-weighted cotangent of all later segments shifts with an earlier interval.
    weighted = slopes * grad_in_interval
    later = jnp.flip(jnp.cumsum(jnp.flip(weighted))) - weighted
    grad_intervals = -later - slopes * moment_in_interval / floored
    grad_intervals = jnp.where(intervals.astype(dtype) < floored, 0, grad_intervals)

    def like(value, argument):
        return value.reshape(argument.shape).astype(argument.dtype)

    return (
        (grad_u * input_scale.astype(dtype).reshape(())).astype(x.dtype),
        like(-jnp.sum(weighted), start),
        like(grad_intervals, intervals),
        like(grad_u_times_x, input_scale),
        like(grad_times_code * (2 / n), output_scale),
    )


_n2uq_activation.defvjp(_n2uq_activation_fwd, _n2uq_activation_bwd)


def _checked_weight(w: ArrayLike, channel_axis: int) -> tuple[jax.Array, int]:
    w = check_floating("w", w)
    if not -w.ndim <= channel_axis < w.ndim:
        raise ValueError(
            f"channel_axis (={channel_axis}) must be an axis of w, which has {w.ndim}: "
            f"from {-w.ndim} to {w.ndim - 1}"
        )
    return w, channel_axis % w.ndim


def _encode_weight(w: jax.Array, bits: int, channel_axis: int) -> Encoded:
    magnitude = jnp.abs(widen(w, compute_dtype(w)))
    step = 2.0 ** (2 - bits) * _mean_of_others(magnitude, channel_axis)
    # A channel of zeros has no scale; any step codes it, and the scale 0 makes it zero again.
    step = jnp.where(step < SMALLEST_STEP, 0, step)
    codes, scale, offset = uniform.encode(w, jnp.where(step == 0, 1, step), Grid.symmetric(bits))
    return Encoded(codes, jnp.where(step == 0, 0, scale), offset)


def _mean_of_others(x: jax.Array, axis: int) -> jax.Array:
    """The mean over all axes but one, which are kept as 1.

    Summed by halves, in an order that the program states: a reduction's order is the compiler's
    choice and may change with what it is fused with, and with it a weight's code.
    """
    channels = x.shape[axis]
    count = max(x.size // max(channels, 1), 1)
    rows = jnp.moveaxis(x, axis, -1).reshape(x.size // max(channels, 1), channels)
    rows = jnp.pad(rows, ((0, 2 ** math.ceil(math.log2(count)) - rows.shape[0]), (0, 0)))
    while rows.shape[0] > 1:
        half = rows.shape[0] // 2
        rows = rows[:half] + rows[half:]
    shape = [1] * x.ndim
    shape[axis] = channels
    return (rows * (1 / count)).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _n2uq_weight(w, bits, channel_axis, gradient):
    del gradient
    return decode(_encode_weight(w, bits, channel_axis), dtype=w.dtype)


def _n2uq_weight_fwd(w, bits, channel_axis, gradient):
    return _n2uq_weight(w, bits, channel_axis, gradient), w


def _n2uq_weight_bwd(bits, channel_axis, gradient, w, cotangent):
    _, step, _ = _encode_weight(w, bits, channel_axis)
    wide = cotangent.astype(step.dtype)
    if gradient == "reference":
        sigma = step * ((2**bits - 1) / 2)
        grad = wide * jnp.where(sigma == 0, 0, 1 / sigma)
    else:
        mask = uniform.inside(widen(w, step.dtype), step, Grid.symmetric(bits))
        grad = wide * jnp.where(step == 0, 1, mask)
    return (grad.astype(w.dtype),)


_n2uq_weight.defvjp(_n2uq_weight_fwd, _n2uq_weight_bwd)
