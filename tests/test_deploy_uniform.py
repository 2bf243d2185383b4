"""The step that thresholds belong to."""

import jax.numpy as jnp
import numpy as np
import pytest

from uniq_jax.deploy import thresholds
from uniq_jax.deploy.uniform import uniform_step
from uniq_jax.nn.activation_methods import UniqActivation

STEPS = np.random.default_rng(0).lognormal(size=6).astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "signed"),
    [(1, False), (2, False), (4, False), (8, False), (2, True), (4, True), (8, True)],
)
def test_thresholds_of_a_step_give_a_step_with_the_same_thresholds(bits, signed):
    method = UniqActivation(bits, signed=signed)
    for step in STEPS:
        found, negate = thresholds.float_thresholds(method, {"step": jnp.asarray(step)})
        same = uniform_step(found, method.grid.offset)
        assert not negate
        assert same is not None
        again, _ = thresholds.float_thresholds(method, {"step": jnp.asarray(same)})
        np.testing.assert_array_equal(again, found)
        if bits > 1:
            assert abs(same / step - 1) < 1e-6


def test_one_moved_threshold_is_no_step():
    found, _ = thresholds.float_thresholds(UniqActivation(3), {"step": jnp.float32(0.3)})
    for i in range(found.size):
        moved = found.copy()
        moved[i] = np.nextafter(moved[i], np.float32(9))
        moved[i] = np.nextafter(moved[i], np.float32(9))
        assert uniform_step(moved, 0.0) is None
    assert uniform_step(np.float32([0.5, np.inf]), 0.0) is None
    assert uniform_step(np.float32([1e-38]), 0.5) is None
