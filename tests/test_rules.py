"""Rules and presets: each paper's treatment of first, last and shortcut layers at every width."""

import jax
import pytest
from flax import nnx

from uniq_jax import models, rules
from uniq_jax.nn import (
    LsqActivation,
    LsqWeight,
    N2uqActivation,
    N2uqWeight,
    QuantConv,
    QuantLinear,
    UniqActivation,
    UniqWeight,
)
from uniq_jax.quantization import quantize

FLOAT = (None, None)
EIGHT_BIT_FIRST = (UniqWeight(8), UniqActivation(8, signed=True))
EIGHT_BIT_LAST = (UniqWeight(8), UniqActivation(8))
WIDTHS = range(1, 9)


def decisions(model_rules, build=None):
    """Path to the methods of each layer; nothing is computed."""

    def default():
        return models.CifarPreactResNet(8, num_classes=10, rngs=nnx.Rngs(0))

    found = {}

    def run():
        model = quantize((build or default)(), model_rules)
        kinds = nnx.Conv | nnx.Linear
        for path, layer in nnx.iter_modules(model):
            if isinstance(layer, QuantConv | QuantLinear):
                methods = [
                    None if q is None else q.method
                    for q in (layer.weight_quantizer, layer.activation_quantizer)
                ]
                found["/".join(map(str, path))] = tuple(methods)
            elif isinstance(layer, kinds):
                found["/".join(map(str, path))] = FLOAT
        return nnx.state(model)

    jax.eval_shape(run)
    return found


def check(found, *, first, last, shortcut, body):
    parts = {
        "first": {found.pop("conv1")},
        "last": {found.pop("fc")},
        "shortcut": {found.pop("layer2/0/downsample"), found.pop("layer3/0/downsample")},
        "body": set(found.values()),
    }
    assert len(found) == 6
    assert parts == {"first": {first}, "last": {last}, "shortcut": {shortcut}, "body": {body}}


@pytest.mark.parametrize("weight_bits", WIDTHS)
@pytest.mark.parametrize("activation_bits", [1, 2, 8])
def test_uniq(weight_bits, activation_bits):
    body = (UniqWeight(weight_bits), UniqActivation(activation_bits))
    found = decisions(rules.uniq(weight_bits=weight_bits, activation_bits=activation_bits))
    if 1 in (weight_bits, activation_bits):
        check(found, first=FLOAT, last=FLOAT, shortcut=FLOAT, body=body)
    else:
        check(found, first=EIGHT_BIT_FIRST, last=EIGHT_BIT_LAST, shortcut=body, body=body)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_uniq_by_channel(bits):
    body = (UniqWeight(bits, "channel"), UniqActivation(bits))
    found = decisions(rules.uniq(bits, granularity="channel"))
    if bits == 1:
        check(found, first=FLOAT, last=FLOAT, shortcut=FLOAT, body=body)
    else:
        first = (UniqWeight(8, "channel"), UniqActivation(8, signed=True))
        last = (UniqWeight(8, "channel"), UniqActivation(8))
        check(found, first=first, last=last, shortcut=body, body=body)


@pytest.mark.parametrize("bits", range(1, 6))
@pytest.mark.parametrize("quantize_shortcut", [True, False])
def test_n2uq(bits, quantize_shortcut):
    body = (N2uqWeight(bits), N2uqActivation(bits))
    shortcut = body if quantize_shortcut and bits > 1 else FLOAT
    found = decisions(rules.n2uq(bits, quantize_shortcut=quantize_shortcut))
    check(found, first=FLOAT, last=FLOAT, shortcut=shortcut, body=body)


@pytest.mark.parametrize("bits", WIDTHS)
def test_lsq(bits):
    body = (LsqWeight(bits), LsqActivation(bits))
    check(
        decisions(rules.lsq(bits)),
        first=(LsqWeight(8), LsqActivation(8, signed=True)),
        last=(LsqWeight(8), LsqActivation(8)),
        shortcut=body,
        body=body,
    )


@pytest.mark.parametrize("bits", range(1, 6))
def test_uniq_n2uq(bits):
    body = (UniqWeight(bits), N2uqActivation(bits))
    found = decisions(rules.uniq_n2uq(bits))
    if bits == 1:
        check(found, first=FLOAT, last=FLOAT, shortcut=FLOAT, body=body)
    else:
        check(found, first=EIGHT_BIT_FIRST, last=EIGHT_BIT_LAST, shortcut=body, body=body)


def test_mixed_widths():
    assert rules.n2uq(weight_bits=1, activation_bits=3)[-1] == rules.Rule(
        ".*", N2uqWeight(1), N2uqActivation(3)
    )
    assert rules.lsq(2, weight_bits=4)[-1] == rules.Rule(".*", LsqWeight(4), LsqActivation(2))
    assert rules.uniq_n2uq(2, activation_bits=4)[-1] == rules.Rule(
        ".*", UniqWeight(2), N2uqActivation(4)
    )


@pytest.mark.parametrize("preset", [rules.uniq, rules.n2uq, rules.lsq, rules.uniq_n2uq])
def test_presets_check_widths(preset):
    with pytest.raises(ValueError, match="bits, or both weight_bits and activation_bits"):
        preset()
    with pytest.raises(ValueError, match="bits=None, weight_bits=2, activation_bits=None"):
        preset(weight_bits=2)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=rf"bits \(={bits}\)"):
            preset(bits)
    with pytest.raises(TypeError, match="bits"):
        preset(2.5)
    assert preset(3) == preset(weight_bits=3, activation_bits=3)


def test_thresholds_have_five_bits_at_most():
    for preset in (rules.n2uq, rules.uniq_n2uq):
        with pytest.raises(ValueError, match="1 to 5"):
            preset(6)
        assert preset(weight_bits=8, activation_bits=5)[-1].weight.bits == 8


@pytest.mark.parametrize("preset", [rules.uniq, rules.n2uq, rules.lsq, rules.uniq_n2uq])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(
    ("name", "options", "shortcuts"),
    [
        ("resnet20", {"shortcut": "A"}, 0),
        ("resnet20", {"shortcut": "B"}, 2),
        ("preact_resnet20", {}, 2),
    ],
)
def test_presets_fit_every_network_as_they_are(name, options, shortcuts, preset, bits):
    """Option A has no shortcut convolutions, which is no error."""

    def build():
        return models.create(name, num_classes=10, rngs=nnx.Rngs(0), **options)

    found = decisions(preset(bits), build)
    low = {
        path for path, (weight, _) in found.items() if weight is not None and weight.bits == bits
    }
    ends = {"conv1", "linear" if "linear" in found else "fc"}
    convolutions = {path for path in found if "downsample" in path}
    assert len(convolutions) == shortcuts
    wanted = found.keys() - ends
    if bits == 1 and preset is not rules.lsq:
        wanted -= convolutions
    assert low == wanted


def test_own_names_of_the_ends():
    class Network(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a = nnx.Linear(2, 2, rngs=rngs)
            self.conv1 = nnx.Linear(2, 2, rngs=rngs)
            self.z = nnx.Linear(2, 2, rngs=rngs)

    found = decisions(rules.uniq(2, first="a", last="z"), Network)
    body = (UniqWeight(2), UniqActivation(2))
    assert found == {"a": EIGHT_BIT_FIRST, "conv1": body, "z": EIGHT_BIT_LAST}
    with pytest.raises(ValueError, match="the paths are: a, conv1, z"):
        decisions(rules.uniq(2), Network)


@pytest.mark.parametrize("preset", [rules.uniq, rules.n2uq, rules.lsq, rules.uniq_n2uq])
@pytest.mark.parametrize("bits", [1, 2])
def test_a_network_may_have_no_ends_to_treat_apart(preset, bits):
    """A transformer on tokens has no first layer that could be quantized."""
    assert preset(bits, first=None) == preset(bits)[1:]
    assert preset(bits, last=None) == [preset(bits)[0], *preset(bits)[2:]]
    assert preset(bits, first=None, last=None) == preset(bits)[2:]


@pytest.mark.parametrize("preset", [rules.uniq, rules.lsq, rules.uniq_n2uq])
def test_a_last_layer_behind_no_rectifier(preset):
    plain, signed = preset(2), preset(2, signed_last=True)
    assert not plain[1].activation.signed
    assert signed[1].activation.signed
    assert [*plain[:1], *plain[2:]] == [*signed[:1], *signed[2:]]


def test_the_first_layers_of_flax_examples():
    for path in ("conv_init", "embedding"):  # ResNet and ViT
        assert rules.Rule(rules.FIRST).matches(path)


def test_a_rule_matches_the_whole_path():
    rule = rules.Rule("layer1/.*/conv1")
    assert rule.matches("layer1/0/conv1")
    assert not rule.matches("layer1/0/conv10")
    assert not rule.matches("model/layer1/0/conv1")
    assert not rules.Rule(rules.FIRST).matches("layer1/0/conv1")
    assert rules.Rule(rules.SHORTCUT).matches("layer2/0/downsample")


def test_a_path_that_is_no_regular_expression():
    with pytest.raises(ValueError, match=r"path \(='\*conv'\) is no regular expression"):
        rules.Rule("*conv")
    with pytest.raises(ValueError, match=r"path \(=3\) is no regular expression"):
        rules.Rule(3)  # type: ignore
