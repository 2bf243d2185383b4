"""Binary networks in OpenVINO's runtime."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from frozen_networks import SHAPE, answers, images, small

import uniq_jax
from uniq_jax import deploy, rules
from uniq_jax.deploy import integers
from uniq_jax.deploy.runtimes import load_openvino
from uniq_jax.nn import UniqActivation, UniqWeight

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs the extra uniq_jax[openvino]"
)

COUNT = 64


@pytest.fixture(scope="module")
def network():
    return small(UniqWeight(1, "channel"), UniqActivation(1), signed=UniqActivation(1, True))


def compiled(model):
    """For the processor, in float32."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return load_openvino().Core().compile_model(model, "CPU", options)


def layer_types(program):
    nodes = program.get_runtime_model().get_ordered_ops()
    return [node.get_rt_info()["layerType"].astype(str) for node in nodes]


def test_a_binary_network_gives_the_same_logits(network, tmp_path):
    path = tmp_path / "network.xml"
    deploy.export_openvino(network, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["network.bin", "network.xml"]
    model = load_openvino().Core().read_model(path)
    assert model.input("images").shape == [1, *SHAPE]
    assert json.loads(model.get_rt_info(["uniq_jax", "about"]).astype(str))["labels"] == []
    one = compiled(model)
    # conv2, conv3 and conv5; the depthwise convolution is no binary one.
    assert layer_types(one).count("BinaryConvolution") == 3
    logits, _ = answers(network, COUNT)
    found = np.concatenate([one(image[None])["logits"] for image in images(COUNT)])
    np.testing.assert_array_equal(found, logits)
    model.reshape([COUNT, *SHAPE])
    whole = compiled(model)(images(COUNT))["logits"]
    np.testing.assert_array_equal(whole, logits)
    assert len(set(whole.argmax(1))) > 1


@pytest.mark.parametrize("form", ["binary", "float"])
def test_no_code_of_it_differs(network, form, monkeypatch):
    """Of binary convolutions, and of the float ones in their place where channels do not fit."""
    from uniq_jax.deploy import openvino_operations
    from uniq_jax.deploy.channels_first import channels_first

    if form == "float":
        monkeypatch.setattr(openvino_operations, "_CHANNELS", 1000)
    _, codes = answers(network, COUNT)
    model = openvino_operations.model(
        channels_first(network.graph, network.arrays), COUNT, outputs=list(codes)
    )
    program = compiled(model)
    assert ("BinaryConvolution" in layer_types(program)) == (form == "binary")
    found = program(images(COUNT))
    for name, wanted in codes.items():
        bits, offset = network.graph.node(name)["grid"]
        levels = wanted - offset if offset == int(offset) else 2 * wanted - (2**bits - 1)
        levels = np.moveaxis(levels, -1, 1)
        np.testing.assert_array_equal(found[name], levels, err_msg=name)
        assert len(np.unique(levels)) > 1, name


def test_other_networks_are_those_of_onnx(tmp_path):
    network = small(UniqWeight(2, "channel"), UniqActivation(3))
    path = tmp_path / "network.xml"
    deploy.export_openvino(network, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["network.bin", "network.xml"]
    model = load_openvino().Core().read_model(path)
    assert "uniq_jax" in model.get_rt_info()
    program = compiled(model)
    assert "BinaryConvolution" not in layer_types(program)
    for count in (1, 16):
        logits, _ = answers(network, count)
        np.testing.assert_allclose(program(images(count))["logits"], logits, rtol=1e-5, atol=1e-5)


class Wide(nnx.Module):
    """Layers of 8 bits, two of which have large sums, around one of few bits."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 384, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(384, 16, (3, 3), rngs=rngs)
        self.conv3 = nnx.Conv(16, 64, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(2304, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        # Codes fall where sums rise, in every other channel.
        x = self.conv2(nnx.relu(self.conv1(x))) * jnp.where(jnp.arange(16) % 2, 1.0, -1.0)
        return self.fc(nnx.relu(self.conv3(x)).reshape(x.shape[0], -1))


@functools.cache
def wide(signed, bits):
    """Frozen, with signed codes of the images or not, and so many bits of conv3's input.

    Each of the latter's thresholds is the smallest sum that is rounded as one of the sums is.
    """
    rng = np.random.default_rng(0)
    # Without compiled programs for each random kernel.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Wide(nnx.Rngs(0))))
    values = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), state)
    for name in ("conv1", "conv3"):
        values[name]["bias"] = jax.tree.map(lambda leaf: leaf + 4, values[name]["bias"])
    for name in ("conv2", "fc"):
        values[name]["kernel"] = jax.tree.map(np.abs, values[name]["kernel"])
    model = uniq_jax.quantize(
        nnx.merge(graphdef, values),
        [
            rules.Rule("conv1", UniqWeight(8), UniqActivation(8, signed)),
            rules.Rule("conv3", UniqWeight(1), UniqActivation(bits, True)),
            rules.Rule(".*", UniqWeight(8), UniqActivation(8)),
        ],
    )
    batch = np.abs(images(COUNT))
    network = deploy.freeze(model, SHAPE)
    product, limits, signs = only(network, "encode_sums").inputs
    sums = jax.jit(network.values)(batch)[product] * network.arrays[signs]
    ranks = np.linspace(0, 1, 2**bits + 1)[1:-1]
    rounded = np.quantile(np.float32(sums).reshape(-1, 16), ranks, axis=0, method="nearest")
    near = rounded.astype(np.int32) + np.arange(-2, 1)[:, None, None]
    smallest = np.where(np.float32(near) == rounded, near, 2**31 - 1).min(0)
    arrays = {**network.arrays, limits: jnp.asarray(smallest, jnp.int32)}
    return dataclasses.replace(network, arrays=arrays)


def only(network, operation):
    """The first node of an operation."""
    return next(node for node in network.graph.nodes if node.operation == operation)


def found_in(network, batch, *names):
    """The logits of OpenVINO's operations, and the outputs of some nodes."""
    from uniq_jax.deploy import openvino_operations
    from uniq_jax.deploy.channels_first import channels_first

    first = channels_first(network.graph, network.arrays)
    found = compiled(openvino_operations.model(first, len(batch), outputs=names))(batch)
    return [np.asarray(found[name]) for name in ("logits", *names)]


@pytest.mark.parametrize(("signed", "bits"), [(True, 1), (False, 2)])
def test_inputs_on_and_beside_thresholds_have_their_codes(signed, bits):
    network = wide(signed, bits)
    encode = only(network, "encode")
    limits = np.asarray(network.arrays[encode.inputs[1]])
    ends = np.float32([-np.inf, np.inf])
    points = np.concatenate([limits, *(np.nextafter(limits, end) for end in ends)])
    # A backend may take denormal numbers for zero.
    points = points[(points == 0) | (np.abs(points) >= np.finfo(np.float32).tiny)]
    batch = np.resize(points, (COUNT, *SHAPE))
    values = jax.jit(network.values)(batch)
    logits, levels = found_in(network, batch, encode.name)
    wanted = integers.levels_of(values[encode.name], integers.form(*encode["grid"]))
    assert len(np.unique(wanted)) == 256
    np.testing.assert_array_equal(np.moveaxis(levels, 1, -1), wanted)
    np.testing.assert_array_equal(logits, values[network.graph.output])


@pytest.mark.parametrize(("signed", "bits"), [(True, 1), (False, 2)])
def test_sums_beyond_the_integers_of_float32_are_rounded_once(signed, bits):
    network = wide(signed, bits)
    encode = only(network, "encode_sums")
    batch = np.abs(images(COUNT))
    values = jax.jit(network.values)(batch)
    products = [node for node in network.graph.nodes if node.operation == "integer_product"]
    wide_ones = [node.name for node in products if node["largest_sum"] >= 2**24]
    for name in wide_ones:
        sums = np.asarray(values[name])
        assert np.mean(np.float32(sums).astype(np.int32) != sums) > 0.2
    names = [*wide_ones, encode.name]
    logits, *found = found_in(network, batch, *names)
    values[encode.name] = integers.levels_of(values[encode.name], integers.form(*encode["grid"]))
    assert set(np.unique(network.arrays[encode.inputs[2]])) == {-1, 1}
    for name, got in zip(names, found):
        wanted = np.asarray(values[name]).astype(np.float32)
        np.testing.assert_array_equal(np.moveaxis(got, 1, -1), wanted, err_msg=name)
    # More outputs keep operations apart that are joined without them.
    for got in (logits, *found_in(network, batch)):
        np.testing.assert_array_equal(got, values[network.graph.output])


def test_what_cannot_be_written_is_an_error(network, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.xml"):
        deploy.export_openvino(network, tmp_path / "network.onnx")
    with pytest.raises(ValueError, match=r"batch \(=0\) must be at least 1"):
        deploy.export_openvino(network, tmp_path / "network.xml", batch=0)
    assert not list(tmp_path.iterdir())


class Normalized(nnx.Module):
    """A binary convolution of images that are normalized, in channels of either slope."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.conv = nnx.Conv(16, 8, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(nnx.relu(self.norm(x))).mean((1, 2))


def test_bits_change_where_they_do_in_the_network():
    from uniq_jax.deploy.channels_first import channels_first
    from uniq_jax.deploy.openvino_edges import bit_edges

    rng = np.random.default_rng(0)
    model = Normalized(nnx.Rngs(0))
    scales = rng.normal(size=16)
    scales[3] = 0  # One bit for whatever comes.
    model.norm.scale[...] = jnp.asarray(scales, jnp.float32)
    model.norm.bias[...] = jnp.asarray(rng.normal(1, 0.5, 16), jnp.float32)
    model.norm.mean[...] = jnp.asarray(rng.normal(size=16), jnp.float32)
    model.norm.var[...] = jnp.asarray(rng.uniform(0.1, 2, 16), jnp.float32)
    model = uniq_jax.quantize(model, [rules.Rule(".*", UniqWeight(1), UniqActivation(1))])
    network = deploy.freeze(model, (6, 6, 16))
    first = channels_first(network.graph, network.arrays)
    encode = only(network, "encode")
    start, edges, rises = bit_edges(first, first.graph.node(encode.name))
    assert start == "input"
    np.testing.assert_array_equal(rises.reshape(-1), scales >= 0)
    # Every channel on its edge, some numbers beside it, and what is there anyhow.
    edges = edges.reshape(-1)
    near = np.where(scales == 0, 0, edges)
    steps = np.arange(-17, 18)[:, None] * np.spacing(near)
    batch = np.concatenate([near + steps, rng.normal(size=(37, 16)) * 3]).astype(np.float32)
    batch = batch.reshape(2, 6, 6, 16)
    values = jax.jit(network.values)(batch)
    bits = integers.codes_of(np.asarray(values[encode.name]), integers.form(*encode["grid"]))
    above = np.moveaxis(batch > edges, -1, 0)
    wanted = np.where(rises.reshape(-1, 1, 1, 1), above, ~above)
    np.testing.assert_array_equal(np.moveaxis(bits, -1, 0), wanted)
    assert {len(np.unique(channel)) for channel in np.delete(wanted, 3, 0)} == {2}
    (logits,) = found_in(network, batch)
    np.testing.assert_array_equal(logits, values[network.graph.output])


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_has_the_bit_of_its_threshold(sign):
    rng = np.random.default_rng(0)
    conv = Normalized(nnx.Rngs(0)).conv
    model = uniq_jax.quantize(
        nnx.Sequential(lambda x: x * sign, conv, lambda x: x.mean((1, 2))),
        [rules.Rule(".*", UniqWeight(1), UniqActivation(1))],
    )
    network = deploy.freeze(model, (6, 6, 16))
    encode = only(network, "encode")
    network = dataclasses.replace(
        network, arrays={**network.arrays, encode.inputs[1]: jnp.zeros(1, jnp.float32)}
    )
    batch = rng.choice(np.float32([-1, -0.0, 0.0, 1]), (2, 6, 6, 16))
    values = jax.jit(network.values)(batch)
    bits = integers.codes_of(np.asarray(values[encode.name]), integers.form(*encode["grid"]))
    np.testing.assert_array_equal(bits, batch * sign >= 0)
    (logits,) = found_in(network, batch)
    np.testing.assert_array_equal(logits, values[network.graph.output])
