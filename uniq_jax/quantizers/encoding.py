"""Codes and their levels: the one decoder that every quantizer shares."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a quantizer makes of an array, before it becomes floating-point values again.

    Attributes:
      codes: integers 0..n, n = 2**bits − 1, of the input's shape; uint8 unless asked otherwise.
        In a floating dtype a code is nan where the input, or a learned scalar, was nan or not
        allowed; in uint8, which has no nan, such a code is 0.
      scale: the distance of two levels, float32 (or wider), broadcasts against `codes`.
      offset: 0 (activations), n/2 (weights) or 2**(bits−1) (signed LSQ); static under JAX's
        transformations.

    Unpacks into the three, in this order.
    """

    codes: Any  # An array of JAX or NumPy, or what JAX's transformations put in its place.
    scale: Any
    offset: float = dataclasses.field(metadata={"static": True})

    def __iter__(self) -> Iterator[Any]:
        return iter((self.codes, self.scale, self.offset))


def decode(encoded: Encoded, *, dtype: DTypeLike | None = None) -> jax.Array:
    """The levels that codes stand for: `scale * (code - offset)`.

    Every quantizer `f` of this package satisfies `f(x, …) == decode(f_encode(x, …), dtype=x.dtype)`
    to the last bit, because `f` is computed by this very function.

    Args:
      encoded: codes of any integer or floating dtype, with their scale and offset.
      dtype: of the result; by default that of `scale`. The product is taken in the scale's dtype
        (at least float32) and rounded to `dtype` once.

    Returns:
      The values, of the codes' shape.

    Example:
      >>> import jax.numpy as jnp
      >>> decode(Encoded(jnp.array([0, 1, 2, 3], jnp.uint8), jnp.float32(0.5), 1.5))
      Array([-0.75, -0.25,  0.25,  0.75], dtype=float32)
    """
    scale = jnp.asarray(encoded.scale)
    wide = scale.astype(jnp.promote_types(scale.dtype, jnp.float32))
    levels = encoded.codes.astype(wide.dtype) - encoded.offset
    return (wide * levels).astype(dtype or scale.dtype)


def as_codes(codes: jax.Array, dtype: DTypeLike, largest: int) -> jax.Array:
    """Casts codes held in a floating dtype, where nan marks what has no code, to `dtype`.

    Raises:
      ValueError: if `dtype` does not hold all of 0..largest.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        limit = 2 ** (jnp.finfo(dtype).nmant + 1)
    else:
        limit = jnp.iinfo(dtype).max
    if limit < largest:
        raise ValueError(
            f"dtype (={jnp.dtype(dtype).name}) must hold the codes 0 to {largest}, but it "
            f"holds the integers up to {limit} only"
        )
    if jnp.issubdtype(dtype, jnp.floating):
        return codes.astype(dtype)
    return jnp.where(jnp.isnan(codes), 0, codes).astype(dtype)


def compute_dtype(*arrays: ArrayLike) -> jnp.dtype:
    """The dtype that quantizers calculate in: that of the arguments, but float32 at least."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def widen(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`x` in a `dtype` at least as wide, with the value that its own dtype holds.

    XLA may leave out the rounding to bfloat16 of a result that is cast up again at once; the code
    would then be that of a number which no array ever held.
    """
    wide = x.astype(dtype)
    if x.dtype == jnp.bfloat16:
        wide = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
    return wide
