"""The CIFAR networks: shapes, sizes, shortcuts, and equality with the reference implementation."""

import importlib.util
import io
import itertools
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uniq_jax import interop, models, rules
from uniq_jax.models.blocks import batch_norm, convolution
from uniq_jax.models.resnet import BasicBlock
from uniq_jax.quantization import quantize


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
    with pytest.raises(ValueError, match=r"'resnet200'.*preact_resnet32.*did you mean 'resnet20'"):
        models.create("resnet200", num_classes=10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'vgg'\) must be one of [^;]*$"):
        models.create("vgg", num_classes=10, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="shortcut"):
        models.create("preact_resnet20", num_classes=10, shortcut="A", rngs=nnx.Rngs(0))


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


def split_with(build, arrays, dtype):
    """Definition and state of the network, with arrays by path; and the paths that it lacks."""
    graphdef, empty = nnx.split(nnx.eval_shape(build))
    flat = {"/".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(empty)}
    assert flat.keys() <= arrays.keys()
    for name, (_, variable) in flat.items():
        assert variable.shape == arrays[name].shape, name
    filled = [(path, v.replace(jnp.asarray(arrays[n], dtype))) for n, (path, v) in flat.items()]
    return graphdef, nnx.from_flat_state(filled), arrays.keys() - flat.keys()


def our_names(state_dict):
    """The reference's names of quantizers and shortcuts, and PyTorch's layouts."""
    renames = {
        "quan_w.delta": "weight_quantizer.step",
        "quan_a.delta": "activation_quantizer.step",
        "downsample.0.": "downsample.",
    }
    renamed = {}
    for name, value in state_dict.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        renamed[name] = value
    return interop.from_torch_names(renamed)


@pytest.fixture(scope="module")
def golden_dir():
    named = os.environ.get("UNIQ_JAX_SHARED")
    root = pathlib.Path(named) if named else pathlib.Path(__file__).parents[2] / "shared"
    if not (root / "golden" / "state.py").exists():
        pytest.skip(f"no golden files: {root}/golden/state.py is missing; set UNIQ_JAX_SHARED")
    return root / "golden"


@pytest.mark.data
@pytest.mark.parametrize("bits", [1, 2])
def test_preact_resnet32_is_the_reference_program(golden_dir, bits):
    """Logits, loss, gradients, and statistics after a step, in float64."""
    spec = importlib.util.spec_from_file_location("golden_state", golden_dir / "state.py")
    state = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(state)
    with np.load(golden_dir / f"uniq_preact_resnet32_w{bits}a{bits}.npz") as file:
        golden = dict(file)
    meta = json.loads(str(golden["meta"]))
    seed = meta["seed"]
    images, labels = state.make_batch(
        seed=seed, batch=meta["batch"], channels=3, size=meta["size"], classes=meta["classes"]
    )
    parameters = state.make_state(meta["shapes"], seed)
    with jax.enable_x64(True):

        def build():
            options = {"num_classes": meta["classes"], "param_dtype": jnp.float64}
            model = models.CifarPreactResNet(32, **options, rngs=nnx.Rngs(0))
            return quantize(model, rules.uniq(bits))

        graphdef, full, unused = split_with(build, our_names(parameters), jnp.float64)
        # Layers that are float here keep unused steps in the reference.
        assert all("_quantizer/step" in path for path in unused)
        assert len(unused) == (2 * 4 if bits == 1 else 0)
        params, statistics = nnx.split_state(full, nnx.Param, ...)

        @jax.jit
        def evaluate(params, statistics, x):
            model = nnx.merge(graphdef, params, statistics)
            model.eval()
            return model(x)

        @jax.jit
        def train(params, statistics, x, y):
            def loss(params):
                model = nnx.merge(graphdef, params, nnx.clone(statistics))
                logits = model(x)
                cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return cross_entropy.mean(), (logits, nnx.state(model, nnx.BatchStat))

            return jax.value_and_grad(loss, has_aux=True)(params)

        x = jnp.asarray(images.transpose(0, 2, 3, 1))
        eval_logits = evaluate(params, statistics, x)
        (loss, (train_logits, new_statistics)), gradients = train(
            params, statistics, x, jnp.asarray(labels)
        )

    def relative(found, wanted):
        return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()

    assert relative(eval_logits, golden["eval_logits"]) < 1e-9
    assert relative(train_logits, golden["train_logits"]) < 1e-9
    assert relative(loss, golden["loss"]) < 1e-9

    named = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(gradients)}
    named_statistics = {
        "/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(new_statistics)
    }
    norms = {k.removeprefix("grad_norm/"): v for k, v in golden.items() if "grad_norm/" in k}
    largest = max(norms.values())
    checked = set()
    for name, norm in norms.items():
        # The probe has the parameter's shape in PyTorch; translated like the parameter itself.
        probe = state.make_probe(name, meta["shapes"][name], seed)
        ((path, our_probe),) = our_names({name: probe}).items()
        checked.add(path)
        scale = max(norm, 1e-4 * largest)
        gradient = named[path]
        assert abs(np.linalg.norm(gradient) - norm) < 1e-6 * scale, name
        product = np.sum(gradient * our_probe)
        assert abs(product - golden[f"grad_probe/{name}"]) < 1e-6 * scale * max(
            1, np.linalg.norm(probe)
        ), name
    assert checked == named.keys()
    for key, norm in golden.items():
        if key.startswith("stat_norm/"):
            name = key.removeprefix("stat_norm/")
            ((path, _),) = our_names({name: np.zeros(1)}).items()
            assert abs(np.linalg.norm(named_statistics.pop(path)) - norm) < 1e-9 * norm, name
    assert not named_statistics


@pytest.mark.data
def test_a_float_network_from_elsewhere_classifies_cifar10(shared_dir):
    """Option A and every layout: a network that others trained reaches their accuracy."""
    from PIL import Image

    arrays = interop.read_npz(shared_dir / "data" / "weights" / "cifar10_resnet20.npz")
    graphdef, state, left_over = split_with(
        lambda: models.CifarResNet(20, num_classes=10, rngs=nnx.Rngs(0)), arrays, jnp.float32
    )
    assert not left_over
    count = 500
    with np.load(shared_dir / "data" / "cifar10" / "test_a.npz") as data:
        blob, offsets, labels = data["blob"].tobytes(), data["offsets"], data["labels"][:count]
    images = []
    for start, stop in itertools.pairwise(offsets):
        strip = np.asarray(Image.open(io.BytesIO(blob[start:stop])).convert("RGB"))
        images.extend(strip.reshape(-1, 32, 32, 3))
        if len(images) >= count:
            break
    x = np.stack(images[:count]) / 255
    x = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])

    @jax.jit
    def predict(state, x):
        model = nnx.merge(graphdef, state)
        model.eval()
        return jnp.argmax(model(x), axis=-1)

    accuracy = np.mean(np.asarray(predict(state, jnp.asarray(x, jnp.float32))) == labels)
    assert accuracy >= 0.88
