"""Binary networks in OpenVINO's runtime."""

import importlib.util
import json

import numpy as np
import pytest
from frozen_networks import SHAPE, answers, images, small

from uniq_jax import deploy
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


def test_what_cannot_be_written_is_an_error(network, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.xml"):
        deploy.export_openvino(network, tmp_path / "network.onnx")
    with pytest.raises(ValueError, match=r"batch \(=0\) must be at least 1"):
        deploy.export_openvino(network, tmp_path / "network.xml", batch=0)
    assert not list(tmp_path.iterdir())
