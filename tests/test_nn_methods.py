"""Methods are the quantizers that they name, and say truly which grid these have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uniq_jax import nn, quantizers
from uniq_jax.nn.batch_norm import inverse_deviation
from uniq_jax.quantizers import Grid


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_wide_methods_start_from_the_least_error(bits):
    """Those of more than four bits; the paper's constants are for four and fewer."""
    w = jnp.asarray(np.random.default_rng(0).standard_t(3, size=(300, 4)), jnp.float32)
    weight, activation = (
        (quantizers.uniq_weight_fitted_step, quantizers.uniq_activation_fitted_step)
        if bits > 4
        else (quantizers.uniq_weight_initial_step, quantizers.uniq_activation_initial_step)
    )
    found = nn.UniqWeight(bits, "channel").initial(w, -1)["step"]
    np.testing.assert_array_equal(found, weight(w, bits=bits, channel_axis=-1))
    x = jnp.maximum(w, 0)
    np.testing.assert_array_equal(nn.UniqActivation(bits).statistic(x), activation(x, bits=bits))


def test_batch_norms_factor_is_rounded_correctly():
    """A root and a division, and not the approximate reciprocal root that XLA has too."""
    rng = np.random.default_rng(0)
    variance = rng.uniform(0.01, 9, 4096).astype(np.float32)
    scale = rng.normal(size=4096).astype(np.float32)
    found = jax.jit(lambda v, s: inverse_deviation(v, 1e-5, s))(variance, scale)
    np.testing.assert_array_equal(found, scale / np.sqrt(variance + np.float32(1e-5)))


# Method; the two pure functions; how they are called; the grid.
METHODS = [
    (
        nn.UniqWeight(3),
        (quantizers.uniq_weight, quantizers.uniq_weight_encode),
        {"bits": 3},
        Grid(3, 3.5),
    ),
    (
        nn.UniqWeight(1, "channel"),
        (quantizers.uniq_weight, quantizers.uniq_weight_encode),
        {"bits": 1},
        Grid(1, 0.5),
    ),
    (nn.LsqWeight(3), (quantizers.lsq, quantizers.lsq_encode), {"bits": 3}, Grid(3, 4.0)),
    (
        nn.N2uqWeight(2),
        (quantizers.n2uq_weight, quantizers.n2uq_weight_encode),
        {"bits": 2, "gradient": "reference"},
        Grid(2, 1.5),
    ),
    (
        nn.N2uqWeight(2, "clipped"),
        (quantizers.n2uq_weight, quantizers.n2uq_weight_encode),
        {"bits": 2, "gradient": "clipped"},
        Grid(2, 1.5),
    ),
    (
        nn.UniqActivation(2),
        (quantizers.uniq_activation, quantizers.uniq_activation_encode),
        {"bits": 2},
        Grid(2, 0.0),
    ),
    (
        nn.UniqActivation(8, signed=True),
        (quantizers.uniq_activation, quantizers.uniq_activation_encode),
        {"bits": 8, "signed": True},
        Grid(8, 127.5),
    ),
    (
        nn.LsqActivation(2),
        (quantizers.lsq, quantizers.lsq_encode),
        {"bits": 2, "signed": False},
        Grid(2, 0.0),
    ),
    (
        nn.LsqActivation(4, signed=True),
        (quantizers.lsq, quantizers.lsq_encode),
        {"bits": 4, "signed": True},
        Grid(4, 8.0),
    ),
    (
        nn.N2uqActivation(2),
        (quantizers.n2uq_activation, quantizers.n2uq_activation_encode),
        {},
        Grid(2, 0.0),
    ),
    (
        nn.PactActivation(3),
        (quantizers.pact_activation, quantizers.pact_activation_encode),
        {"bits": 3, "gradient": "paper"},
        Grid(3, 0.0),
    ),
    (
        nn.PactActivation(3, "reference"),
        (quantizers.pact_activation, quantizers.pact_activation_encode),
        {"bits": 3, "gradient": "reference"},
        Grid(3, 0.0),
    ),
]


@pytest.mark.parametrize(
    ("method", "functions", "options", "grid"), METHODS, ids=[str(m[0]) for m in METHODS]
)
def test_a_method_is_its_quantizer(method, functions, options, grid):
    quantize, encode = functions
    x = jnp.asarray(np.random.default_rng(0).normal(0.3, 1, size=(8, 6)), jnp.float32)
    parameters = method.initial(x, -1) if isinstance(method, nn.WeightMethod) else method.initial()
    assert parameters.keys() == method.parameter_types.keys()
    arguments = tuple(parameters[name] for name in method.parameter_types)

    @jax.jit
    def run(x, parameters, arguments):
        def found(x, parameters):
            return jnp.sum(jnp.sin(method.quantize(x, parameters)))

        def wanted(x, arguments):
            return jnp.sum(jnp.sin(quantize(x, *arguments, **options)))

        return (
            jax.value_and_grad(found, argnums=(0, 1))(x, parameters),
            jax.value_and_grad(wanted, argnums=(0, 1))(x, arguments),
            method.encode(x, parameters, jnp.uint8),
            encode(x, *arguments, **{k: v for k, v in options.items() if k != "gradient"}),
        )

    found, wanted, encoded, wanted_encoded = run(x, parameters, arguments)
    assert found[0] == wanted[0]
    np.testing.assert_array_equal(found[1][0], wanted[1][0])
    for name, gradient in zip(method.parameter_types, wanted[1][1], strict=True):
        np.testing.assert_array_equal(found[1][1][name], gradient)
    np.testing.assert_array_equal(encoded.codes, wanted_encoded.codes)
    assert method.grid == grid
    assert encoded.offset == grid.offset
    assert encoded.codes.max() <= grid.max_code


def test_options_of_gradients_make_a_difference():
    """Else the test above would say nothing about them."""
    x = jnp.linspace(-2, 3, 50)[:, None]

    def gradient(method):
        parameters = {"clip": jnp.float32(2)} if "clip" in method.parameter_types else {}
        function = jax.grad(lambda *a: jnp.sum(method.quantize(*a)), argnums=(0, 1))
        grads = jax.jit(function)(x, parameters)
        return np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])

    assert np.any(gradient(nn.N2uqWeight(2)) != gradient(nn.N2uqWeight(2, "clipped")))
    assert np.any(gradient(nn.PactActivation(2)) != gradient(nn.PactActivation(2, "reference")))
