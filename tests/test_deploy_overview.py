"""What is said about the layers of a frozen network."""

import pytest
from flax import nnx
from small_runs import Small

import uniq_jax
from uniq_jax import deploy, rules


@pytest.fixture(scope="module")
def small():
    return uniq_jax.quantize(
        Small(num_classes=10, in_features=3, rngs=nnx.Rngs(0)), rules.uniq(bits=2)
    )


def test_each_layer_has_a_line_with_what_quantizes_its_output(small, tmp_path):
    network = deploy.freeze(small, (8, 8, 3))
    assert deploy.summary(network).splitlines() == [
        "conv1  3x3x3x8  8 x 8 bits  216 B  integer thresholds",
        "conv2  3x3x8x8  2 x 2 bits  144 B  float epilogue: sum over the pixels",
        "fc     8x10     8 x 8 bits   80 B  logits",
    ]
    assert [layer.has_float_epilogue for layer in deploy.layers(network)] == [False, True, False]
    deploy.save(network, tmp_path / "model.safetensors")
    assert deploy.layers(deploy.load(tmp_path / "model.safetensors")) == deploy.layers(network)


def test_a_float_layer_behind_is_named():
    model = Small(num_classes=10, in_features=3, rngs=nnx.Rngs(0))
    network = deploy.freeze(uniq_jax.quantize(model, rules.n2uq(bits=2)), (8, 8, 3))
    assert [layer.output for layer in deploy.layers(network)] == [
        "float epilogue: float layer",
        "float layer",
        "logits",
    ]


def test_thresholds_that_were_not_asked_for_are_no_riddle(small):
    network = deploy.freeze(small, (8, 8, 3), integer_thresholds=False)
    assert deploy.layers(network)[0].output == "float epilogue: as asked"
