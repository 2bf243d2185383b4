"""Models that this project did not write, quantized as a new user would."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import uniq_jax
from uniq_jax import Rule
from uniq_jax.nn import QuantizerParam, QuantLayer, UniqActivation, UniqWeight

RULES = [Rule("head"), Rule(".*", UniqWeight(2), UniqActivation(2, signed=True))]
CLASSES = 5


def numbers(key, shape, dtype):
    """An initializer that compiles nothing, which takes most of the time otherwise."""
    del key
    size = 1 / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.1
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(0, size, size=shape), dtype)


INITIAL = {"kernel_init": numbers, "bias_init": numbers}
Conv = functools.partial(nnx.Conv, **INITIAL)
Linear = functools.partial(nnx.Linear, **INITIAL)


class ResNetBlock(nnx.Module):
    """As in Flax's ImageNet example: factories for the layers, a projection if shapes differ."""

    def __init__(self, features, filters, strides, conv, norm, rngs):
        self.conv1 = conv(features, filters, (3, 3), strides, rngs=rngs)
        self.norm1 = norm(filters, rngs=rngs)
        self.conv2 = conv(filters, filters, (3, 3), rngs=rngs)
        self.norm2 = norm(filters, scale_init=nnx.initializers.constant(0.5), rngs=rngs)
        self.projects = features != filters or strides != (1, 1)
        if self.projects:
            self.conv_proj = conv(features, filters, (1, 1), strides, rngs=rngs)
            self.norm_proj = norm(filters, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projects:
            x = self.norm_proj(self.conv_proj(x))
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    def __init__(self, rngs):
        conv = functools.partial(Conv, use_bias=False)
        norm = functools.partial(nnx.BatchNorm, momentum=0.9)
        self.conv_init = conv(3, 8, (3, 3), (1, 1), padding=[(1, 1), (1, 1)], rngs=rngs)
        self.bn_init = norm(8, rngs=rngs)
        self.layers = nnx.List([ResNetBlock(8, 12, (2, 2), conv, norm, rngs)])
        self.head = Linear(12, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn_init(self.conv_init(x)))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=(1, 2)))


class Encoder(nnx.Module):
    """A block of Flax's ViT: attention, and an MLP in an nnx.Sequential."""

    def __init__(self, width, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, **INITIAL, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Sequential(
            Linear(width, 2 * width, rngs=rngs),
            nnx.gelu,
            nnx.Dropout(0.1, rngs=rngs),
            Linear(2 * width, width, rngs=rngs),
        )

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    def __init__(self, rngs, width=8):
        self.patches = Conv(3, width, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, width)))
        self.position = nnx.Param(numbers(None, (1, 5, width), jnp.float32))
        self.encoder = nnx.Sequential(Encoder(width, rngs))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[-1]))
        x = self.encoder(jnp.concatenate([cls, x], axis=1) + self.position[...])
        return self.head(self.norm(x)[:, 0])


class Block(nnx.Module):
    """A transformer block out of LinearGeneral and Einsum layers."""

    def __init__(self, width, rngs):
        options = {**INITIAL, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.LinearGeneral(width, (3, 2, width // 2), **options)
        self.out = nnx.LinearGeneral((2, width // 2), width, axis=(-2, -1), **options)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Einsum("...d,df->...f", (width, 2 * width), (2 * width,), **options)
        self.down = nnx.Einsum("...f,fd->...d", (2 * width, width), (width,), **options)

    def __call__(self, x):
        query, key, value = jnp.moveaxis(self.qkv(self.norm1(x)), -3, 0)
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.out(nnx.dot_product_attention(query, key, value, mask=mask))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Blocks in a list, or stacked by nnx.vmap and run by nnx.scan; either recalculated or not."""

    def __init__(self, rngs, *, width=8, layers=1, scan=False, remat=False):
        self.embed = nnx.Embed(11, width, embedding_init=numbers, rngs=rngs)
        if scan:
            build = nnx.vmap(lambda rngs: Block(width, rngs))
            self.blocks = nnx.split_rngs(splits=layers)(build)(rngs)
        else:
            self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = Linear(width, CLASSES, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens):
        def apply(x, block):
            return block(x)

        run = nnx.remat(apply) if self.remat else apply
        x = self.embed(tokens)
        if isinstance(self.blocks, Block):
            x = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for block in self.blocks:
                x = run(x, block)
        return self.head(self.norm(x).mean(axis=1))


class Mlp(nnx.Module):
    def __init__(self, rngs, *, remat=False):
        self.hidden = nnx.List([Linear(12, 12, rngs=rngs) for _ in range(2)])
        self.head = Linear(12, CLASSES, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        def apply(layer, x):
            return nnx.gelu(layer(x))

        for layer in self.hidden:
            x = (nnx.remat(apply) if self.remat else apply)(layer, x)
        return self.head(x)


def images(rng, count):
    return rng.normal(size=(count, 8, 8, 3)).astype(np.float32)


def tokens(rng, count):
    return rng.integers(0, 11, size=(count, 6))


def vectors(rng, count):
    return rng.normal(size=(count, 12)).astype(np.float32)


MODELS = {
    "resnet": (ResNet, images),
    "vit": (ViT, images),
    "transformer": (Transformer, tokens),
    "scanned": (functools.partial(Transformer, layers=2, scan=True, remat=True), tokens),
    "mlp": (Mlp, vectors),
}


def batch_of(make, count=16):
    rng = np.random.default_rng(0)
    return jnp.asarray(make(rng, count)), jnp.asarray(rng.integers(0, CLASSES, count))


def loss_of(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, grads)
    return loss, grads


@nnx.jit
def call(model, x):
    return model(x)


@nnx.jit
def value_and_gradient(model, x, y):
    return nnx.value_and_grad(loss_of)(model, x, y)


def arrays(tree):
    return {"/".join(map(str, path)): np.asarray(v) for path, v in nnx.to_flat_state(tree)}


def quantized(name, **options):
    build, make = MODELS[name]
    x, y = batch_of(make)
    model = uniq_jax.quantize(build(nnx.Rngs(0), **options), RULES)
    uniq_jax.calibrate(model, [x])
    return model, x, y


@pytest.mark.parametrize("name", ["resnet", "vit", "scanned", "mlp"])
def test_an_outside_model_is_quantized_and_trained(name):
    build, make = MODELS[name]
    float_model = build(nnx.Rngs(0))
    x, y = batch_of(make)

    model = uniq_jax.quantize(build(nnx.Rngs(0)), RULES)
    uniq_jax.calibrate(model, [x])

    learned = arrays(nnx.state(model, QuantizerParam))
    paths = {p for p in arrays(nnx.state(float_model, nnx.Param)) if p.endswith("kernel")}
    wanted = {p for p in paths if p != "head/kernel"}
    assert {p.replace("weight_quantizer/step", "kernel") for p in learned} >= wanted
    assert len(learned) == 2 * len(wanted)

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    losses, slopes = [], []
    for _ in range(20):
        loss, grads = train_step(model, optimizer, x, y)
        losses.append(float(loss))
        slopes.append({path: array for path, array in arrays(grads).items() if path in learned})
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    for path in learned:
        # Of every layer of a stack.
        assert np.all(np.max([np.abs(slope[path]) for slope in slopes], axis=0) > 0), path
    moved = arrays(nnx.state(model, QuantizerParam))
    assert all(np.all(moved[path] != learned[path]) for path in learned)

    # Evaluation on levels, against training's values with batch norm and dropout in evaluation.
    model.eval()
    evaluated = call(model, x)
    graphdef, state = nnx.split(model)
    np.testing.assert_array_equal(call(nnx.merge(graphdef, state), x), evaluated)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, QuantLayer):
            layer.deterministic = False
    errors = np.abs(call(model, x) - evaluated).max(axis=1)
    assert np.isfinite(errors).all()
    # A rounded sum near a threshold may take another code, in a few examples.
    assert np.median(errors) < 1e-4 * np.abs(evaluated).max()

    uniq_jax.dequantize(model)
    float_model.eval()
    assert nnx.graphdef(model) == nnx.graphdef(float_model)


def test_remat_changes_neither_values_nor_gradients():
    values, gradients = [], []
    for remat in (False, True):
        model, x, y = quantized("mlp", remat=remat)
        value, gradient = value_and_gradient(model, x, y)
        values.append(value)
        gradients.append(arrays(gradient))
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(gradients[1][path], gradient, atol=1e-5 * scale, err_msg=path)


def test_scanned_layers_are_those_of_a_list():
    """Calibration, values and gradients, with a step for each layer of the stack."""
    stacked, x, y = quantized("scanned", layers=2)
    listed, _, _ = quantized("transformer", layers=2)
    blocks = nnx.to_flat_state(nnx.state(uniq_jax.dequantize(nnx.clone(stacked.blocks))))
    for path, variable in blocks:
        stack = variable[...] * jnp.asarray([1, 0.7]).reshape(-1, *(1,) * (variable.ndim - 1))
        functools.reduce(getattr, path, stacked.blocks)[...] = stack
        for i, block in enumerate(listed.blocks):
            functools.reduce(getattr, path, block)[...] = stack[i]
    for model in (stacked, listed):
        uniq_jax.calibrate(model, [x])
    found = [arrays(nnx.state(stacked, QuantizerParam))]
    wanted = [arrays(nnx.state(listed, QuantizerParam))]
    values = []
    for model, results in ((stacked, found), (listed, wanted)):
        value, gradient = value_and_gradient(model, x, y)
        values.append(value)
        results.append(arrays(gradient))
    np.testing.assert_allclose(*values, rtol=1e-5)
    for of_stack, of_list in zip(found, wanted):
        stacks = {p: v for p, v in of_stack.items() if p.startswith("blocks/")}
        assert len(of_list) == len(of_stack) + len(stacks)
        for path, stack in stacks.items():
            layers = [of_list[path.replace("blocks/", f"blocks/{i}/")] for i in range(2)]
            atol = 1e-4 * np.abs(stack).max()
            np.testing.assert_allclose(stack, np.stack(layers), atol=atol, err_msg=path)


class Within(nnx.Module):
    """A layer that is called within a transform."""

    def __init__(self, transform, rngs):
        self.layer = Linear(12, CLASSES, rngs=rngs)
        self.transform = transform

    def __call__(self, x):
        return self.transform(self.layer, x)


def apply(layer, x):
    return layer(x)


NNX_TRANSFORMS = {
    "jit": nnx.jit(apply),
    "remat": nnx.remat(apply),
    "vmap": nnx.vmap(apply, in_axes=(None, 0)),
    "scan": lambda layer, x: nnx.scan(
        lambda layer, x: (layer, layer(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
    )(layer, x)[1],
}
JAX_TRANSFORMS = {
    "jit": lambda layer, x: jax.jit(apply)(layer, x),
    "checkpoint": lambda layer, x: jax.checkpoint(lambda x: layer(x))(x),
    "vmap": lambda layer, x: jax.vmap(layer)(x),
    "scan": lambda layer, x: jax.lax.scan(lambda carry, x: (carry, layer(x)), 0, x)[1],
    "copy": lambda layer, x: nnx.clone(layer)(x),
}


@pytest.mark.parametrize("name", NNX_TRANSFORMS)
def test_calibration_within_transforms_of_nnx(name):
    x, _ = batch_of(vectors)
    found, wanted = (
        uniq_jax.quantize(Within(transform, nnx.Rngs(0)), RULES[1:])
        for transform in (NNX_TRANSFORMS[name], apply)
    )
    for model in (found, wanted):
        uniq_jax.calibrate(model, [x, 2 * x])
    steps = [model.layer.activation_quantizer.step[...] for model in (found, wanted)]
    if name == "scan":
        # The largest of the single examples, which are batches there.
        steps[1] = max(UniqActivation(2, signed=True).statistic(2 * row) for row in x)
    np.testing.assert_allclose(*steps, rtol=1e-5)


@pytest.mark.parametrize("name", JAX_TRANSFORMS)
def test_calibration_does_not_lose_silently_what_transforms_of_jax_keep(name):
    x, _ = batch_of(vectors)
    model = uniq_jax.quantize(Within(JAX_TRANSFORMS[name], nnx.Rngs(0)), RULES[1:])
    before = arrays(nnx.state(model))
    model(x)
    with pytest.raises(ValueError, match=r"transform.*use nnx"):
        uniq_jax.calibrate(model, [x])
    for path, array in arrays(nnx.state(model)).items():
        np.testing.assert_array_equal(array, before[path])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_decodes_as_it_attends(mode):
    """One position at a time, from its cache, as all at once."""
    attention = nnx.MultiHeadAttention(2, 6, num_kv_heads=1, **INITIAL, rngs=nnx.Rngs(0))
    model = uniq_jax.quantize(nnx.Dict(attention=attention), RULES[1:])
    layers = {path[-1]: m for path, m in nnx.iter_modules(model) if isinstance(m, QuantLayer)}
    assert layers.keys() == {"query", "key", "value", "out"}
    assert model.attention.query is layers["query"]
    getattr(model, mode)()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    mask = nnx.make_causal_mask(x[..., 0])
    apply = nnx.jit(lambda model, x, mask: model.attention(x, mask=mask, decode=False))
    uniq_jax.calibrate(model, [x], apply=lambda model, x: model.attention(x, decode=False))
    wanted = apply(model, x, mask)
    assert layers["query"].deterministic == (mode == "eval")
    model.attention.init_cache(x.shape)
    step = nnx.jit(lambda model, x: model.attention(x, decode=True))
    found = [step(model, x[:, i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), wanted, rtol=0, atol=1e-5)


CHILD = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
import test_outside_models as outside
import uniq_jax

RULES = [
    uniq_jax.Rule("head"),
    uniq_jax.Rule(".*", uniq_jax.nn.UniqWeight(2, "channel"), outside.RULES[1].activation),
]


def train(mesh):
    def place(array):
        sharded = array.ndim > 1 and array.shape[-1] % 2 == 0
        spec = P(*[None] * (array.ndim - 1), "model") if sharded else P()
        return jax.device_put(jnp.asarray(array, jnp.float64), NamedSharding(mesh, spec))

    model = outside.Transformer(nnx.Rngs(0), layers=2, scan=True)
    model.embed.dtype = jnp.float64
    nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.float64), nnx.state(model)))
    uniq_jax.quantize(model, RULES)
    nnx.update(model, jax.tree.map(place, nnx.state(model)))
    x, y = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in
            outside.batch_of(outside.tokens, 8))
    uniq_jax.calibrate(model, [x])
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    losses = [float(outside.train_step(model, optimizer, x, y)[0]) for _ in range(5)]
    kernel = model.blocks.qkv.kernel[...]
    assert len(kernel.sharding.device_set) == mesh.size
    assert kernel.addressable_shards[0].data.size * mesh.shape["model"] == kernel.size
    return outside.arrays(nnx.state(model)), np.asarray(losses)


devices = np.array(jax.devices())
assert devices.size == 4
(one, losses_of_one), (four, losses_of_four) = (
    train(Mesh(d, ("data", "model"))) for d in (devices[:1, None], devices.reshape(2, 2))
)
np.testing.assert_allclose(losses_of_four, losses_of_one, rtol=1e-9)
assert one.keys() == four.keys()
for path, wanted in one.items():
    assert wanted.dtype == np.float64, path
    np.testing.assert_allclose(four[path], wanted, rtol=0, atol=1e-9, err_msg=path)
print("checked", len(one))
"""


@pytest.mark.slow
def test_one_device_and_four_agree(quick_compilation):
    """Batch and kernels sharded, layers scanned, in float64."""
    flags = quick_compilation["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    tests = pathlib.Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tests)],
        env={**os.environ, **quick_compilation, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("checked")
