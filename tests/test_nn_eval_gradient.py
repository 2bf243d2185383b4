"""A network differentiated in evaluation mode has the gradients of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import nn


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (nn.UniqWeight(2, "channel"), nn.N2uqActivation(2)),
        (nn.N2uqWeight(3), nn.PactActivation(3)),
        (nn.LsqWeight(8), nn.UniqActivation(8, signed=True)),
    ],
)
def test_gradients_are_those_of_training(weight, activation):
    options = {"weight": weight, "activation": activation, "rngs": nnx.Rngs(0)}
    layer = nn.QuantConv(4, 6, (3, 3), **options)
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))
    # A cotangent that does not depend on the value, which differs by rounding.
    direction = jax.random.normal(jax.random.key(2), (2, 5, 5, 6))

    @nnx.jit
    def gradients(layer, x):
        return nnx.grad(lambda layer, x: jnp.sum(layer(x) * direction), argnums=(0, 1))(layer, x)

    layer.train()
    of_layer, of_x = gradients(layer, x)
    layer.eval()
    of_layer_eval, of_x_eval = gradients(layer, x)
    trained, evaluated = nnx.to_flat_state(of_layer), nnx.to_flat_state(of_layer_eval)
    assert [path for path, _ in trained] == [path for path, _ in evaluated]
    for (path, one), (_, other) in zip(trained, evaluated):
        assert np.any(one[...] != 0), path
        np.testing.assert_allclose(one[...], other[...], rtol=1e-5, atol=1e-6, err_msg=str(path))
    np.testing.assert_allclose(of_x, of_x_eval, rtol=1e-5, atol=1e-6)
