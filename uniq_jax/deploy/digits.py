"""Kernels as digits, where sums of whole products leave the integers that float32 holds."""

import numpy as np

from uniq_jax.deploy import integers
from uniq_jax.nn import levels
from uniq_jax.quantizers import Grid


def kernel_digits(
    codes: np.ndarray, grid: tuple[int, float], largest_sum: int
) -> list[tuple[int, np.ndarray]]:
    """The levels of a kernel as the sum of `place * digits`.

    Args:
      codes: of the kernel.
      grid: its bits and offset.
      largest_sum: of products of levels.

    Returns:
      Places and int8 digits, as few as keep the sums of their products below 2**24.
    """
    whole = levels.largest_level(Grid(*grid))
    form = integers.form(*grid)
    operands = codes.astype(np.int32) * form.code_factor + form.code_shift
    rest = operands * form.factor + form.shift
    # Digits from -largest to largest, so that none is left over.
    largest = min(127, (levels.EXACT - 1) * whole // largest_sum)
    base = 2 * largest + 1
    digits = []
    while np.any(rest):
        digit = (rest + largest) % base - largest
        digits.append((base ** len(digits), digit.astype(np.int8)))
        rest = (rest - digit) // base
    return digits
