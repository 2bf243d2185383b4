"""Codes that fall as the sums before them grow: a negation, a negative factor, a negative scale."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import deploy, nn

BETWEEN = {
    "neg": lambda x: -x,
    "sub": lambda x: 0.3 - x,
    "add": lambda x: x + 0.1,
    "div": lambda x: x / jnp.array([1.0, -2.0, 3.0, -1.0, 0.5, -0.7]),
}
# All codes of five inputs of two bits.
GRID = np.indices([4] * 5).reshape(5, -1).T.astype(np.float32) * np.float32(0.6)


def network(between, scale, features=3):
    """Two layers; the second one's thresholds are on its inputs times `scale`."""

    def layer(inputs, outputs, activation):
        return nn.QuantLinear(
            inputs,
            outputs,
            weight=nn.UniqWeight(2),
            activation=activation,
            rngs=nnx.Rngs(inputs),
        )

    first, second = layer(5, 6, nn.UniqActivation(2)), layer(6, features, nn.N2uqActivation(2))
    second.activation_quantizer.input_scale[...] = jnp.float32(scale)
    model = nnx.Sequential(first, BETWEEN[between], second)
    model.eval()
    return model


@pytest.mark.parametrize("scale", [1.3, -1.3])
@pytest.mark.parametrize("between", BETWEEN)
def test_sums_are_compared_on_the_right_side(between, scale):
    model = network(between, scale)
    frozen = deploy.freeze(model, (5,))
    assert [node.operation for node in frozen.graph.nodes].count("encode_sums") == 1
    assert deploy.verify(model, frozen, [GRID]).mismatches == 0


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_a_falling_quantizer_in_onnx(form, tmp_path):
    frozen = deploy.freeze(network("add", -1.3), (5,), integer_thresholds=False)
    assert any(node.operation == "encode" and node["negate"] for node in frozen.graph.nodes)
    deploy.export_onnx(frozen, tmp_path / "network.onnx", form=form)
    assert deploy.compare_onnx(frozen, tmp_path / "network.onnx", [GRID[::37]]).mismatches == 0
