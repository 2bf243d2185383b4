"""Thresholds as a few rounded operations, proved to give the same codes for every input.

Rounded products, sums, quotients and `round` itself never fall as their input grows. So a formula
made of them has the codes of some thresholds for every number if it has them on both sides of each
threshold: that is what is checked here, and a formula that fails is not used.
"""

import numpy as np

from uniq_jax.deploy.thresholds import ALWAYS, NEVER
from uniq_jax.deploy.uniform import uniform_step
from uniq_jax.nn.levels import EXACT

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
    low, high = _around(thresholds, largest_sum)
    slopes = _slopes(low, high)
    if slopes is None:
        return None
    slope = slopes[0] + (slopes[1] - slopes[0]) / 2
    start, is_there = _start(low, high, slope)
    if not np.all(is_there):
        return None
    factor = (signs / slope).astype(np.float32)
    summand = (-start / slope).astype(np.float32)
    fits = _fits(factor, summand, low, high, signs, largest_sum)
    return (factor, summand) if fits else None


def integer_line(
    thresholds: np.ndarray,
    signs: np.ndarray,
    largest_sum: int,
    largest_factor: int,
    stretch: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Numbers for which codes are `clip(round((stretch * f * sum + b) * scale), 0, n)`.

    As integer convolutions of runtimes have it, with the factor in the kernel: they add an integer
    before they scale, so that the line has fewer places to be. The larger the factor, the more.

    Args:
      thresholds: as of `line`.
      signs: as of `line`.
      largest_sum: as of `line`.
      largest_factor: the magnitude that f may have.
      stretch: of all channels.

    Returns:
      f and b, int32, and scale, float32, of each channel; or None.
    """
    low, high = _around(thresholds, largest_sum)
    slopes = _slopes(low, high)
    if slopes is None:
        return None
    factors = np.zeros(signs.size, np.int32)
    summands, scales = np.zeros_like(factors), np.zeros(signs.size, np.float32)
    for part in sorted(np.linspace(0.02, 0.98, 49), key=lambda part: abs(part - 0.5)):
        slope = slopes[0] + (slopes[1] - slopes[0]) * part
        start, _ = _start(low, high, slope)
        for factor in range(largest_factor, 0, -1):
            whole = factor * stretch
            summand = np.rint(-start * whole)
            scale = (1 / (slope * whole)).astype(np.float32)
            fits = whole * largest_sum + np.abs(summand) < EXACT
            for points, is_reached in ((high, True), (low, False)):
                sums = whole * np.clip(points, -largest_sum, largest_sum) + summand
                reached = np.rint(sums.astype(np.float32) * scale) >= _codes(low)
                fits &= np.all(np.isinf(points) | (reached == is_reached), axis=0)
            fits &= factors == 0
            factors[fits] = (factor * signs)[fits]
            summands[fits], scales[fits] = summand[fits], scale[fits]
            if np.all(factors):
                return factors, summands, scales
    return None


def _around(thresholds: np.ndarray, largest_sum: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest sums below each threshold, and the smallest that reach it; infinite for none."""
    limits = thresholds.astype(np.float64)
    high = np.where(limits == NEVER, np.inf, np.where(limits == ALWAYS, -largest_sum, limits))
    low = np.where(limits == NEVER, largest_sum, np.where(limits == ALWAYS, -np.inf, limits - 1))
    return low, high


def _codes(low: np.ndarray) -> np.ndarray:
    return np.arange(1, len(low) + 1)[:, None]


def _slopes(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Between which slopes a line `sum = slope * (code - 1/2) + start` can pass all thresholds.

    It has to lie above `low` and not above `high` at every code.
    """
    least, most = np.full(low.shape[1], 1e-6), np.full(low.shape[1], np.inf)
    for i in range(len(low)):
        for j in range(i + 1, len(low)):
            least = np.maximum(least, (low[j] - high[i]) / (j - i))
            most = np.minimum(most, (high[j] - low[i]) / (j - i))
    most = np.where(np.isinf(most), least + 2, most)
    return None if np.any(least >= most) else (least, most)


def _start(low: np.ndarray, high: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where lines of these slopes best start, and whether any start is right."""
    places = _codes(low) - 0.5
    begin = np.max(low - slope * places, axis=0)
    end = np.min(high - slope * places, axis=0)
    middle = np.where(np.isinf(end), begin + 1, (begin + end) / 2)
    return np.where(np.isinf(begin), end - 1, middle), begin < end


def _fits(
    factor: np.ndarray,
    summand: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    signs: np.ndarray,
    largest_sum: int,
) -> bool:
    """Whether the sums on both sides of each threshold have their codes."""
    codes = _codes(low)
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
