"""The table of layers against counts by hand, on the shapes that models come in."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import uniq_jax
from uniq_jax import deploy, models, rules
from uniq_jax.nn import N2uqActivation, N2uqWeight, UniqActivation, UniqWeight


def image(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def abstract(name, num_classes=10):
    return nnx.eval_shape(lambda: models.create(name, num_classes=num_classes, rngs=nnx.Rngs(0)))


def linear(features_in, features_out=None, **options):
    return nnx.Linear(features_in, features_out or features_in, rngs=nnx.Rngs(0), **options)


def by_path(summary):
    return {row.path: row for row in summary.rows}


@functools.cache
def resnet8():
    """With 2 bits by UniQ, and without arrays."""
    return nnx.eval_shape(
        lambda: uniq_jax.quantize(
            models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0)), rules.uniq(2)
        )
    )


# Counts by hand


def test_resnet20():
    """The stem; six convolutions a stage, of which the first of two stages has half the inputs."""
    full = 32 * 32 * 9 * 16 * 16
    summary = uniq_jax.summary(abstract("resnet20"), image(4, 32, 32, 3))
    assert summary.macs == 32 * 32 * 27 * 16 + 6 * full + 2 * (full // 2 + 5 * full) + 64 * 10
    kernels = 27 * 16 + 9 * (6 * 16**2 + (16 * 32 + 5 * 32**2) + (32 * 64 + 5 * 64**2)) + 640
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert summary.parameters == kernels + norms + 10
    assert summary.float_bytes == summary.packed_bytes == 4 * (summary.parameters + norms)
    assert summary.bit_operations == summary.float_bit_operations == summary.macs * 1024


def test_resnet18_has_the_published_size():
    """As in the table of torchvision: 11,689,512 parameters and, at 224x224, 1.814 GMACs."""
    summary = uniq_jax.summary(abstract("resnet18", num_classes=1000), image(1, 224, 224, 3))
    assert (summary.parameters, summary.macs) == (11_689_512, 1_814_073_344)


def test_rows_of_a_quantized_network():
    summary = uniq_jax.summary(resnet8(), image(2, 32, 32, 3))
    assert summary.rows[0] == uniq_jax.summarize.Row(
        path="conv1",
        type="QuantConv",
        input_shape=(2, 32, 32, 3),
        output_shape=(2, 32, 32, 16),
        parameters=432,
        weight_bits=8,
        weight_method="uniq",
        activation_bits=8,
        activation_method="uniq",
        macs=32 * 32 * 432,
        bit_operations=32 * 32 * 432 * 64,
        float_bytes=4 * 432,
        packed_bytes=432 + 4 + 4,
    )
    rows = by_path(summary)
    paths = "conv1 bn1 layer1/0/conv1 layer1/0/bn1 layer1/0/conv2 layer1/0/bn2 layer2/0/conv1"
    assert list(rows)[:7] == paths.split()  # in the order of calls
    norm = rows["bn1"]
    assert (norm.parameters, norm.packed_bytes, norm.macs) == (32, 256, 0)
    assert (norm.weight_bits, norm.weight_method, norm.activation_method) == (32, "float", "float")
    low = rows["layer2/0/conv1"]
    assert low.packed_bytes == 9 * 16 * 32 * 2 // 8 + 8
    assert low.bit_operations == low.macs * 4 == 16 * 16 * 9 * 16 * 32 * 4
    size = deploy.model_size(resnet8())
    assert (summary.float_bytes, summary.packed_bytes) == (size.float_bytes, size.packed_bytes)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), (8, 8, 4), 64 * 9 * 4 * 6),
        (nnx.Conv(4, 6, (3,), strides=2, rngs=nnx.Rngs(0)), (8, 4), 4 * 3 * 4 * 6),
        (nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)), (5, 5, 4), 25 * 9 * 8),
        (nnx.Conv(4, 6, (2, 2, 2), padding="VALID", rngs=nnx.Rngs(0)), (3, 3, 3, 4), 8 * 8 * 24),
        (nnx.ConvTranspose(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0)), (5, 5, 4), 25 * 9 * 24),
        (linear(4, 6), (7, 4), 7 * 24),
        (nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(0)), (7, 2, 3), 7 * 120),
        (nnx.Einsum("bte,ehd->bthd", (4, 2, 3), rngs=nnx.Rngs(0)), (7, 4), 7 * 24),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nnx.Module) else None,
)
def test_macs_of_layers(layer, shape, macs):
    (row,) = uniq_jax.summary(nnx.Sequential(layer), image(3, *shape)).rows
    assert row.macs == macs
    assert row.parameters == sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(layer)))
    assert row.input_shape == (3, *shape)


def test_products_without_a_kernel_belong_to_the_module_that_takes_them():
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    rows = by_path(uniq_jax.summary(nnx.Sequential(attention), image(3, 5, 8)))
    assert {path: row.macs for path, row in rows.items()} == {
        "layers/0": 2 * 5 * 5 * 8,
        **{f"layers/0/{name}": 5 * 64 for name in ("query", "key", "value", "out")},
    }
    assert rows["layers/0"].parameters == 0


# The shapes that models come in


class Sharing(nnx.Module):
    def __init__(self):
        self.z = linear(4)
        self.again = nnx.List([self.z])
        self.tied = linear(4)
        self.tied.kernel = self.z.kernel
        self.spare = linear(4)
        self.scale = nnx.Param(jnp.ones((4,)))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dropout(self.tied(self.again[0](self.z(x)))) * self.scale


def test_what_is_shared_counts_once_in_parameters_and_in_every_call():
    summary = uniq_jax.summary(Sharing(), image(1, 4))
    costs = {row.path: (row.macs, row.parameters, row.input_shape) for row in summary.rows}
    first, tied = costs.pop("again/0"), costs.pop("tied")
    assert first == (32, 20, (1, 4))
    assert tied == (16, 4, (1, 4))
    assert costs == {"": (0, 4, (1, 4)), "spare": (0, 20, None)}
    assert summary.rows[-1].path == "spare"
    assert "(model)" in str(summary)
    assert summary.float_bytes == deploy.model_size(Sharing()).float_bytes


class Cached(nnx.Module):
    """One layer, compiled: its second call is not traced again."""

    def __init__(self):
        self.fc = linear(4)

    @nnx.jit
    def __call__(self, x):
        return self.fc(x)


class Transformed(nnx.Module):
    """Every way in which a layer may be called without Python's seeing each call."""

    def __init__(self):
        self.cached = Cached()
        self.remat = linear(4)
        self.scanned = nnx.vmap(lambda key: linear(4))(jax.random.split(jax.random.key(0), 3))
        self.mapped = nnx.vmap(lambda key: linear(4))(jax.random.split(jax.random.key(0), 2))
        self.branch = linear(4)

    def __call__(self, x):
        x = self.cached(self.cached(x))
        x = nnx.remat(lambda layer, x: layer(x))(self.remat, x)
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.scanned
        )
        both = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.mapped, x)
        x = jnp.sum(both, axis=0)
        return nnx.cond(
            jnp.sum(x) > 0,
            lambda layer, x: layer(layer(x)),
            lambda layer, x: layer(x),
            self.branch,
            x,
        )


def test_transforms():
    model = Transformed()
    summary = uniq_jax.summary(model, image(5, 4))
    macs = {"cached/fc": 2, "remat": 1, "scanned": 3, "mapped": 2, "branch": 2}
    assert {row.path: row.macs / 16 for row in summary.rows} == macs
    layers = {"scanned": 3, "mapped": 2}
    for row in summary.rows:
        assert row.parameters == 20 * layers.get(row.path, 1)
        assert row.input_shape == (5, 4)
    # Nothing that is cached for the first is used for the second.
    assert uniq_jax.summary(model, image(5, 4)) == summary


# Input and model stay as they are


class Tiny(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)  # in training it would need rngs
        self.conv2 = nnx.Conv(4, 300, (3, 3), rngs=rngs)
        self.fc = linear(300, 4)  # evaluated in 8 bits it takes a product for each digit

    def __call__(self, x):
        return self.fc(self.conv2(self.dropout(self.norm(self.conv1(x)))).mean((1, 2)))


def test_train_and_eval_mode_alike_and_the_model_stays():
    model = nnx.jit(lambda: uniq_jax.quantize(Tiny(), rules.uniq_n2uq(2)))()
    call = vars(nnx.BatchNorm)["__call__"]
    before = nnx.split(model)
    in_training = uniq_jax.summary(model, image(2, 8, 8, 3))
    assert by_path(in_training)["fc"].macs == 1200
    after = nnx.split(model)
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
    assert vars(nnx.BatchNorm)["__call__"] is call
    assert "__call__" not in vars(type(model.conv1))
    model.eval()
    assert uniq_jax.summary(model, image(2, 8, 8, 3)) == in_training
    assert model.conv1.deterministic


def test_classes_are_restored_after_an_error():
    call = vars(nnx.Linear)["__call__"]
    with pytest.raises(TypeError):
        uniq_jax.summary(nnx.Sequential(linear(4)), image(1, 5))
    assert vars(nnx.Linear)["__call__"] is call


class TwoInputs(nnx.Module):
    def __init__(self):
        self.fc = linear(4)

    def __call__(self, x, y, doubled=False):
        return self.fc(self.fc(x + y)) if doubled else self.fc(x + y)


@pytest.mark.parametrize("kind", [image, lambda *s: np.zeros(s, "f4"), lambda *s: jnp.zeros(s)])
def test_kinds_of_input(kind):
    x = kind(2, 4)
    (row,) = uniq_jax.summary(nnx.Sequential(linear(4)), x).rows
    assert row.macs == 16
    assert uniq_jax.summary(TwoInputs(), (x, x)).macs == 16
    assert uniq_jax.summary(TwoInputs(), (x, x, True)).macs == 32


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"model \(=3\) must be an nnx.Module"):
        uniq_jax.summary(3, image(1, 4))
    for wrong in ((), image(), image(0, 4), 3):
        with pytest.raises(ValueError, match=r"input \(=.*batch axis"):
            uniq_jax.summary(TwoInputs(), wrong)


# Bytes


def test_scales_that_are_not_learned_and_weights_alone():
    model = nnx.Sequential(linear(5, 7), linear(7, 3, use_bias=False))
    uniq_jax.quantize(
        model,
        [
            rules.Rule("layers/0", N2uqWeight(3), N2uqActivation(2)),
            rules.Rule("layers/1", UniqWeight(1, "channel")),
        ],
    )
    summary = uniq_jax.summary(model, image(1, 5))
    first, second = summary.rows
    assert first.packed_bytes == -(-35 * 3 // 8) + 4 * (7 + 6 + 7)  # scales, thresholds, bias
    assert second.packed_bytes == -(-21 // 8) + 4 * 3
    assert (second.weight_bits, second.activation_bits) == (1, 32)
    assert second.bit_operations == 21 * 32
    assert (first.parameters, second.parameters) == (42, 21)
    assert summary.packed_bytes == deploy.model_size(model).packed_bytes


class Stack(nnx.Module):
    """Three attention layers that `scan` runs."""

    def __init__(self):
        def build(key):
            return nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(key))

        self.layers = nnx.vmap(build)(jax.random.split(jax.random.key(0), 3))

    def __call__(self, x):
        scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.layers)


def test_a_quantized_stack_of_attention():
    rule = rules.Rule(".*", N2uqWeight(3), N2uqActivation(2))
    model = nnx.eval_shape(lambda: uniq_jax.quantize(Stack(), [rule]))
    summary = uniq_jax.summary(model, image(1, 5, 8))
    products, query, *others = summary.rows
    assert (products.macs, products.parameters) == (3 * 2 * 5 * 5 * 8, 0)
    assert (query.macs, query.parameters) == (3 * 5 * 64, 3 * 72)
    # Codes; scales, thresholds and biases of 8 channels.
    assert query.packed_bytes == 3 * (64 * 3 // 8 + 4 * (8 + 6 + 8))
    assert len(others) == 3
    assert summary.packed_bytes == deploy.model_size(model).packed_bytes


# What it looks like


def test_text_is_aligned_and_fits():
    summary = uniq_jax.summary(resnet8(), image(2, 32, 32, 3))
    heading, rule, *rows, second_rule, total, _, in_float = str(summary).splitlines()
    assert len({len(line) for line in (heading, rule, *rows, second_rule, total)}) == 1
    assert len(heading) <= 110
    cells = "layer1/0/conv1 QuantConv 32x32x16 32x32x16 2,304 2 uniq 2 uniq 2.359 M 9.437 M 584 B"
    assert " ".join(rows[2].split()) == cells
    assert total.split()[:2] == ["total", "75,290"]
    ratio = summary.float_bytes / summary.packed_bytes
    assert f"303.1 KB ({ratio:.1f} times as many)" in in_float


@pytest.mark.parametrize(
    ("width", "columns"),
    [(120, "path type in out parameters weights inputs MACs bit ops packed"),
     (80, "path parameters weights inputs MACs bit ops packed"),
     (20, "path weights inputs MACs packed")],
)  # fmt: skip
def test_rich_table_has_the_columns_that_fit(width, columns):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(uniq_jax.summary(resnet8(), image(2, 32, 32, 3)))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    if width > 20:
        assert lines[0].split() == columns.split()
        assert lines[2].split()[0] == "conv1"
        assert any(line.startswith("total") for line in lines)


def test_rows_are_frozen():
    row = uniq_jax.summary(TwoInputs(), (image(1, 4), image(1, 4))).rows[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.macs = 0
    with pytest.raises(AttributeError):
        uniq_jax.nothing_of_this_name  # noqa: B018


def test_activations_alone():
    model = nnx.Sequential(linear(4))
    uniq_jax.quantize(model, [rules.Rule(".*", None, UniqActivation(3, signed=True))])
    (row,) = uniq_jax.summary(model, image(1, 4)).rows
    assert (row.weight_bits, row.activation_bits, row.activation_method) == (32, 3, "uniq")
    assert row.packed_bytes == row.float_bytes + 4
