"""PACT: activations clipped at a learned bound.

Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018
(arXiv:1805.06085).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from uniq_jax.quantizers import uniform
from uniq_jax.quantizers.encoding import Encoded, as_codes, compute_dtype, decode, widen
from uniq_jax.quantizers.grid import Grid, check_broadcast, check_floating
from uniq_jax.quantizers.initial import uniq_activation_initial_step


def pact_activation(
    x: Float[ArrayLike, "*shape"],
    clip: Float[ArrayLike, "*clip"],
    *,
    bits: int,
    gradient: Literal["paper", "reference"] = "paper",
) -> Float[jax.Array, "*shape"]:
    """Fake-quantizes activations between 0 and a learned clip c.

    With n = 2**bits − 1:

        forward   code  = round(n · min(relu(x), c)/c)          round half to even
                  value = c/n · code
        backward  ∂value/∂x = [0 < x < c]
                  gradient="paper":      ∂value/∂c = [x ≥ c]
                  gradient="reference":  ∂value/∂c = [x ≥ c] + code/n

    "reference" is what the program of N2UQ, which uses PACT before one layer, computes: it
    differentiates the scale c/n too, but not the division inside the rounding.

    Args:
      x: activations of any shape and floating dtype.
      clip: c, broadcasts against `x`. Its magnitude counts, as that
        of a step of c/n in `uniq_weight`; inf and nan make every value that uses them nan.
      bits: 1 to 8.
      gradient: "paper" or "reference".

    Returns:
      The quantized activations, of the shape and dtype of `x`; nan stays nan, ±inf saturates.

    Raises:
      TypeError: if `x` or `clip` is not floating, or `bits` not an integer.
      ValueError: if `bits` is not in 1..8, `gradient` is another word, or `clip` does not
        broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> pact_activation(jnp.array([-1.0, 0.3, 0.8, 9.0]), 1.5, bits=2)
      Array([0. , 0.5, 1. , 1.5], dtype=float32)
    """
    if gradient not in ("paper", "reference"):
        raise ValueError(f"gradient (={gradient!r}) must be 'paper' or 'reference'")
    return _pact(*_checked(x, clip), Grid.unsigned(bits), gradient)


def pact_activation_encode(
    x: Float[ArrayLike, "*shape"],
    clip: Float[ArrayLike, "*clip"],
    *,
    bits: int,
    dtype: DTypeLike = jnp.uint8,
) -> Encoded:
    """The codes behind `pact_activation`, scale c/n, offset 0. Arguments as there."""
    grid = Grid.unsigned(bits)
    codes, scale, offset = _encode(*_checked(x, clip), grid)
    return Encoded(as_codes(codes, dtype, grid.max_code), scale, offset)


def pact_initial_clip(x: Float[ArrayLike, "*shape"], *, bits: int) -> jax.Array:
    """A first clip from one batch of activations: n times UniQ's initial step, shape ().

    PACT itself starts from a constant and lets weight decay pull it down; a calibrated start needs
    no such constant. Arguments and errors as `uniq_activation_initial_step`.
    """
    return uniq_activation_initial_step(x, bits=bits) * Grid.unsigned(bits).max_code


def _checked(x: ArrayLike, clip: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, clip = check_floating("x", x), check_floating("clip", clip)
    check_broadcast("clip", clip, x)
    return x, clip


def _encode(x: jax.Array, clip: jax.Array, grid: Grid) -> Encoded:
    # A product with a constant is the same in every context; a division by one is not.
    step = clip.astype(compute_dtype(x, clip)) * (1 / grid.max_code)
    return uniform.encode(x, step, grid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pact(x, clip, grid, gradient):
    del gradient
    return decode(_encode(x, clip, grid), dtype=x.dtype)


def _pact_fwd(x, clip, grid, gradient):
    return _pact(x, clip, grid, gradient), (x, clip)


def _pact_bwd(grid, gradient, residuals, cotangent):
    x, clip = residuals
    dtype = compute_dtype(x, clip)
    x_, clip_, cotangent_ = widen(x, dtype), clip.astype(dtype), cotangent.astype(dtype)
    magnitude = jnp.abs(clip_)
    slope = (x_ >= magnitude).astype(dtype)
    if gradient == "reference":
        slope = slope + _encode(x, clip, grid).codes / grid.max_code
    grad_x = jnp.where((x_ > 0) & (x_ < magnitude), cotangent_, 0)
    grad_clip = uniform.sum_to_shape(cotangent_ * slope, clip.shape)
    grad_clip = jnp.where(clip_ < 0, -grad_clip, grad_clip)
    return grad_x.astype(x.dtype), grad_clip.astype(clip.dtype)


_pact.defvjp(_pact_fwd, _pact_bwd)
