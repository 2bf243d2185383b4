"""UniQ: one learned symmetric quantizer for binary and multi-bit networks alike.

Pham, Abraham and Chung, "Training Multi-bit Quantized and Binarized Networks with a Learnable
Symmetric Quantizer", IEEE Access 9, 2021 (arXiv:2104.00210).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from uniq_jax.quantizers import uniform
from uniq_jax.quantizers.encoding import Encoded, as_codes
from uniq_jax.quantizers.grid import Grid, check_broadcast, check_floating


def uniq_weight(
    w: Float[ArrayLike, "*shape"],
    step: Float[ArrayLike, "*step"],
    *,
    bits: int,
    gradient_scale: bool = True,
) -> Float[jax.Array, "*shape"]:
    """Fake-quantizes weights with a learned step Δ; no level is zero.

    With n = 2**bits − 1:

        forward   code  = round(clip(w/Δ + n/2, 0, n))          round half to even
                  value = Δ · (code − n/2)
        backward  ∂value/∂w = 1 inside the clip range, 1/2 on its edge, 0 outside
                  ∂value/∂Δ = g · (code − n/2 − [inside] · w/Δ)
                  g = 1/sqrt(N · max(2**(bits−1) − 1, 1)), N weights to a step

    One bit gives ±Δ/2. Codes are decided by comparison with the thresholds Δ·(i − ½ − n/2), so that
    they are the same in every context a compiler may put this function in.

    Args:
      w: weights of any shape and floating dtype.
      step: Δ, broadcasts against `w`: one number, or one for each channel on any axis. What counts
        is max(|Δ|, 2**-30), so that a step which an optimizer pushes through zero goes on as its
        magnitude (its gradient carries the sign); inf and nan make every value that uses them nan.
      bits: 1 to 8.
      gradient_scale: whether the step's gradient carries the factor g.

    Returns:
      The quantized weights, of the shape and dtype of `w`. nan stays nan, ±inf saturates. It is
      calculated in float32 at least, and the gradient of `step` has the dtype of `step`.

    Raises:
      TypeError: if `w` or `step` is not floating, or `bits` not an integer.
      ValueError: if `bits` is not in 1..8, or `step` does not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> uniq_weight(jnp.array([-2.0, -0.3, 0.1, 0.9]), 0.5, bits=2)
      Array([-0.75, -0.25,  0.25,  0.75], dtype=float32)
    """
    grid = Grid.symmetric(bits)
    w, step = _checked("w", w, step)
    weight = uniform.gradient_weight(w, step, 2 ** (grid.bits - 1) - 1, gradient_scale)
    return uniform.fake_quantize(w, step, grid, weight)


def uniq_weight_encode(
    w: Float[ArrayLike, "*shape"],
    step: Float[ArrayLike, "*step"],
    *,
    bits: int,
    dtype: DTypeLike = jnp.uint8,
) -> Encoded:
    """The codes behind `uniq_weight`, scale Δ, offset n/2. Arguments as there."""
    return _encode(*_checked("w", w, step), Grid.symmetric(bits), dtype)


def uniq_activation(
    x: Float[ArrayLike, "*shape"],
    step: Float[ArrayLike, "*step"],
    *,
    bits: int,
    signed: bool = False,
    gradient_scale: bool = True,
) -> Float[jax.Array, "*shape"]:
    """Fake-quantizes activations with a learned step Δ.

    With n = 2**bits − 1:

        forward   code  = round(clip(x/Δ, 0, n))                round half to even
                  value = Δ · code
        backward  ∂value/∂x = 1 inside the clip range, 1/2 on its edge, 0 outside
                  ∂value/∂Δ = g · (code − [inside] · x/Δ),  g = 1/sqrt(N · n)

    N counts every element that shares the step, those of the whole batch included: in a sharded
    training step, of the global batch. Under `vmap`, `pmap` and `shard_map`, where one example or
    one device's part is all that is seen, it counts that. One bit gives {0, Δ}.

    Args:
      x: activations of any shape and floating dtype.
      step: Δ, broadcasts against `x`. Its magnitude counts, as in
        `uniq_weight`; inf and nan make every value that uses them nan.
      bits: 1 to 8.
      signed: quantize on the symmetric grid of `uniq_weight`, gradient scale included: for inputs
        that are not rectified (a network's first layer, MobileNet's linear bottlenecks).
      gradient_scale: whether the step's gradient carries the factor g.

    Returns:
      The quantized activations, of the shape and dtype of `x`; nan stays nan, ±inf saturates.

    Raises:
      TypeError: if `x` or `step` is not floating, or `bits` not an integer.
      ValueError: if `bits` is not in 1..8, or `step` does not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> uniq_activation(jnp.array([-1.0, 0.3, 0.8, 9.0]), 0.5, bits=2)
      Array([0. , 0.5, 1. , 1.5], dtype=float32)
    """
    if signed:
        return uniq_weight(x, step, bits=bits, gradient_scale=gradient_scale)
    grid = Grid.unsigned(bits)
    x, step = _checked("x", x, step)
    weight = uniform.gradient_weight(x, step, grid.max_code, gradient_scale)
    return uniform.fake_quantize(x, step, grid, weight)


def uniq_activation_encode(
    x: Float[ArrayLike, "*shape"],
    step: Float[ArrayLike, "*step"],
    *,
    bits: int,
    signed: bool = False,
    dtype: DTypeLike = jnp.uint8,
) -> Encoded:
    """The codes behind `uniq_activation`, scale Δ, offset 0 (`signed`: n/2). Arguments as there."""
    grid = Grid.symmetric(bits) if signed else Grid.unsigned(bits)
    return _encode(*_checked("x", x, step), grid, dtype)


def _checked(name: str, x: ArrayLike, step: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, step = check_floating(name, x), check_floating("step", step)
    check_broadcast("step", step, x)
    return x, step


def _encode(x: jax.Array, step: jax.Array, grid: Grid, dtype: DTypeLike) -> Encoded:
    codes, scale, offset = uniform.encode(x, step, grid)
    return Encoded(as_codes(codes, dtype, grid.max_code), scale, offset)
