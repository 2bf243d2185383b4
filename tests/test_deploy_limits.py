"""Where frozen networks end: what is refused, what is not finite, and what stays as it is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import uniq_jax
from uniq_jax import deploy, nn, rules
from uniq_jax.deploy import integers


class Chain(nnx.Module):
    """Dense layers behind one another, between two functions."""

    def __init__(self, *, before=lambda x: x, after=lambda x: x, features=(8, 8), **options):
        sizes = itertools.pairwise(features)
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs, **options) for a, b in sizes])
        self.before, self.after = before, after

    def __call__(self, x):
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.after(x)


def quantized(model, bits=2):
    everywhere = rules.Rule(".*", nn.UniqWeight(bits), nn.UniqActivation(bits, signed=True))
    uniq_jax.quantize(model, [everywhere])
    model.eval()
    return model


def inputs(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
def test_other_dtypes_are_refused(options):
    model = quantized(Chain(features=(8, 8, 8, 8), **options))
    with pytest.raises(ValueError, match=r"layer layers/0 must compute in float32.* bfloat16"):
        deploy.freeze(model, (8,))


def test_logits_of_other_dtypes_are_refused():
    model = quantized(Chain(after=lambda x: x.astype(jnp.bfloat16)))
    with pytest.raises(ValueError, match="must return float32 logits; it returns bfloat16"):
        deploy.freeze(model, (8,))


class Rematerialized(Chain):
    def __call__(self, x):
        return nnx.remat(lambda layer, x: layer(x))(self.layers[0], x)


class Scanned(nnx.Module):
    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layer = stacked(nnx.Rngs(0))

    def __call__(self, x):
        step = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, self.layer)


@pytest.mark.parametrize("kind", [Rematerialized, Scanned])
def test_layers_in_transforms_are_refused(kind):
    model = quantized(kind())
    assert model(jnp.ones((2, 8))).shape == (2, 8)
    with pytest.raises(NotImplementedError, match="in a transform"):
        deploy.freeze(model, (8,))


@pytest.mark.parametrize("shape", [4, (), (0,), ("8",), None])
def test_an_image_shape_that_is_none_is_named(shape):
    with pytest.raises(ValueError, match=r"image_shape \(=.*\) must be that of one input"):
        deploy.freeze(quantized(Chain()), shape)


def test_inputs_of_other_features_are_named():
    with pytest.raises(TypeError) as raised:
        deploy.freeze(quantized(Chain()), (7,))
    assert "image_shape (=(7,)) may not be what the model takes" in raised.value.__notes__


def test_about_goes_with_the_network_and_its_files(tmp_path):
    about = deploy.About(labels=["a", "b"], mean=[127.5], std=[64])  # pyright: ignore
    network = deploy.freeze(quantized(Chain()), (8,), about=about)
    deploy.save(network, tmp_path / "net.safetensors")
    found = deploy.load(tmp_path / "net.safetensors").about
    assert found == about
    assert found.labels == ("a", "b")
    np.testing.assert_array_equal(found.normalize(np.full((1, 8), 191.5)), np.ones((1, 8)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (1.0,), "std": ()}, r"mean \(=\(1.0,\)\) must have as many entries as std"),
        ({"mean": (1.0,), "std": (0.0,)}, r"std \(=\(0.0,\)\) must be positive"),
        ({"mean": (1.0,), "std": (float("nan"),)}, "must be positive"),
    ],
)
def test_normalization_that_is_none_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        deploy.About(**values)


@pytest.mark.parametrize("bits", [1, 5, 6, 8])
def test_nan_has_the_lowest_code(bits):
    limits = jnp.arange(1, 2**bits, dtype=jnp.float32)
    assert integers.count_below(jnp.array([jnp.nan, 2**bits]), limits).tolist() == [0, 2**bits - 1]


def test_the_scale_of_pixels_from_0_to_1_is_noticed():
    with pytest.warns(UserWarning, match=r"std \(=\(0.229, 0.224\)\) is of pixels from 0 to 255"):
        deploy.About(mean=(0.485, 0.456), std=(0.229, 0.224))


def test_normalization_of_other_channels_is_refused():
    about = deploy.About(mean=(1.0, 2.0), std=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"about.mean .* image_shape \(=\(8,\)\) has channels"):
        deploy.freeze(quantized(Chain()), (8,), about=about)


def test_what_is_not_finite_is_no_agreement():
    model = quantized(Chain(features=(8, 8, 3)))
    frozen = deploy.freeze(model, (8,))
    x = inputs(4, 8)
    assert deploy.verify(model, frozen, [x]).logit_difference == 0
    x[2, 5] = np.nan
    assert deploy.verify(model, frozen, [x]).logit_difference == np.inf


def test_what_is_not_finite_in_both_agrees():
    model = quantized(Chain(after=lambda x: x / jnp.zeros(8)))
    frozen = deploy.freeze(model, (8,))
    x = inputs(4, 8)
    assert not np.isfinite(frozen(x)).any()
    assert deploy.verify(model, frozen, [x]).logit_difference == 0


@pytest.mark.parametrize("bits", [1, 5, 6, 7, 8])
def test_infinite_inputs_have_the_outermost_codes(bits):
    limits = jnp.arange(1, 2**bits, dtype=jnp.float32)
    x = jnp.array([-jnp.inf, -1e30, 1e30, jnp.inf])
    assert integers.count_below(x, limits).tolist() == [0, 0, 2**bits - 1, 2**bits - 1]


SLICES = {
    "the batch second": (
        (1, 10),
        lambda x: x.transpose(1, 0, 2)[..., :8],
        lambda x: x.transpose(1, 0, 2),
    ),
    "the batch and more": ((3, 10), lambda x: x.reshape(-1, 10)[:, 1:9], lambda x: x),
    "from the batch on": (
        (2, 8),
        lambda x: x.reshape(-1, 8)[x.shape[0] :],
        lambda x: x,
    ),
    "of pixels": ((4, 8), lambda x: x[:, 1:3], lambda x: x),
}


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("batch", [1, 5])
def test_slices_keep_the_whole_batch(name, batch):
    shape, before, after = SLICES[name]
    model = quantized(Chain(before=before, after=after))
    x = inputs(batch, *shape)
    np.testing.assert_array_equal(deploy.freeze(model, shape)(x), model(x))


@pytest.mark.parametrize("bits", [1, 2])
def test_no_images_have_no_logits(bits):
    assert deploy.freeze(quantized(Chain(), bits), (8,))(jnp.zeros((0, 8))).shape == (0, 8)


def test_a_frozen_network_cannot_be_changed():
    frozen = deploy.freeze(quantized(Chain()), (8,))
    name = next(iter(frozen.arrays))
    with pytest.raises(TypeError, match="does not support item assignment"):
        frozen.arrays[name] = jnp.zeros(1)  # pyright: ignore
    assert not hasattr(frozen.arrays, "update")
    leaves, structure = jax.tree.flatten(frozen)
    assert len(leaves) == len(frozen.arrays)
    again = jax.tree.unflatten(structure, leaves)
    x = inputs(4, 8)
    np.testing.assert_array_equal(again(x), frozen(x))
    np.testing.assert_array_equal(jax.jit(lambda n, x: n(x))(frozen, x), frozen(x))
    assert type(jax.device_get(frozen).arrays) is type(frozen.arrays)
