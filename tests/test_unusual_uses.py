"""Uses that are legitimate and seldom: each was once wrong without a word."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import uniq_jax
from uniq_jax import config, exact, models, nn, quantizers, recipes, rules
from uniq_jax.quantizers import uniq_weight_fitted_step, uniq_weight_initial_step


class Keeper(nnx.Module):
    """Sows, counts, draws random numbers, and lets its batch norm take part in calibration."""

    def __init__(self, rngs: nnx.Rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.rngs = rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        x = self.norm(self.fc(x), use_running_average=False)
        self.sow(nnx.Intermediate, "feature", x)
        return x + jax.random.normal(self.rngs.params(), x.shape)


def values(model):
    """By path, of all its variables but random keys."""
    return {
        "/".join(map(str, path)): np.array(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if not jnp.issubdtype(variable.dtype, jax.dtypes.prng_key)
    }


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("last", [1.0, np.nan])
def test_calibration_changes_quantizers_alone(last):
    rule = rules.Rule("fc", nn.UniqWeight(2), nn.UniqActivation(2))
    model = uniq_jax.quantize(Keeper(nnx.Rngs(0)), [rule])
    before = values(model)
    batches = [jnp.full((3, 4), value) for value in (1.0, 2.0, last)]
    if np.isnan(last):
        with pytest.raises(ValueError, match="nan or infinite"):
            uniq_jax.calibrate(model, batches)
    else:
        assert uniq_jax.calibrate(model, batches) == 3
    after = values(model)
    assert after.keys() == before.keys()
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == (set() if np.isnan(last) else {"fc/activation_quantizer/step"})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [7, 56])
def test_the_mean_of_narrow_numbers_is_rounded_once(dtype, size):
    x = np.random.default_rng(0).uniform(0, 4, (2, size, size, 8)).astype(dtype)
    found = exact.exact_mean(jnp.asarray(x))
    assert found.dtype == dtype
    wanted = x.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(
        np.asarray(found, np.float64), wanted, rtol=jnp.finfo(dtype).eps / 1.9
    )
    assert exact.exact_mean(jnp.full((1, 7, 7, 1), 3000, dtype))[0, 0] == dtype(3000)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("make", [np.zeros, np.ones], ids=["one weight", "equal weights"])
def test_channels_whose_weights_do_not_differ_are_quantized_and_learn(make, bits):
    count = 1 if make is np.zeros else 9
    w = jnp.tile(jnp.array([-1.5, 0.2, 1.0]), (count, 1))
    step = uniq_weight_initial_step(w, bits=bits, channel_axis=-1)
    found = quantizers.uniq_weight(w, step, bits=bits)
    assert np.all(np.sign(found) == np.sign(w))
    assert np.all(np.abs(found) > 0.15 * np.abs(w))
    if bits == 8:
        fitted = uniq_weight_fitted_step(w, bits=bits, channel_axis=-1)
        found = quantizers.uniq_weight(w, fitted, bits=bits)
        np.testing.assert_allclose(found, w, rtol=0.01)
        gradient = jax.grad(lambda w: quantizers.uniq_weight(w, fitted, bits=bits).sum())(w)
        np.testing.assert_array_equal(gradient, 1)


def test_a_fitted_step_is_never_below_the_smallest_one():
    assert uniq_weight_fitted_step(jnp.zeros(8), bits=8) == 2.0**-30


def test_graph_definitions_of_quantized_networks_can_be_static_arguments():
    @functools.partial(jax.jit, static_argnums=0)
    def apply(graphdef, state, x):
        return nnx.merge(graphdef, state)(x)

    causal = nnx.Sequential(nnx.Conv(4, 4, (3,), padding="CAUSAL", rngs=nnx.Rngs(0)))
    causal = uniq_jax.quantize(causal, [rules.Rule(".*", nn.UniqWeight(2), nn.UniqActivation(2))])
    x = jnp.ones((1, 5, 4))
    np.testing.assert_array_equal(apply(*nnx.split(causal), x), causal(x))
    for name in ("resnet8", "resnet18", "mobilenet_v2"):
        options = {"num_classes": 3, "method": "uniq", "weight_bits": 2, "activation_bits": 2}
        build = functools.partial(models.create, name, **options)
        model = nnx.eval_shape(lambda build=build: build(rngs=nnx.Rngs(0)))
        assert isinstance(hash(nnx.graphdef(model)), int)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_that_a_dtype_does_not_hold_are_an_error(dtype):
    w = jnp.array([-1.0, 1.0, 0.3])
    encoders = {
        "uniq": lambda bits: quantizers.uniq_weight_encode(w, 0.01, bits=bits, dtype=dtype),
        "lsq": lambda bits: quantizers.lsq_encode(w, 0.01, bits=bits, dtype=dtype),
        "n2uq": lambda bits: quantizers.n2uq_weight_encode(
            w, bits=bits, channel_axis=0, dtype=dtype
        ),
        "pact": lambda bits: quantizers.pact_activation_encode(w, 1.0, bits=bits, dtype=dtype),
    }
    for name, encode in encoders.items():
        with pytest.raises(ValueError, match=rf"dtype \(={dtype}\) must hold the codes 0 to 255"):
            encode(8)
        assert encode(4).codes.dtype == dtype, name


def test_levels_are_scaled_in_float32():
    encoded = quantizers.Encoded(jnp.array([255], jnp.uint8), jnp.bfloat16(0.3), 0.0)
    wanted = np.float32(jnp.bfloat16(0.3)) * np.float32(255)
    assert quantizers.decode(encoded, dtype=jnp.float32)[0] == wanted
    assert quantizers.decode(encoded).dtype == jnp.bfloat16


def test_a_view_for_evaluation_evaluates():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    model = uniq_jax.quantize(model, [rules.Rule(".*", nn.UniqWeight(2), nn.UniqActivation(2))])
    view = nnx.view(model, deterministic=True)
    assert view.layers[0].deterministic
    assert not model.layers[0].deterministic
    assert nnx.view(view, deterministic=False).layers[0].deterministic is False
    x = jnp.linspace(0, 1, 8).reshape(2, 4)
    expected = view(x)
    model.eval()
    np.testing.assert_array_equal(expected, model(x))


class Named(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.Dict(
            {"conv(3": nnx.Linear(2, 2, rngs=rngs), "b": nnx.Linear(2, 2, rngs=rngs)}
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers["b"](self.layers["conv(3"](x))


def test_paths_of_layers_are_no_regular_expressions():
    model = uniq_jax.quantize(Named(nnx.Rngs(0)), [rules.Rule("layers/b", nn.UniqWeight(2))])
    assert isinstance(model.layers["b"], nn.QuantLinear)
    assert type(model.layers["conv(3"]) is nnx.Linear


@pytest.mark.parametrize("integer", [np.int64, jnp.int32])
def test_bits_of_any_integer_type_are_the_same_method(integer):
    assert hash(nn.UniqWeight(integer(2))) == hash(nn.UniqWeight(2))
    assert nn.UniqWeight(integer(2)) == nn.UniqWeight(2)
    assert repr(nn.UniqWeight(integer(2))) == repr(nn.UniqWeight(2))


@pytest.mark.parametrize("key", ["bits", "weight_bits", "activation_bits"])
def test_widths_beside_a_curriculum_are_an_error(key):
    message = rf"config argument {key} \(=1\) must be left out where curriculum"
    with pytest.raises(config.ConfigError, match=message):
        recipes.cifar100(f"{key}=1,curriculum=8-4-2", model="preact_resnet32", bits=2)


def test_an_argument_without_a_value_is_an_error():
    with pytest.raises(config.ConfigError, match="config argument teacher must have a value"):
        recipes.cifar100("teacher", model="preact_resnet32", bits=2)


@pytest.mark.parametrize("name", ["vit_s16", "alexnet"])
def test_images_of_another_size_are_an_error(name):
    options = {"vit_s16": {"depth": 1, "features": 32, "heads": 2}, "alexnet": {}}[name]
    build = functools.partial(models.create, name, num_classes=3, **options)
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    for size in ((8, 8), (112, 448), (231, 224)):
        images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        message = rf"images of {size[0]}x{size[1]} pixels must be of image_size \(=224\) squared"
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(lambda m, x: m(x), model, images)


def test_the_first_dense_layer_of_alexnet_takes_pixels_channel_by_channel():
    model = models.create("alexnet", num_classes=3, image_size=95, rngs=nnx.Rngs(0))
    model.eval()
    seen = []
    model.fc1 = lambda x: seen.append(x) or jnp.zeros((x.shape[0], 4096))
    pool = []
    original = nnx.max_pool

    def watched(x, *args, **kwargs):
        pool.append(original(x, *args, **kwargs))
        return pool[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnx, "max_pool", watched)
        model(jnp.asarray(np.random.default_rng(0).normal(size=(2, 95, 95, 3)), jnp.float32))
    assert pool[-1].shape[1:3] == (2, 2)
    np.testing.assert_array_equal(seen[0], np.transpose(pool[-1], (0, 3, 1, 2)).reshape(2, -1))
