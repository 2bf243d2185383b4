"""State dicts into models and back: every network, every program's names, every refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import models
from uniq_jax.interop import by_path, load_torch_state_dict, to_torch_state_dict
from uniq_jax.nn import UniqActivation, UniqWeight
from uniq_jax.quantization import quantize
from uniq_jax.quantizers import uniq_weight_initial_step
from uniq_jax.rules import Rule


def zeros(name, **options):
    """The network with zeros for all its variables; nothing is initialized, which would be slow."""
    options = {"num_classes": 7, **options}
    model = nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nnx.state(model))
    nnx.update(model, state)
    return model


def random_like(state_dict, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: value
        if name.endswith("clip_val") and "quan" not in name
        else rng.normal(size=value.shape).astype(value.dtype)
        for name, value in state_dict.items()
    }


def assert_same_bytes(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


UNIQ = {"method": "uniq", "weight_bits": 2, "activation_bits": 3}
N2UQ = {"method": "n2uq", "weight_bits": 2, "activation_bits": 3}
NETWORKS = [
    *((name, {}) for name in models.MODELS),
    ("resnet20", {"shortcut": "B"}),
    ("resnet20", {"activation": "biased_prelu"}),
    ("mobilenet_v2", {"expand_first": True, "use_bias": False}),
    *((name, UNIQ) for name in ("resnet18", "resnet20", "preact_resnet18", "preact_resnet32")),
    *((name, UNIQ) for name in ("preact_resnet50", "mobilenet_v2", "alexnet", "vit_s16")),
    ("preact_resnet18", {**UNIQ, "granularity": "channel"}),
    ("preact_resnet18", {**UNIQ, "weight_bits": 1, "activation_bits": 1}),
    *((name, N2UQ) for name in ("resnet18", "resnet34", "resnet50", "mobilenet_v2")),
    ("resnet18", {**N2UQ, "quantize_downsample": False}),
    ("preact_resnet18", {"method": "uniq_n2uq", "weight_bits": 2, "activation_bits": 3}),
    ("resnet20", {"method": "lsq", "weight_bits": 2, "activation_bits": 3}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS, ids=str)
def test_there_and_back_is_the_identity(name, options):
    model = zeros(name, **options)
    state_dict = random_like(to_torch_state_dict(model))
    variables = [v for _, v in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))]
    constants = [n for n in state_dict if n.endswith("clip_val") and "quan" not in n]
    assert len(state_dict) == len(variables) + len(constants)
    report = load_torch_state_dict(model, state_dict, strict=True)
    assert len(report.loaded) == len(variables)
    assert_same_bytes(to_torch_state_dict(model), state_dict)


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("resnet18", {}, "pytorchcv"),
        ("resnet50", {}, "pytorchcv"),
        ("preact_resnet34", {}, "pytorchcv"),
        ("preact_resnet32", {}, "pytorchcv"),
        ("resnet20", {"shortcut": "B"}, "pytorchcv"),
        ("mobilenet_v2", {"expand_first": True, "use_bias": False}, "pytorchcv"),
        ("mobilenet_v2", {"activation": "biased_prelu"}, "n2uq"),
        ("resnet18", UNIQ, "plain"),
    ],
    ids=str,
)
def test_other_programs_names(name, options, names):
    model = zeros(name, **options)
    state_dict = random_like(to_torch_state_dict(model, names=names))
    assert load_torch_state_dict(model, state_dict, strict=True).scheme == names
    # The names that came in are the ones that go out.
    assert_same_bytes(to_torch_state_dict(model), state_dict)


# From the programs themselves: a name and shape of each kind.
@pytest.mark.parametrize(
    ("name", "options", "names", "shapes"),
    [
        ("resnet18", {}, None, {
            "conv1.weight": (64, 3, 7, 7),
            "bn1.running_var": (64,),
            "layer2.0.conv1.weight": (128, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer2.0.downsample.1.running_mean": (128,),
            "fc.weight": (7, 512),
        }),
        ("resnet50", {}, None, {"layer1.0.conv3.weight": (256, 64, 1, 1), "fc.bias": (7,)}),
        ("mobilenet_v2", {}, None, {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.1.conv.0.0.weight": (32, 1, 3, 3),
            "features.1.conv.1.weight": (16, 32, 1, 1),
            "features.1.conv.2.bias": (16,),
            "features.2.conv.1.0.weight": (96, 1, 3, 3),
            "features.17.conv.3.running_var": (320,),
            "features.18.1.weight": (1280,),
            "classifier.1.weight": (7, 1280),
        }),
        ("preact_resnet18", {}, "pytorchcv", {
            "features.init_block.conv.weight": (64, 3, 7, 7),
            "features.stage2.unit1.body.conv1.bn.weight": (64,),
            "features.stage2.unit1.body.conv1.conv.weight": (128, 64, 3, 3),
            "features.stage2.unit1.identity_conv.weight": (128, 64, 1, 1),
            "features.post_activ.bn.running_mean": (512,),
            "output.weight": (7, 512),
        }),
        ("preact_resnet20", {}, "pytorchcv", {"features.init_block.weight": (16, 3, 3, 3)}),
        ("mobilenet_v2", {"expand_first": True, "use_bias": False}, "pytorchcv", {
            "features.stage1.unit1.conv1.conv.weight": (32, 32, 1, 1),
            "features.stage4.unit7.conv3.bn.weight": (96,),
            "features.stage5.unit4.conv3.conv.weight": (320, 960, 1, 1),
            "features.final_block.conv.weight": (1280, 320, 1, 1),
            "output.weight": (7, 1280, 1, 1),
        }),
        ("preact_resnet18", {**UNIQ, "granularity": "channel"}, None, {
            "conv1.quan_w.delta": (64, 1, 1, 1),
            "layer2.0.shortcut.0.quan_a.delta": (),
            "fc.quan_w.delta": (7, 1),
        }),
        ("resnet50", N2UQ, None, {
            "layer1.0.bias11.bias": (1, 64, 1, 1),
            "layer1.0.prelu3.weight": (64,),
            "layer1.0.bias01.bias": (1, 256, 1, 1),
            "layer1.0.prelu0.weight": (256,),
            "layer1.0.quan3.a": (7,),
            "layer1.0.conv3.clip_val": (1,),
            "layer1.0.downsample.0.scale2": (1,),
            "layer1.0.downsample.1.weight": (256, 64, 1, 1),
            "layer1.0.downsample.2.weight": (256,),
        }),
        ("resnet20", {"shortcut": "B"}, None, {
            "layer2.0.shortcut.0.weight": (32, 16, 1, 1),
            "linear.weight": (7, 64),
        }),
        ("vit_s16", {}, None, {
            "cls_token": (1, 1, 384),
            "patch_embed.proj.weight": (384, 3, 16, 16),
            "blocks.11.attn.qkv.weight": (1152, 384),
            "blocks.0.mlp.fc1.bias": (1536,),
            "norm.weight": (384,),
            "head.weight": (7, 384),
        }),
    ],
    ids=str,
)  # fmt: skip
def test_names_and_shapes(name, options, names, shapes):
    state_dict = to_torch_state_dict(zeros(name, **options), names=names)
    assert shapes == {key: state_dict[key].shape for key in shapes}


def test_layouts():
    model = zeros("resnet8")
    state_dict = random_like(to_torch_state_dict(model))
    load_torch_state_dict(model, state_dict)
    np.testing.assert_array_equal(
        model.conv1.kernel[...], state_dict["conv1.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(model.linear.kernel[...], state_dict["linear.weight"].T)
    np.testing.assert_array_equal(model.bn1.var[...], state_dict["bn1.running_var"])
    np.testing.assert_array_equal(model.bn1.scale[...], state_dict["bn1.weight"])


@pytest.mark.parametrize("wrapper", ["state_dict", "net", "model", "model_ema"])
def test_wrapped_and_prefixed(wrapper):
    model = zeros("resnet8")
    state_dict = random_like(to_torch_state_dict(model))
    wrapped = {"epoch": 3, wrapper: {f"module.{name}": v for name, v in state_dict.items()}}
    load_torch_state_dict(model, wrapped, strict=True)
    assert_same_bytes(to_torch_state_dict(model), state_dict)


def test_counters_constants_and_unused_steps_come_back():
    """What the originals save and the model has no use for."""
    model = zeros("preact_resnet20", method="uniq", weight_bits=1, activation_bits=1)
    extra = {
        "conv1.quan_w.delta": np.float32(0.25),
        "fc.quan_a.delta": np.float32(0.5),
        "bn.num_batches_tracked": np.asarray(1234, np.int64),
    }
    state_dict = {**random_like(to_torch_state_dict(model)), **extra}
    state_dict = {name: np.asarray(value) for name, value in state_dict.items()}
    report = load_torch_state_dict(model, state_dict)
    assert not report.unexpected
    assert report.kept.keys() == extra.keys()
    assert "2 kept (steps of layers that are float here): conv1.quan_w.delta" in str(report)
    # They go with the model where it is taken apart, copied and put together.
    model = nnx.merge(*nnx.split(nnx.clone(model)))
    assert_same_bytes(to_torch_state_dict(model), state_dict)
    # But not under another program's names.
    assert "conv1.quan_w.delta" not in to_torch_state_dict(model, names="plain")

    model = zeros("resnet18", **N2UQ)
    constants = {"two": 2.0, "one": 1.0, "zero": 0.0, "minusone": -1.0, "eps": 1e-3}
    extra = {
        f"layer1.0.quan1.{name}": np.asarray([value], np.float32)
        for name, value in constants.items()
    }
    state_dict = {**random_like(to_torch_state_dict(model)), **extra}
    assert not load_torch_state_dict(model, state_dict).unexpected
    assert_same_bytes(to_torch_state_dict(model), state_dict)
    for name, value in (("layer1.0.quan1.eps", 1e-4), ("layer1.0.conv1.clip_val", 3.0)):
        changed = {**state_dict, name: np.asarray([value], np.float32)}
        with pytest.raises(ValueError, match=rf"{name}'\] \(=\[.*must be (2.0|0.001)"):
            load_torch_state_dict(model, changed)


def test_gradients_carry_the_originals_names():
    model = models.create("resnet8", num_classes=7, rngs=nnx.Rngs(0))
    quantize(model, [Rule("conv1"), Rule(".*", UniqWeight(2), UniqActivation(2))])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradient(params, others):
        def loss(params):
            return jnp.sum(jnp.square(nnx.merge(graphdef, params, nnx.clone(others))(x)))

        return jax.grad(loss)(params)

    gradients = gradient(params, others)
    nnx.update(model, gradients)
    named = to_torch_state_dict(model)
    flat = {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(gradients)}
    kernel = flat["layer1/0/conv1/kernel"]
    np.testing.assert_array_equal(named["layer1.0.conv1.weight"], kernel.transpose(3, 2, 0, 1))
    step = flat["layer1/0/conv1/weight_quantizer/step"]
    assert step != 0
    np.testing.assert_array_equal(named["layer1.0.conv1.quan_w.delta"], step)


def test_a_float_state_dict_starts_a_quantized_network():
    """Weight steps start from the loaded kernels; what else is missing is said."""
    state_dict = random_like(to_torch_state_dict(zeros("resnet8")))
    model = models.create("resnet8", num_classes=7, rngs=nnx.Rngs(0), **UNIQ)
    before = model.layer1[0].conv1.activation_quantizer.step[...]
    report = load_torch_state_dict(model, state_dict)
    conv = model.layer1[0].conv1
    np.testing.assert_allclose(
        conv.weight_quantizer.step[...],
        uniq_weight_initial_step(conv.kernel[...], bits=2),
        rtol=1e-6,
    )
    assert conv.activation_quantizer.step[...] == before
    assert not report.unexpected
    assert set(report.missing.values()) == {"learned quantizer state, to be calibrated"}
    assert "layer1/0/conv1/activation_quantizer/step" in report.missing
    text = str(report)
    assert text.startswith(f"{len(state_dict)} tensors loaded, named as in akamaster\n")
    assert "16 missing (learned quantizer state, to be calibrated): " in text


def test_torchvision_weights_start_n2uqs_network():
    state_dict = random_like(to_torch_state_dict(zeros("resnet18")))
    model = zeros("resnet18", **N2UQ)
    report = load_torch_state_dict(model, state_dict)
    # The shortcuts too, although N2UQ's program numbers them otherwise.
    assert report.scheme == "torchvision"
    assert len(report.loaded) == len(state_dict)
    new = [path for path, why in report.missing.items() if why == "keeps its initial value"]
    assert len(new) == 8 * 3 * 3
    assert all("/act" in path for path in new)


def test_torchvision_weights_start_n2uqs_mobilenet():
    """N2UQ's first block expands, torchvision's does not: the rest of it is taken all the same."""
    first = zeros("mobilenet_v2")
    state_dict = random_like(to_torch_state_dict(first))
    load_torch_state_dict(first, state_dict)
    model = zeros("mobilenet_v2", method="n2uq", weight_bits=4, activation_bits=4)
    report = load_torch_state_dict(model, state_dict)
    assert report.scheme == "torchvision"
    assert not report.unexpected
    for path in ("conv2/kernel", "bn2/mean", "conv3/kernel", "bn3/scale"):
        layer, variable = path.split("/")
        there, here = (getattr(getattr(m.blocks[0], layer), variable) for m in (first, model))
        np.testing.assert_array_equal(here[...], there[...])
    new = {path for path, why in report.missing.items() if why == "keeps its initial value"}
    assert {path for path in new if "/act" not in path} == {
        "blocks/0/conv1/kernel",
        *(f"blocks/0/bn1/{variable}" for variable in ("scale", "bias", "mean", "var")),
    }


def test_refusals():
    model = zeros("resnet8")
    good = random_like(to_torch_state_dict(model))
    before = to_torch_state_dict(model)
    with pytest.raises(
        ValueError, match=r"'linear.weight'\] has shape \(5, 64\), but .*linear/kernel .*\(7, 64\)"
    ):
        load_torch_state_dict(model, {**good, "linear.weight": np.zeros((5, 64), np.float32)})
    with pytest.raises(TypeError, match=r"'conv1.weight'\] must be an array of numbers, not str"):
        load_torch_state_dict(model, {**good, "conv1.weight": "no"})
    with pytest.raises(ValueError, match=r"no tensor of this CifarResNet: it has encoder.weight"):
        load_torch_state_dict(model, {"encoder.weight": np.zeros(3, np.float32)})
    without = {name: value for name, value in good.items() if name != "bn1.bias"}
    with pytest.raises(ValueError, match=r"strictly[\s\S]*1 missing \(keeps.*\): bn1/bias"):
        load_torch_state_dict(model, without, strict=True)
    smaller = {n: v[:5] if n.startswith("linear") else v for n, v in good.items()}
    with pytest.raises(ValueError, match=r"of 1 more they disagree.*linear.*num_classes"):
        load_torch_state_dict(model, smaller)
    with pytest.raises(ValueError, match=r"'linear.\w+'\] has shape .*num_classes"):
        by_path(model, smaller)
    for nothing in ({}, {"net": {}}, {"weights": good}):
        with pytest.raises(ValueError, match=r"under one of the keys net, .*; its keys are \w+"):
            load_torch_state_dict(model, nothing)
    with pytest.raises(TypeError, match=r"must be a mapping of names to arrays, not str; .*read"):
        load_torch_state_dict(model, "network.pth")  # type: ignore
    with pytest.raises(TypeError, match="must have names as keys, not 0"):
        load_torch_state_dict(model, {0: np.zeros(3)})  # type: ignore
    more = {**good, "head.weight": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"strictly[\s\S]*1 unexpected .*: head.weight"):
        load_torch_state_dict(model, more, strict=True)
    assert_same_bytes(to_torch_state_dict(model), before)
    assert load_torch_state_dict(model, more).unexpected.keys() == {"head.weight"}
    with pytest.raises(ValueError, match=r"names \(='pytorchvc'\).*did you mean 'pytorchcv'"):
        to_torch_state_dict(model, names="pytorchvc")


def test_dtypes():
    """Parameters keep theirs, unless float64 is wanted and float64 comes."""
    model = zeros("resnet8")
    good = random_like(to_torch_state_dict(model))
    half = {name: value.astype(np.float16) for name, value in good.items()}
    load_torch_state_dict(model, half)
    assert model.conv1.kernel.dtype == jnp.float32
    wide = {name: value.astype(np.float64) for name, value in good.items()}
    load_torch_state_dict(model, wide)
    assert model.conv1.kernel.dtype == jnp.float32
    with jax.enable_x64(True):
        load_torch_state_dict(model, wide)
        assert model.conv1.kernel.dtype == jnp.float64
        assert_same_bytes(to_torch_state_dict(model), wide)


def test_a_model_of_ones_own():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

    model = Net(nnx.Rngs(0))
    state_dict = to_torch_state_dict(model)
    assert {name: value.shape for name, value in state_dict.items()} == {
        "embed.weight": (5, 4),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "head.weight": (3, 4),
        "head.bias": (3,),
    }
    state_dict = random_like(state_dict)
    load_torch_state_dict(model, state_dict, strict=True)
    assert_same_bytes(to_torch_state_dict(model), state_dict)
