"""Which thresholds are those of one step, as formats that know only steps need them."""

import numpy as np

# Candidates lie this many float32 numbers to either side of the estimate.
_ULPS = 8


def uniform_step(thresholds: np.ndarray, offset: float) -> np.float32 | None:
    """The step whose evenly spaced thresholds these are, all of them to the last bit.

    The thresholds of a step are `step * (i - 1/2 - offset)`, and a number that is one of them has
    the even code of the two at its sides (`uniq_jax.quantizers.uniform`). So the codes are those of
    `clip(round(x / step + offset), 0, n)` in exact arithmetic; where a runtime's quotient is
    rounded, a number within an ulp of a threshold may get the code beside it.

    Args:
      thresholds: float32 (n,), ascending; the smallest number that has code 1, 2, …, n.
      offset: of the grid: 0, or n / 2.

    Returns:
      The step, or None where the thresholds are not those of any step, or of every one (a single
      threshold at zero).

    Example:
      >>> import numpy as np
      >>> above = np.nextafter(np.float32([0.25, 1.25]), np.float32(9))
      >>> uniform_step(np.float32([above[0], 0.75, above[1]]), 0.0)
      np.float32(0.5)
      >>> uniform_step(np.float32([0.25, 0.75, 1.25]), 0.0) is None
      True
    """
    count = thresholds.size
    if not np.all(np.isfinite(thresholds)) or offset == count - 0.5:
        return None
    codes = np.arange(1, count + 1)
    factors = (codes - 0.5 - offset).astype(np.float32)
    estimate = np.float32(thresholds[-1] / factors[-1])
    # Where denormal numbers count as zero, the smallest number on a threshold at zero is one.
    thresholds = np.where(np.abs(thresholds) < np.finfo(np.float32).tiny, 0, thresholds)
    if not np.isfinite(estimate) or estimate <= 0:
        return None
    for ulps in sorted(range(-_ULPS, _ULPS + 1), key=abs):
        step = np.int32(estimate.view(np.int32) + ulps).view(np.float32)
        products = step * factors
        above = np.nextafter(products, np.float32(np.inf))
        if np.array_equal(thresholds, np.where(codes % 2 == 0, products, above)):
            return step
    return None
