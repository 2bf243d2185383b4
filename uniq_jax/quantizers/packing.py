"""Codes as dense bits, on the host.

Codes are laid one after another as a little-endian bit stream: code k occupies the bits k·b …
(k+1)·b − 1, its least significant bit first, and bit j is bit j mod 8 of byte j div 8. Codes of 3,
5, 6 and 7 bits therefore straddle bytes, and no width wastes any.
"""

import math

import numpy as np
from jax.typing import ArrayLike

from uniq_jax.quantizers.grid import check_bits


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * check_bits(bits) + 7) // 8


def pack_codes(codes: ArrayLike, *, bits: int) -> np.ndarray:
    """Packs codes, in row-major order, into uint8 of shape (packed_size(codes.size, bits),).

    Args:
      codes: integers 0 .. 2**bits − 1 of any shape.
      bits: 1 to 8.

    Raises:
      TypeError: if `codes` is not of an integer dtype, or `bits` not an integer.
      ValueError: if `bits` is not in 1..8, or a code needs more bits.

    Example:
      >>> pack_codes(np.array([1, 2, 3, 0, 3]), bits=2).tolist()
      [57, 3]
    """
    bits = check_bits(bits)
    array = np.asarray(codes)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"codes must have an integer dtype, not {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < 2**bits):
        raise ValueError(
            f"codes (from {array.min()} to {array.max()}) must lie in 0..{2**bits - 1}, "
            f"as bits is {bits}"
        )
    stream = np.unpackbits(
        array.astype(np.uint8).reshape(-1, 1), axis=1, count=bits, bitorder="little"
    )
    return np.packbits(stream, bitorder="little")


def unpack_codes(packed: ArrayLike, *, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack_codes`: uint8 codes of `shape`.

    Raises:
      ValueError: if `packed` is not exactly as long as `shape` and `bits` say.
    """
    bits = check_bits(bits)
    array = np.asarray(packed, np.uint8)
    count = math.prod(shape)
    if array.shape != (packed_size(count, bits),):
        raise ValueError(
            f"packed of shape {array.shape} must have shape ({packed_size(count, bits)},): "
            f"{count} codes of {bits} bits"
        )
    stream = np.unpackbits(array, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(stream, axis=1, bitorder="little").reshape(shape)
