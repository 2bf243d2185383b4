"""Fitted steps: the least squared error among multiples of the initial step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniq_jax import quantizers as q

MULTIPLES = np.geomspace(0.5, 4, 25)
RULES = {
    "weight": (q.uniq_weight_fitted_step, q.uniq_weight_initial_step, {}),
    "activation": (
        *(q.uniq_activation_fitted_step, q.uniq_activation_initial_step),
        {"signed": False},
    ),
    "signed": (
        *(q.uniq_activation_fitted_step, q.uniq_activation_initial_step),
        {"signed": True},
    ),
}


def heavy_tailed(shape, role, seed=0):
    x = np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)
    return np.maximum(x, 0) if role == "activation" else x


def levels_error(x, step, bits, role):
    """Mean squared distance to the nearest level, by trying every level."""
    n = 2**bits - 1
    codes = np.arange(n + 1) - (0 if role == "activation" else n / 2)
    return np.mean(np.min(np.square(x[..., None] - step * codes), axis=-1))


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("role", RULES)
def test_it_is_the_best_multiple(role, bits):
    fitted, initial, options = RULES[role]
    x = heavy_tailed((600,), role)
    start = float(initial(x, bits=bits, **options))
    errors = [levels_error(x.astype(np.float64), start * m, bits, role) for m in MULTIPLES]
    found = float(fitted(x, bits=bits, **options))
    np.testing.assert_allclose(found, start * MULTIPLES[np.argmin(errors)], rtol=1e-5)
    # Heavy tails want a wider grid where there are levels for it.
    assert bits < 8 or role == "activation" or found > start


@pytest.mark.parametrize("role", RULES)
def test_a_normal_distribution_keeps_the_paper_s_step(role):
    fitted, initial, options = RULES[role]
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    x = np.maximum(x, 0) if role == "activation" else x
    ratio = fitted(x, bits=3, **options) / initial(x, bits=3, **options)
    # One of the two multiples next to 1.
    np.testing.assert_allclose(ratio, 1, atol=0.06)


def test_channels_are_fitted_one_by_one():
    w = np.stack([heavy_tailed((5, 50), "weight", seed) * 3**seed for seed in range(3)], axis=1)
    found = q.uniq_weight_fitted_step(w, bits=8, channel_axis=1)
    assert found.shape == (1, 3, 1)
    alone = [q.uniq_weight_fitted_step(w[:, i], bits=8) for i in range(3)]
    np.testing.assert_allclose(found.ravel(), alone, rtol=1e-6)


def test_special_values():
    assert q.uniq_activation_fitted_step(jnp.zeros(5), bits=8) > 0
    assert jnp.isnan(q.uniq_activation_fitted_step(jnp.array([1.0, jnp.nan]), bits=8))
    with jax.enable_x64(True):
        assert q.uniq_weight_fitted_step(np.ones(3), bits=8).dtype == jnp.float64
    assert q.uniq_weight_fitted_step(jnp.ones(3, jnp.bfloat16), bits=8).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"bits \(=9\)"):
        q.uniq_weight_fitted_step(jnp.ones(3), bits=9)
    with pytest.raises(TypeError, match="'x'"):
        q.uniq_activation_fitted_step(jnp.ones(3, int), bits=8)


def test_it_can_be_jitted():
    x = heavy_tailed((200,), "weight")
    jitted = jax.jit(lambda x: q.uniq_weight_fitted_step(x, bits=8))(x)
    np.testing.assert_allclose(jitted, q.uniq_weight_fitted_step(x, bits=8), rtol=1e-6)
