"""Frozen networks: the codes and logits of the evaluation they were made of."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import uniq_jax
from uniq_jax import deploy, models, nn, rules
from uniq_jax.deploy import integers
from uniq_jax.models.activations import BiasedPRelu

SHAPE = (8, 8, 3)


def unsettled(model, seed=0):
    """The model with statistics, biases and slopes as training leaves them, in evaluation."""
    rng = np.random.default_rng(seed)

    def normal(variable, mean, deviation):
        variable[...] = jnp.asarray(rng.normal(mean, deviation, variable.shape), jnp.float32)

    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            normal(module.mean, 0, 0.5)
            normal(module.scale, 0.6, 0.6)  # Of either sign.
            normal(module.bias, 0.1, 0.3)
            module.var[...] = jnp.asarray(rng.uniform(0.5, 9, module.var.shape), jnp.float32)
        if isinstance(module, BiasedPRelu):
            normal(module.before, 0, 0.2)
            normal(module.after, 0, 0.2)
    model.eval()
    return model


def network(method, weight_bits, activation_bits, name="resnet8", **options):
    options = {"width": 4, **options} if name == "resnet8" else options
    return unsettled(
        models.create(
            name,
            num_classes=5,
            rngs=nnx.Rngs(0),
            method=method,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            **options,
        )
    )


def images(count=16, seed=1, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("method", "weight_bits", "activation_bits", "options"),
    [
        ("uniq", 1, 1, {"granularity": "channel"}),
        ("uniq", 8, 8, {}),
        ("uniq_n2uq", 4, 3, {}),
        ("n2uq", 2, 5, {}),
        ("lsq", 3, 3, {}),
    ],
)
def test_codes_and_logits_are_those_of_evaluation(method, weight_bits, activation_bits, options):
    model = network(method, weight_bits, activation_bits, **options)
    frozen = uniq_jax.freeze(model, SHAPE)
    found = deploy.verify(model, frozen, [images(), images(seed=2)])
    assert found.mismatches == 0, found.summary()
    assert found.codes > 10_000
    assert (found.images, found.class_mismatches) == (32, 0)
    assert found.logit_difference <= 1e-6
    assert found.summary() == f"mismatching codes: 0 of {found.codes}"
    operations = [node.operation for node in frozen.graph.nodes]
    assert sum("product" in name for name in operations) >= 6
    assert ("encode_sums" in operations) == (activation_bits < 8)
    kernels = [frozen.arrays[n.inputs[1]] for n in frozen.graph.nodes if "product" in n.operation]
    assert all(kernel.dtype in (jnp.int8, jnp.uint32) for kernel in kernels)


def test_a_mismatch_is_counted_and_named():
    model = network("uniq", 2, 2)
    frozen = deploy.freeze(model, SHAPE)
    name = next(n.inputs[1] for n in frozen.graph.nodes if n.operation == "encode_sums")
    moved = {**frozen.arrays, name: jnp.full_like(frozen.arrays[name], -(2**30))}
    found = deploy.verify(model, dataclasses.replace(frozen, arrays=moved), [images()])
    assert found.mismatches > 0
    assert "layer1/0/conv2" in found.summary()


def test_inputs_on_thresholds_have_training_s_codes():
    """Numbers on a threshold, and one float to either side of it."""
    layer = nn.QuantLinear(
        6, 4, weight=nn.UniqWeight(2), activation=nn.N2uqActivation(3), rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(0)
    layer.activation_quantizer.set_parameters(
        {
            "start": jnp.float32(-0.13),
            "intervals": jnp.asarray(rng.uniform(1e-3, 0.4, 7), jnp.float32),
            "input_scale": jnp.float32(1.7),
        }
    )
    model = nnx.Sequential(layer)
    model.eval()
    frozen = deploy.freeze(model, (6,))
    limits = next(v for k, v in frozen.arrays.items() if k.endswith("thresholds"))
    limits = np.asarray(limits)
    around = np.concatenate(
        [limits, np.nextafter(limits, np.float32(np.inf)), np.nextafter(limits, -np.float32(9))]
    )
    batch = np.resize(around, (len(around), 6)).astype(np.float32)
    found = deploy.verify(model, frozen, [batch])
    assert found.mismatches == 0
    codes = np.asarray(layer.activation_quantizer.encode(jnp.asarray(around)).codes)
    assert codes.tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6]


def test_sums_on_thresholds_have_training_s_codes():
    """Of a layer behind integer thresholds, every sum there can be, in every channel."""
    first = nn.QuantLinear(
        5, 6, weight=nn.UniqWeight(2), activation=nn.UniqActivation(2), rngs=nnx.Rngs(0)
    )
    norm = nn.BatchNorm(6, rngs=nnx.Rngs(0))
    second = nn.QuantLinear(
        6, 2, weight=nn.UniqWeight(2), activation=nn.UniqActivation(2), rngs=nnx.Rngs(1)
    )
    model = unsettled(nnx.Sequential(first, norm, nnx.relu, second))
    frozen = deploy.freeze(model, (5,))
    grid = np.indices([4] * 5).reshape(5, -1).T.astype(np.float32)
    batch = grid * np.asarray(first.activation_quantizer.step[...])
    found = deploy.verify(model, frozen, [batch])
    assert [node.operation for node in frozen.graph.nodes].count("encode_sums") == 1
    assert found.mismatches == 0
    assert found.codes == 4**5 * 11


def test_a_prelu_that_falls_keeps_its_float_steps():
    """In N2UQ's network, which has max pooling and 1x1 shortcuts too."""
    model = network("n2uq", 2, 2, "resnet18", width=8)
    before = [n.operation for n in deploy.freeze(model, (32, 32, 3)).graph.nodes]
    act: BiasedPRelu = model.layer1[0].act2
    act.slope[...] = act.slope[...].at[0].set(-0.1)
    frozen = deploy.freeze(model, (32, 32, 3))
    after = [n.operation for n in frozen.graph.nodes]
    assert after.count("encode_sums") == before.count("encode_sums") - 1
    outputs = {layer.path: layer.output for layer in deploy.layers(frozen)}
    assert outputs["layer1/0/conv1"] == "float epilogue: PReLU with a negative slope"
    assert outputs["layer1/1/conv1"] == "integer thresholds"
    assert outputs["layer2/0/conv2"] == "float epilogue: residual sum"
    found = deploy.verify(model, frozen, [images(2, shape=(32, 32, 3))])
    assert found.mismatches == 0


@pytest.mark.parametrize(
    ("bits", "offset"), [(1, 0.5), (2, 1.5), (7, 63.5), (8, 127.5), (7, 0.0), (8, 0.0), (8, 128.0)]
)
def test_every_grid_lies_in_int8(bits, offset):
    form = integers.form(bits, offset)
    codes = jnp.arange(2**bits, dtype=jnp.uint8)
    operands = integers.operand(codes, form)
    assert operands.dtype == jnp.int8
    np.testing.assert_array_equal(integers.codes_of(operands, form), codes)
    factor = 2 if offset != int(offset) else 1
    expected = factor * (np.arange(2**bits) - offset)
    np.testing.assert_array_equal(integers.levels_of(operands, form), expected)


class _WithConstants(nnx.Module):
    """Two linear layers, and between them what a function makes of the batch's size."""

    def __init__(self, between):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.between = between

    def __call__(self, x):
        return self.last(nnx.relu(self.between(self.first(x))))


@pytest.mark.parametrize(
    "between",
    [
        nnx.RMSNorm(8, rngs=nnx.Rngs(0)),
        lambda x: x * jnp.sum(jnp.ones_like(x) * jnp.arange(8.0), axis=1, keepdims=True) / 28,
        lambda x: jnp.concatenate([x[:, 1:], jnp.zeros((x.shape[0], 1)) + 0.5], axis=1),
        lambda x: jnp.where(jnp.ones_like(x) > jnp.arange(8.0) / 4, x, -x),
    ],
    ids=["rms_norm", "sum", "concatenated", "chosen"],
)
def test_constants_may_be_as_large_as_the_batch(between):
    model = uniq_jax.quantize(
        _WithConstants(between), rules.lsq(bits=8, first=None, last=None, signed=".*")
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    uniq_jax.calibrate(model, [x])
    model.eval()
    frozen = uniq_jax.freeze(model, (6,))
    for size in (1, 3):
        np.testing.assert_allclose(frozen(x[:size]), model(x[:size]), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_frozen_is_an_error():
    with pytest.raises(ValueError, match="input and kernel are quantized"):
        deploy.freeze(models.create("resnet8", num_classes=2, rngs=nnx.Rngs(0)), SHAPE)

    class Sorts(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return jnp.sort(self.layer(x), axis=-1)

    model = uniq_jax.quantize(Sorts(), [rules.Rule(".*", nn.UniqWeight(2), nn.UniqActivation(2))])
    with pytest.raises(NotImplementedError, match=r"'sort', at .*test_deploy_freeze.py:\d+"):
        deploy.freeze(model, (4,))
    frozen = deploy.freeze(network("uniq", 2, 2), SHAPE)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4, 3\) must have shape \(batch, 8, 8, 3"):
        frozen(jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="must be float32"):
        frozen(jnp.zeros((1, 8, 8, 3), jnp.int32))
