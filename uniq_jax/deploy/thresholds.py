"""Thresholds of quantizers, found by asking the quantizers themselves.

A code is a monotone function of what it is the code of. So one bisection finds, for every code,
the smallest number that reaches it: a float32 number where a quantizer sees floats, an integer
where it sees the sums of the layer before it through steps that are monotone. No formula is written
a second time, and ties fall as they do in training.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uniq_jax.deploy.bisection import LARGEST, SMALLEST, bisect, floats
from uniq_jax.nn import ActivationMethod

Codes = Callable[[jax.Array], Any]

# What no sum reaches, and what every sum does: sums lie strictly between.
NEVER, ALWAYS = 2**31 - 1, -(2**31) + 1


def float_thresholds(method: ActivationMethod, parameters: Any) -> tuple[np.ndarray, bool]:
    """The smallest float32 numbers that have code 1, 2, …, n or more.

    Args:
      method: of the quantizer.
      parameters: its learned ones.

    Returns:
      float32 (n,), ascending, inf for codes that none reaches; and whether they are those of −x,
      because codes fall as x grows (a negative input scale).

    Raises:
      ValueError: if a parameter is nan or infinite.
    """
    if not all(bool(jnp.all(jnp.isfinite(v))) for v in parameters.values()):
        raise ValueError("a quantizer's learned parameters must be finite")
    codes = functools.partial(_codes, method, parameters)
    ends = np.asarray(codes(jnp.array([-1, 1], jnp.float32) * np.finfo(np.float32).max))
    falls = bool(ends[0] > ends[1])
    count = method.grid.max_code

    def reached(keys: np.ndarray) -> np.ndarray:
        x = floats(keys)
        return np.asarray(codes(jnp.asarray(-x if falls else x))) >= np.arange(1, count + 1)

    keys = bisect(reached, np.full(count, SMALLEST), np.full(count, LARGEST))
    thresholds = np.where(keys > LARGEST, np.float32(np.inf), floats(np.minimum(keys, LARGEST)))
    return thresholds.astype(np.float32), falls


def sum_thresholds(
    codes: Codes, signs: np.ndarray, *, largest_sum: int, max_code: int
) -> np.ndarray:
    """The smallest sums, times their channel's sign, that have code 1, 2, …, n or more.

    Args:
      codes: of float32 sums, (n, channels) to codes of the same shape; monotone in each channel.
      signs: int (channels,): 1 where codes grow with the sums, -1 where they fall.
      largest_sum: no sum has a larger magnitude.
      max_code: n.

    Returns:
      int32 (n, channels); `ALWAYS` and `NEVER` for codes that all sums, or none, reach.
    """
    wanted = np.arange(1, max_code + 1)[:, None]
    shape = (max_code, signs.size)

    def reached(sums: np.ndarray) -> np.ndarray:
        return np.asarray(codes(jnp.asarray((sums * signs).astype(np.float32)))) >= wanted

    low, high = np.full(shape, -largest_sum), np.full(shape, largest_sum)
    found = bisect(reached, low, high)
    found = np.where(found > largest_sum, NEVER, found)
    return np.where(found == -largest_sum, ALWAYS, found).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _codes(method: ActivationMethod, parameters: Any, x: jax.Array) -> jax.Array:
    return method.encode(x, parameters, jnp.float32).codes
