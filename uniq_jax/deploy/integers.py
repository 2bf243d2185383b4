"""Codes as int8 operands, which the integer units of processors multiply into int32.

A grid of levels is brought to int8 by a form: `level = factor * operand + shift`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from uniq_jax.quantizers import Grid

# Up to this many thresholds each has a comparison; more are found by a guess and two comparisons.
_FEW = 31


@dataclasses.dataclass(frozen=True)
class Form:
    """How the integer levels of a grid lie in int8.

    Attributes:
      factor, shift: `level = factor * operand + shift`.
      code_factor, code_shift: `operand = code_factor * code + code_shift`.
    """

    factor: int
    shift: int
    code_factor: int
    code_shift: int

    @property
    def zero(self) -> int | None:
        """The operand of the level 0; None where there is none."""
        operand, rest = divmod(-self.shift, self.factor)
        return operand if rest == 0 else None


def form(bits: int, offset: float) -> Form:
    """The form of a grid: integer levels are `code - offset`, or twice that for half-integers."""
    grid = Grid(bits, offset)
    if grid.has_half_levels:
        if bits < 8:
            return Form(1, 0, 2, -grid.max_code)
        return Form(2, 1, 1, -128)
    zero = int(offset)
    if grid.max_code - zero <= 127:
        return Form(1, 0, 1, -zero)
    return Form(1, 128 - zero, 1, -128)


def operand(codes: Any, form: Form) -> Any:
    """Codes, of any integer dtype, as int8 operands."""
    return (codes.astype(jnp.int16) * form.code_factor + form.code_shift).astype(jnp.int8)


def codes_of(operands: Any, form: Form) -> Any:
    """The codes, int16, of int8 operands."""
    return (operands.astype(jnp.int16) - form.code_shift) // form.code_factor


def levels_of(operands: jax.Array, form: Form) -> jax.Array:
    """The integer levels of operands, float32."""
    return operands.astype(jnp.float32) * form.factor + form.shift


def count_below(x: jax.Array, thresholds: jax.Array) -> jax.Array:
    """The code of `x`: how many thresholds it reaches, uint8.

    Args:
      x: float32.
      thresholds: float32 (n,), ascending; evenly spaced but for rounding if n is above 31.
    """
    count = thresholds.shape[0]
    if count <= _FEW:
        return sum(
            ((x >= thresholds[i]).astype(jnp.uint8) for i in range(count)),
            start=jnp.zeros(x.shape, jnp.uint8),
        )
    lowest, highest = thresholds[0], thresholds[-1]
    per_step = (count - 1) / (highest - lowest)
    guess = jnp.clip(jnp.floor((x - lowest) * per_step) + 1, 0, count).astype(jnp.int32)
    # Infinity is reached by infinite numbers; nan, behind the last threshold, by none.
    edges = jnp.concatenate([jnp.full(1, -jnp.inf), thresholds, jnp.full(1, jnp.nan)])
    guess = guess + (x >= edges[guess + 1]) - (x < edges[guess])
    return guess.astype(jnp.uint8)


def count_reached(sums: jax.Array, thresholds: jax.Array) -> jax.Array:
    """How many thresholds of its channel each sum reaches, uint8.

    Args:
      sums: int32, (..., channels).
      thresholds: int32 (n, channels).
    """
    return sum(
        ((sums >= thresholds[i]).astype(jnp.uint8) for i in range(thresholds.shape[0])),
        start=jnp.zeros(sums.shape, jnp.uint8),
    )
