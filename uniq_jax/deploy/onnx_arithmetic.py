"""Thresholds as a few rounded operations, proved to give the same codes for every input.

Rounded products, sums, quotients and `round` itself never fall as their input grows. So a formula
made of them has the codes of some thresholds for every number if it has them on both sides of each
threshold: that is what is checked here, and a formula that fails is not used.
"""

import numpy as np

from uniq_jax.deploy.thresholds import ALWAYS, NEVER
from uniq_jax.deploy.uniform import uniform_step

# Candidates of `quotient`: so many at once, and so often.
_CANDIDATES, _ROUNDS = 2048, 200


def quotient(thresholds: np.ndarray) -> tuple[np.float32, np.float32] | None:
    """Numbers (factor, step) for which the codes are `clip(round(x * factor / step), 0, n)`.

    With a factor of 1 the product and quotient that thresholds are found by round differently, and
    a code flips within an ulp of a threshold. Other factors round otherwise; of some thousands one
    fits all thresholds.

    Args:
      thresholds: float32 (n,), ascending, the smallest number of each code.

    Returns:
      None where the thresholds are not evenly spaced from half a step on, or nothing fits.

    Example:
      >>> import numpy as np
      >>> step, i = np.float32(0.1), np.arange(1, 4)
      >>> above = np.nextafter(step * (i - 0.5).astype(np.float32), np.float32(9))
      >>> on = step * (i - 0.5).astype(np.float32)
      >>> quotient(np.where(i % 2 == 0, on, above)) is None
      False
    """
    step = uniform_step(thresholds, 0.0)
    if step is None:
        return None
    below = np.nextafter(thresholds, np.float32(-np.inf))
    codes = np.arange(thresholds.size)
    rng = np.random.default_rng(0)
    factors = np.ones(1, np.float32)
    for _ in range(_ROUNDS):
        # Three neighbouring steps to each factor.
        keys = (factors * step).view(np.int32)[:, None] + np.arange(-1, 2, dtype=np.int32)
        found = np.repeat(factors, 3), keys.view(np.float32).reshape(-1)
        for points, wanted in ((thresholds, codes + 1), (below, codes)):
            for x, code in zip(points, wanted):
                fits = np.rint(x * found[0] / found[1]) == code
                found = found[0][fits], found[1][fits]
        if found[0].size:
            return found[0][0], found[1][0]
        factors = rng.uniform(1, 2, _CANDIDATES).astype(np.float32)
    return None


def line(
    thresholds: np.ndarray, signs: np.ndarray, largest_sum: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Factors and summands of each channel for which codes are `clip(round(f * sum + s), 0, n)`.

    Behind batch norm and ReLU alone codes are nearly even in the sums, which are integers, so that
    there is room for a line between what has one code and what has the next.

    Args:
      thresholds: int32 (n, channels), of `sign * sum`, with `ALWAYS` and `NEVER`.
      signs: (channels,).
      largest_sum: no sum has a larger magnitude; below 2**24.

    Returns:
      float32 (channels,) twice; None where some channel's codes are not near enough to a line. They
      hold whether or not a runtime rounds the product before it adds.
    """
    limits = thresholds.astype(np.float64)
    count = len(limits)
    # With places i - 1/2, code i begins where the line `sum = slope * place + start` crosses
    # place i: above the largest sum that has a lower code, and not above the smallest that has it.
    high = np.where(limits == NEVER, np.inf, np.where(limits == ALWAYS, -largest_sum, limits))
    low = np.where(limits == NEVER, largest_sum, np.where(limits == ALWAYS, -np.inf, limits - 1))
    places = np.arange(1, count + 1) - 0.5
    least, most = np.full(limits.shape[1], 1e-6), np.full(limits.shape[1], np.inf)
    for i in range(count):
        for j in range(i + 1, count):
            least = np.maximum(least, (low[j] - high[i]) / (j - i))
            most = np.minimum(most, (high[j] - low[i]) / (j - i))
    if np.any(least >= most):
        return None
    slope = np.where(np.isinf(most), least + 1, (least + np.minimum(most, 1e9)) / 2)
    begin = np.max(low - slope * places[:, None], axis=0)
    end = np.min(high - slope * places[:, None], axis=0)
    if np.any(begin >= end):
        return None
    start = np.where(
        np.isinf(begin), end - 1, np.where(np.isinf(end), begin + 1, (begin + end) / 2)
    )
    factor = (signs / slope).astype(np.float32)
    summand = (-start / slope).astype(np.float32)
    fits = _fits(factor, summand, low, high, signs, largest_sum)
    return (factor, summand) if fits else None


def _fits(
    factor: np.ndarray,
    summand: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    signs: np.ndarray,
    largest_sum: int,
) -> bool:
    """Whether the sums on both sides of each threshold have their codes."""
    codes = np.arange(1, len(low) + 1)[:, None]
    for points, is_reached in ((high, True), (low, False)):
        sums = np.clip(points, -largest_sum, largest_sum) * signs
        exact = factor.astype(np.float64) * sums + summand
        rounded = factor * sums.astype(np.float32) + summand
        # Where no sum is on this side there is nothing to hold.
        holds = np.isinf(points)
        for value in (exact.astype(np.float32), rounded):
            code = np.clip(np.rint(value), 0, len(low))
            if not np.all(holds | ((code >= codes) == is_reached)):
                return False
    return True
