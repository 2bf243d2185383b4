"""The integer grids: how many levels a width has, and where zero lies among them."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

MAX_BITS = 8

# No step is smaller: quotients by it stay finite, and an all-zero kernel (a pruned channel) still
# has a step.
SMALLEST_STEP = 2.0**-30


def check_bits(bits: Any, *, maximum: int = MAX_BITS) -> int:
    """Returns `bits` as an int.

    Raises:
      TypeError: if `bits` is no integer.
      ValueError: if `bits` lies outside 1..`maximum`.
    """
    try:
        if isinstance(bits, bool):
            raise TypeError
        value = operator.index(bits)
    except TypeError:
        raise TypeError(
            f"bits (={bits!r}) must be an integer from 1 to {maximum}, "
            f"not a {type(bits).__name__}; it is static, so it cannot be traced"
        ) from None
    if not 1 <= value <= maximum:
        raise ValueError(f"bits (={bits!r}) must be an integer from 1 to {maximum}")
    return value


@dataclasses.dataclass(frozen=True)
class Grid:
    """Equally spaced levels `scale * (code - offset)`, code in 0..`max_code`.

    Attributes:
      bits: width of a code, 1 to 8.
      offset: the code, possibly half-integer, whose level would be zero. 0 for activations,
        `max_code / 2` for weights (which therefore have no zero level), `2**(bits-1)` for signed
        LSQ.
    """

    bits: int
    offset: float

    def __post_init__(self):
        # A Python int: 2**bits of a NumPy int8 would overflow.
        object.__setattr__(self, "bits", check_bits(self.bits))

    @classmethod
    def unsigned(cls, bits: int) -> "Grid":
        """Levels 0, 1, …, n times the scale: activations after a ReLU."""
        return cls(bits, 0.0)

    @classmethod
    def symmetric(cls, bits: int) -> "Grid":
        """Levels ±1/2, ±3/2, …, ±n/2 times the scale: weights, and signed activations."""
        return cls(bits, (2 ** check_bits(bits) - 1) / 2)

    @classmethod
    def twos_complement(cls, bits: int) -> "Grid":
        """Levels −2**(bits−1), …, 2**(bits−1) − 1 times the scale: signed LSQ."""
        return cls(bits, 2.0 ** (check_bits(bits) - 1))

    @property
    def max_code(self) -> int:
        """The largest code, n = 2**bits − 1."""
        return 2**self.bits - 1

    @property
    def has_half_levels(self) -> bool:
        """Whether levels are half-integers, so that `2 * code - max_code` is what is integer."""
        return self.offset != int(self.offset)


def check_floating(name: str, x: Any) -> jax.Array:
    """Returns `x` as an array of a floating dtype; raises a TypeError that names it otherwise."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, not {array.dtype}")
    return array


def check_broadcast(name: str, value: jax.Array, x: jax.Array) -> None:
    """Raises a ValueError unless `value` broadcasts against `x` without enlarging it."""
    fits = value.ndim <= x.ndim and all(
        a in (1, b) for a, b in zip(reversed(value.shape), reversed(x.shape))
    )
    if not fits:
        raise ValueError(
            f"{name} of shape {value.shape} must broadcast against the quantized array of shape "
            f"{x.shape}: one number (per tensor), or its shape with 1 on every axis that shares "
            "a value (per channel)"
        )
