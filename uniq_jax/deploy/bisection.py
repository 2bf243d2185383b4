"""The smallest number that a monotone condition holds for, by asking it."""

from collections.abc import Callable

import numpy as np

# float32's finite numbers, as integers of the same order.
LARGEST = int(np.float32(np.finfo(np.float32).max).view(np.int32))
SMALLEST = -LARGEST - 1


def bisect(
    reached: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The smallest integers in low..high for which `reached` (monotone) holds, else high + 1."""
    low, high = low.astype(np.int64), high.astype(np.int64) + 1
    while np.any(low < high):
        middle = (low + high) // 2  # high itself is never asked about.
        yes = reached(middle)
        active = low < high
        high = np.where(active & yes, middle, high)
        low = np.where(active & ~yes, middle + 1, low)
    return low


def floats(keys: np.ndarray) -> np.ndarray:
    """Float32 numbers by their place in order: 0 is 0.0, and -1 is -0.0."""
    bits = np.where(keys >= 0, keys, (-keys - 1) | 2**31)
    return bits.astype(np.uint32).view(np.float32)
