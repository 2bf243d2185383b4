"""Exported networks in QONNX's own interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from frozen_networks import SHAPE, answers, images, small

import uniq_jax
from uniq_jax import deploy, rules
from uniq_jax.exact import exact_mean
from uniq_jax.nn import N2uqActivation, N2uqWeight, UniqActivation, UniqWeight

pytest.importorskip("qonnx", reason="needs the extra uniq_jax[qonnx]")

COUNT = 16

UNIQ = UniqWeight(2, "channel"), UniqActivation(3)
N2UQ = N2uqWeight(2), N2uqActivation(2)


def executed(network, path, **options):
    """All values of the network by name, of `images(COUNT)`, and its operations."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    deploy.export_qonnx(network, path, batch=COUNT, **options)
    model = ModelWrapper(str(path))
    batch = np.ascontiguousarray(images(COUNT).transpose(0, 3, 1, 2))
    values = execute_onnx(model, {"images": batch}, return_full_exec_context=True)
    return values, [node.op_type for node in model.graph.node]


def mismatches(network, values):
    """How many codes differ, of how many."""
    _, codes = answers(network, COUNT)
    different = total = 0
    for name, wanted in codes.items():
        node = network.graph.node(name)
        bits, offset = node["grid"]
        if name in values:
            half = offset != int(offset)
            found = (values[name] + 2**bits - 1) / 2 if half else values[name] + offset
        else:
            step = values[f"{name}_scale"]
            found = np.rint(values[f"{name}_values"] / step + offset)
        different += np.sum(np.moveaxis(found, 1, -1) != wanted)
        total += wanted.size
    return different, total


@pytest.mark.parametrize(("weight", "activation"), [UNIQ, N2UQ])
def test_no_code_differs_in_the_form_of_levels(weight, activation, tmp_path):
    network = small(weight, activation)
    values, operations = executed(network, tmp_path / "levels.onnx")
    assert operations.count("MultiThreshold") == operations.count("IntQuant") == 6
    assert mismatches(network, values)[0] == 0
    np.testing.assert_array_equal(values["logits"], answers(network, COUNT)[0])


@pytest.mark.parametrize(("weight", "activation"), [UNIQ, N2UQ])
def test_few_codes_differ_in_the_form_of_values(weight, activation, tmp_path):
    network = small(weight, activation, integer_thresholds=False)
    values, operations = executed(network, tmp_path / "values.onnx")
    uniform = activation is UNIQ[1]
    assert operations.count("MultiThreshold") == (0 if uniform else 4)
    assert operations.count("IntQuant") == (12 if uniform else 8)
    different, total = mismatches(network, values)
    print(f"mismatching codes: {different} of {total}")
    assert different <= total / 1000
    logits, _ = answers(network, COUNT)
    assert np.mean(values["logits"].argmax(1) == logits.argmax(1)) >= 0.9


@pytest.mark.parametrize("weight", [UniqWeight(8), N2uqWeight(8)])
def test_sums_beyond_the_integers_of_float32_are_rounded_once(weight, tmp_path):
    network = wide(weight)
    products = [node for node in network.graph.nodes if node.operation == "integer_product"]
    (product,) = [node for node in products if node.layer == "conv2"]
    values, operations = executed(network, tmp_path / "levels.onnx", levels=True)
    sums = values[f"{product.name}_digit1_sum"]
    assert sums.dtype == np.int32
    assert np.any(np.float32(sums).astype(np.int32) != sums)
    assert operations.count("IntQuant") == 4
    assert mismatches(network, values)[0] == 0
    np.testing.assert_array_equal(values["logits"], answers(network, COUNT)[0])


def wide(weight):
    """A network whose second layer has large sums: its weights and inputs are far from zero."""

    class Wide(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(3, 256, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(256, 16, (3, 3), rngs=rngs)
            self.fc = nnx.Linear(16, 5, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
            return self.fc(exact_mean(nnx.relu(x)))

    model = Wide(nnx.Rngs(0))
    model.conv1.bias[...] = jnp.full(256, 3.0)
    model.conv2.kernel[...] = 1 + model.conv2.kernel[...]
    uniq_jax.quantize(
        model,
        [
            rules.Rule("conv1", weight, UniqActivation(8, True)),
            rules.Rule(".*", weight, UniqActivation(8)),
        ],
    )
    uniq_jax.calibrate(model, [np.abs(images(COUNT))])
    return deploy.freeze(model, SHAPE, integer_thresholds=False)
