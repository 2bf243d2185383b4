"""The networks: shapes, sizes, shortcuts, names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import deploy, models
from uniq_jax.models.blocks import batch_norm, convolution
from uniq_jax.models.resnet import BasicBlock


def shapes(build):
    """What `build` returns, without computing it."""
    return jax.eval_shape(build)


# He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85 million.
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet44", {}, 658_586),
        ("resnet56", {}, 853_018),
        ("resnet20", {"shortcut": "B"}, 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),
        # Convolutions, batch norms in front of them, and the linear layer, counted by hand.
        ("preact_resnet20", {}, 432 + 6 * 2304 + 4608 + 5 * 9216 + 18432 + 5 * 36864
         + 512 + 2048 + 2 * (7 * 16 + 6 * 32 + 5 * 64 + 64) + 650),
    ],
)  # fmt: skip
def test_parameter_counts(name, options, count):
    def build():
        return nnx.state(models.create(name, num_classes=10, rngs=nnx.Rngs(0), **options))

    state = shapes(build)
    leaves = [v for _, v in nnx.to_flat_state(state) if isinstance(v, nnx.Param)]
    assert sum(v.size for v in leaves) == count


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        *(("resnet20", {"shortcut": "A"}, size) for size in (8, 28, 32)),
        *(("resnet20", {"shortcut": "B"}, size) for size in (8, 28, 32)),
        *(("preact_resnet20", {}, size) for size in (8, 28, 32)),
        ("resnet32", {}, 28),
        ("preact_resnet32", {}, 28),
    ],
)
def test_images_of_every_size(name, options, size):
    channels = 3 if size == 32 else 1

    def run(dtype=None):
        model = models.create(
            name, num_classes=7, in_features=channels, dtype=dtype, rngs=nnx.Rngs(0), **options
        )
        return model(jnp.zeros((2, size, size, channels)))

    assert shapes(run).shape == (2, 7)
    assert shapes(run).dtype == jnp.float32
    if size == 8:
        assert shapes(lambda: run(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet20"])
@pytest.mark.parametrize("size", [8, 28])
def test_the_image_is_halved_twice(name, size):
    def run():
        model = models.create(name, num_classes=7, rngs=nnx.Rngs(0))
        features = []
        x = model.conv1(jnp.zeros((1, size, size, 3)))
        for stage in (model.layer1, model.layer2, model.layer3):
            for block in stage:
                x = block(x)
            features.append(x)
        return features

    halves = [size, size // 2, size // 4]
    assert [f.shape for f in shapes(run)] == [
        (1, n, n, width) for n, width in zip(halves, (16, 32, 64))
    ]


def test_shortcut_a_subsamples_and_pads_with_zeros():
    block = BasicBlock(2, 6, 2, shortcut="A", rngs=nnx.Rngs(0))
    assert block.downsample is None
    block.bn2.scale[...] = jnp.zeros(6)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 5, 5, 2)), jnp.float32)
    expected = np.zeros((1, 3, 3, 6), np.float32)
    expected[..., 2:4] = x[:, ::2, ::2]
    np.testing.assert_array_equal(nnx.jit(lambda block, x: block(x))(block, x), expected)


def test_shortcut_b_is_a_convolution_with_batch_norm():
    block = BasicBlock(2, 6, 2, shortcut="B", rngs=nnx.Rngs(0))
    assert block.downsample.kernel.shape == (1, 1, 2, 6)
    block.bn2.scale[...] = jnp.zeros(6)
    block.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 2)), jnp.float32)
    product = np.einsum("nyxc,co->nyxo", x[:, ::2, ::2], block.downsample.kernel[0, 0])
    expected = np.maximum(product / np.sqrt(1 + 1e-5), 0)
    found = nnx.jit(lambda block, x: block(x))(block, x)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Where shapes agree there is none.
    assert BasicBlock(4, 4, 1, shortcut="B", rngs=nnx.Rngs(0)).downsample is None


def test_strided_convolutions_pad_alike_on_both_sides():
    """As PyTorch's, unlike "SAME": the first window of an even image starts outside."""
    layer = convolution(1, 1, 3, 2, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layer(x)[0, :, :, 0], x[0, ::2, ::2, 0])


def test_biased_prelus_of_slope_zero_are_relus():
    """In a small network as in N2UQ's: everywhere but behind the stem, which has a plain ReLU."""

    def build(activation):
        options = {"num_classes": 10, "width": 4, "activation": activation}
        return models.create("resnet8", rngs=nnx.Rngs(0), **options)

    plain, biased = build("relu"), build("biased_prelu")
    prelus = [
        getattr(block, f"act{i}")
        for stage in (biased.layer1, biased.layer2, biased.layer3)
        for block in stage
        for i in (1, 2, 3)
    ]
    assert len(prelus) == 3 * 3
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    run = nnx.jit(lambda model, x: model(x))
    assert not np.allclose(run(plain, x), run(biased, x))
    for prelu in prelus:
        prelu.slope[...] = jnp.zeros_like(prelu.slope[...])
    np.testing.assert_allclose(run(plain, x), run(biased, x), atol=1e-6)


def test_kernels_start_with_variance_two_over_fan_out():
    kernel = convolution(64, 128, 3, 1, rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 128)), rtol=0.01)
    np.testing.assert_allclose(np.mean(kernel), 0, atol=1e-3)


def test_batch_norm_keeps_nine_tenths_and_the_biased_variance():
    norm = batch_norm(4, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(4, 8, 8, 4)), jnp.float32)
    norm(x)
    np.testing.assert_allclose(norm.mean[...], 0.1 * np.mean(x, (0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * np.var(x, (0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("network", [models.CifarResNet, models.CifarPreactResNet])
@pytest.mark.parametrize("depth", [2, 18, 21, 0, -4])
def test_a_depth_that_is_none(network, depth):
    with pytest.raises(ValueError, match=rf"depth \(={depth}\) must be 6n \+ 2"):
        network(depth, num_classes=10, rngs=nnx.Rngs(0))


def test_a_shortcut_and_a_name_that_are_none():
    with pytest.raises(ValueError, match=r"shortcut \(='C'\) must be 'A' or 'B'"):
        models.CifarResNet(20, num_classes=10, shortcut="C", rngs=nnx.Rngs(0))  # type: ignore
    with pytest.raises(
        ValueError, match=r"activation \(='gelu'\) must be 'relu' or 'biased_prelu'"
    ):
        models.create("resnet20", num_classes=10, activation="gelu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'resnet200'.*preact_resnet32.*did you mean 'resnet20'"):
        models.create("resnet200", num_classes=10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'vgg'\) must be one of [^;]*$"):
        models.create("vgg", num_classes=10, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="shortcut"):
        models.create("preact_resnet20", num_classes=10, shortcut="A", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 18}, r"name \(=18\) must be one of alexnet"),
        ({"num_classes": 0}, r"num_classes \(=0\) must be an integer, at least 1"),
        ({"num_classes": 10.0}, r"num_classes \(=10.0\) must be"),
        ({"granularity": "kernel"}, r"granularity \(='kernel'\) must be 'layer' or 'channel'"),
        ({"weight_bits": 2}, r"weight_bits \(=2\) must be None where method is None"),
        ({"method": "uniqq"}, r"method \(='uniqq'\) must be one of 'uniq', .*or None"),
        ({"method": "uniq", "weight_bits": 2}, r"activation_bits \(=None\) must be given"),
        ({"method": "lsq", "weight_bits": 9, "activation_bits": 2}, r"weight_bits \(=9\).*1 to 8"),
        ({"method": "lsq", "weight_bits": "2", "activation_bits": 2}, r"weight_bits \(='2'\)"),
        *(
            (
                {"method": method, "weight_bits": 6, "activation_bits": 6},
                rf"activation_bits \(=6\) must be an integer from 1 to 5 for method '{method}'",
            )
            for method in ("n2uq", "uniq_n2uq")
        ),
        (
            {"method": "n2uq", "weight_bits": 2, "activation_bits": 2, "granularity": "channel"},
            r"granularity \(='channel'\) must be 'layer' for method 'n2uq'",
        ),
    ],
)
def test_wrong_arguments_of_create_are_named(arguments, message):
    good = {"name": "resnet8", "num_classes": 10, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=message):
        models.create(**(good | arguments))


def test_the_vits_last_layer_has_a_signed_input_with_every_method():
    for method in ("uniq", "lsq", "uniq_n2uq"):
        model = nnx.eval_shape(
            lambda method=method: models.create(
                "vit_s16", num_classes=10, depth=1, rngs=nnx.Rngs(0),
                method=method, weight_bits=2, activation_bits=2,
            )
        )  # fmt: skip
        assert model.head.activation_quantizer.method.signed


def test_layers_that_stay_float_multiply_in_full():
    """In the network and in its frozen form; a GPU would round factors to ten bits otherwise."""

    def products(function):
        jaxpr = str(jax.make_jaxpr(function)(jnp.zeros((1, 8, 8, 3))))
        return re.findall(r"precision=(None|\([^)]*\))", " ".join(jaxpr.split()))

    def build(**method):
        options = {"num_classes": 10, "width": 4, "rngs": nnx.Rngs(0)}
        model = models.create("resnet8", **options, **method)
        model.eval()
        return model

    full = "(Precision.HIGHEST, Precision.HIGHEST)"
    two_bits = {"weight_bits": 2, "activation_bits": 2}
    n2uq = build(method="n2uq", **two_bits)
    assert products(n2uq).count(full) == 2
    assert n2uq.layer1[0].conv1.precision is None
    frozen = deploy.freeze(n2uq, (8, 8, 3))
    assert products(frozen).count(full) == 2
    # 8-bit ends are integers, and a float network is as its device likes it.
    assert full not in products(build(method="uniq", **two_bits))
    assert set(products(build())) == {"None"}


def test_every_name_is_the_network_it_says():
    kinds = {
        "alexnet": models.AlexNet,
        "mobilenet_v2": models.MobileNetV2,
        "vit_s16": models.VisionTransformer,
    }
    for name, make in models.MODELS.items():
        if name in kinds:
            assert make is kinds[name]
            continue
        shape, depth = re.fullmatch(r"(preact_)?resnet(\d+)", name).groups()
        small = int(depth) % 6 == 2 and depth != "50"
        kind = {
            (True, False): models.CifarResNet,
            (True, True): models.CifarPreactResNet,
            (False, False): models.ResNet,
            (False, True): models.PreactResNet,
        }[small, bool(shape)]
        assert make.func is kind
        assert make.args == (int(depth),)
