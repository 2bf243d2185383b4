"""The product of a layer in training: quantized inputs are stored, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniq_jax.nn import N2uqActivation, PactActivation, UniqActivation, UniqWeight
from uniq_jax.nn.product import product

METHODS = {"uniq": UniqActivation(2), "n2uq": N2uqActivation(2), "pact": PactActivation(2)}
WEIGHT = UniqWeight(2)


def operands():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((64, 16), (16, 8))]


def stored(x, kernel, activation, weight, method):
    pairs = (WEIGHT, weight), (method, activation)
    return product(x, kernel, *pairs, _multiply, exact=False)


def plain(x, kernel, activation, weight, method):
    return _multiply(method.quantize(x, activation), WEIGHT.quantize(kernel, weight))


def _multiply(a, b, preferred_element_type=None):
    return jnp.matmul(a, b, preferred_element_type=preferred_element_type)


def arguments(method):
    x, kernel = operands()
    return x, kernel, method.initial(), WEIGHT.initial(kernel, -1)


@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_are_those_of_the_quantizers(name):
    method = METHODS[name]
    found, wanted = (
        jax.jit(
            lambda *a, f=f: jax.vjp(lambda *b: f(*b, method), *a)[1](jnp.ones((64, 8))),
        )(*arguments(method))
        for f in (stored, plain)
    )
    np.testing.assert_array_equal(
        jax.jit(stored, static_argnums=4)(*arguments(method), method),
        jax.jit(plain, static_argnums=4)(*arguments(method), method),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(found[2]))


@pytest.mark.parametrize("name", METHODS)
def test_on_a_cpu_the_quantized_input_is_what_a_conditional_gives(name):
    method = METHODS[name]
    lowered = jax.jit(stored, static_argnums=4).lower(*arguments(method), method)
    is_cpu = jax.default_backend() == "cpu"
    assert ("conditional" in lowered.compile().as_text()) == is_cpu


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_makes_nan(value):
    x, kernel, activation, weight = arguments(METHODS["uniq"])
    broken = jax.tree.map(lambda v: jnp.full_like(v, value), activation)
    assert np.all(np.isnan(stored(x, kernel, broken, weight, METHODS["uniq"])))
