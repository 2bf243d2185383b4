"""Linen layers against the NNX ones, and in ordinary Linen models."""

import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import uniq_jax.nn as qnn
from uniq_jax.linen import STATISTICS, QuantConv, QuantDense, calibrate, is_quantizer_state
from uniq_jax.nn import (
    LsqActivation,
    LsqWeight,
    N2uqActivation,
    N2uqWeight,
    PactActivation,
    UniqActivation,
    UniqWeight,
)

WEIGHTS = {
    "float": None,
    "uniq2": UniqWeight(2),
    "uniq4-channel": UniqWeight(4, "channel"),
    "lsq3": LsqWeight(3),
    "n2uq2": N2uqWeight(2),
}
ACTIVATIONS = {
    "float": None,
    "uniq2": UniqActivation(2),
    "uniq8-signed": UniqActivation(8, signed=True),
    "lsq3": LsqActivation(3),
    "n2uq2": N2uqActivation(2),
    "pact3": PactActivation(3),
}
ACTIVATION = {"activation": UniqActivation(2)}
UNIQ2 = {"weight": UniqWeight(2), **ACTIVATION}

# Input shape, kernel size, and options of both frameworks' convolutions.
CONVOLUTIONS = {
    "same": ((2, 5, 5, 4), (3, 3), {}),
    "valid": ((2, 5, 5, 4), (3, 3), {"padding": "VALID", "use_bias": False}),
    "strided": ((2, 5, 5, 4), (3, 3), {"strides": 2}),
    "explicit": ((2, 5, 5, 4), (3, 3), {"padding": [(0, 2), (1, 0)]}),
    "circular": ((2, 5, 5, 4), (3, 3), {"padding": "CIRCULAR", "kernel_dilation": (1, 2)}),
    "reflect": ((2, 5, 5, 4), (3, 3), {"padding": "REFLECT"}),
    "groups": ((2, 5, 5, 4), (3, 3), {"feature_group_count": 2}),
    "input-dilated": ((2, 5, 5, 4), (3, 3), {"input_dilation": (2, 1), "padding": 1}),
    "causal": ((2, 9, 4), (3,), {"padding": "CAUSAL", "kernel_dilation": 2}),
    "1d-int": ((2, 9, 4), 3, {}),
    "no-batch": ((5, 5, 4), (3, 3), {}),
    "two-batch": ((2, 3, 5, 5, 4), (3, 3), {"precision": jax.lax.Precision.HIGHEST}),
    "bfloat16": ((2, 5, 5, 4), (3, 3), {"dtype": jnp.bfloat16}),
}


def numbers(*shape, seed=0, loc=0.0, scale=1.0):
    """Normal values that compile nothing."""
    return np.random.default_rng(seed).normal(loc, scale, size=shape).astype(np.float32)


def kernels(key, shape, dtype):
    del key
    return jnp.asarray(numbers(*shape, seed=sum(shape), scale=0.5), dtype)


def params_of(layer):
    return {
        path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }


def same_layers(kind, features, x, options, methods):
    """The layer in NNX and in Linen: both as functions of (params, x, evaluate), and params."""
    options = {"kernel_init": kernels, "bias_init": kernels, **options}
    if kind == "conv":
        size = options.pop("kernel_size")
        theirs = qnn.QuantConv(x.shape[-1], features, size, **options, **methods, rngs=nnx.Rngs(0))
        ours = QuantConv(features, size, **options, **methods)
    else:
        theirs = qnn.QuantLinear(x.shape[-1], features, **options, **methods, rngs=nnx.Rngs(0))
        ours = QuantDense(features, **options, **methods)
    graphdef, state = nnx.split(theirs)

    def nnx_function(params, x, evaluate):
        layer = nnx.merge(graphdef, nnx.clone(state))
        nnx.update(layer, nnx.from_flat_state(params.items()))
        layer.eval() if evaluate else layer.train()
        return layer(x)

    def linen_function(params, x, evaluate):
        return ours.apply({"params": unflatten_dict(params)}, x, deterministic=evaluate)

    return theirs, ours, nnx_function, linen_function


def compare(kind, features, x, options, methods, *, gradient_in_evaluation=True):
    """Initial parameters, values and gradients are equal, in training and in evaluation."""

    @jax.jit
    def run(x):
        theirs, ours, *functions = same_layers(kind, features, x, options, methods)
        start = ours.init(jax.random.key(0), x)["params"]
        params = params_of(theirs)
        results = []
        for function in functions:
            for evaluate in (False, True):
                if evaluate and not gradient_in_evaluation:
                    results.append((function(params, x, evaluate), {}, x))
                    continue
                y, pullback = jax.vjp(functools.partial(function, evaluate=evaluate), params, x)
                cotangent = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
                results.append((y, *pullback(cotangent)))
        return flatten_dict(start), params, results

    start, params, results = run(x)
    assert start.keys() == params.keys()
    for path, array in params.items():
        assert start[path].dtype == array.dtype
        np.testing.assert_array_equal(start[path], array, err_msg=str(path))
    for theirs, ours in zip(results[:2], results[2:]):
        assert ours[0].dtype == theirs[0].dtype
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[2], theirs[2])
        for path, gradient in theirs[1].items():
            assert np.any(gradient != 0), path
            np.testing.assert_array_equal(ours[1][path], gradient, err_msg=str(path))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_those_of_nnx(name):
    shape, size, options = CONVOLUTIONS[name]
    x = jnp.asarray(numbers(*shape, loc=0.3, scale=1.5))
    compare("conv", 6, x, {"kernel_size": size, **options}, UNIQ2)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_pair_of_methods_equals_that_of_nnx(weight, activation):
    methods = {"weight": WEIGHTS[weight], "activation": ACTIVATIONS[activation]}
    x = jnp.asarray(numbers(3, 2, 7, loc=0.3, scale=1.5))
    compare("dense", 5, x, {}, methods, gradient_in_evaluation=False)


# Calibration


class NnxNetwork(nnx.Module):
    def __init__(self, **methods):
        options = {**methods, "kernel_init": kernels, "rngs": nnx.Rngs(0)}
        self.first = qnn.QuantConv(3, 4, (3, 3), **options)
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.second = qnn.QuantLinear(4, 5, **options)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


class Network(nn.Module):
    """The same; its mode comes with the factory."""

    conv: Any = functools.partial(QuantConv, **UNIQ2)
    dense: Any = functools.partial(QuantDense, **UNIQ2)

    @nn.compact
    def __call__(self, x, train=True):
        mode = {"deterministic": not train, "kernel_init": kernels}
        x = self.conv(4, (3, 3), name="first", **mode)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return self.dense(5, name="second", **mode)(x)


def evaluation(model, batch):
    return model(batch, train=False)


def batches():
    return [jnp.asarray(numbers(2, 4, 4, 3, seed=i, scale=0.5 + i)) for i in range(3)]


def initial(model, x):
    """Variables that compile nothing: normal kernels, and about as flat as `init` otherwise."""

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            array = numbers(*leaf.shape, scale=math.prod(leaf.shape[-4:-1]) ** -0.5)
        else:
            array = np.full(leaf.shape, {"scale": 1, "var": 1, "bias": 0, "mean": 0}.get(name, 0.4))
        return jnp.asarray(array, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


CALIBRATED = [("uniq2", "uniq2"), ("uniq4-channel", "uniq8-signed"), ("lsq3", "lsq3"),
              ("n2uq2", "n2uq2"), ("float", "pact3"), ("uniq2", "float")]  # fmt: skip


@pytest.mark.parametrize(("weight", "activation"), CALIBRATED)
def test_calibration_equals_that_of_nnx(weight, activation):
    methods = {"weight": WEIGHTS[weight], "activation": ACTIVATIONS[activation]}
    theirs = NnxNetwork(**methods)
    ours = Network(
        functools.partial(QuantConv, **methods), functools.partial(QuantDense, **methods)
    )
    variables = initial(ours, batches()[0])
    # Weight steps, too, start anew: from the kernels that are there now.
    for name in ("first", "second"):
        layer = getattr(theirs, name)
        layer.kernel[...] = layer.kernel[...] * 3
        variables["params"][name]["kernel"] = layer.kernel[...]
    before = flatten_dict(variables)
    qnn.calibrate(theirs, batches())
    after = flatten_dict(calibrate(ours, variables, iter(batches()), apply=evaluation))
    assert before.keys() == after.keys()
    for path, array in params_of(theirs).items():
        assert after["params", *path].dtype == array.dtype
        np.testing.assert_allclose(after["params", *path], array, rtol=1e-6, err_msg=str(path))
    changed = {path[2] for path in before if np.any(before[path] != after[path])}
    wanted = {f"{kind}_quantizer" for kind, m in methods.items() if m and m.parameter_types}
    assert changed == wanted


def test_calibration_errors():
    model = Network()
    variables = initial(model, batches()[0])
    check = functools.partial(calibrate, model, variables, apply=evaluation)
    with pytest.raises(ValueError, match="batches is empty"):
        check([])
    with pytest.raises(TypeError, match=r"not one array .*write \[array\]"):
        check(batches()[0])
    nan = batches()[0].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"nan or infinite activations to .*activation_quantizer"):
        check([nan, batches()[0]])
    with pytest.raises(ValueError, match="no quantized layer"):
        calibrate(nn.Dense(3), initial(nn.Dense(3), jnp.ones((1, 2))), [jnp.ones((1, 2))])


def test_what_nothing_reaches_keeps_its_start():
    class Two(nn.Module):
        def setup(self):
            self.first = QuantDense(3, **UNIQ2)
            self.second = QuantDense(3, **UNIQ2)

        def __call__(self, x, both=True):
            x = self.first(x)
            return self.second(x) if both else x

    x = jnp.asarray(numbers(4, 3))
    variables = initial(Two(), x)
    for both in (True, False):
        found = calibrate(Two(), variables, [x], apply=lambda m, x, both=both: m(x, both))
        changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), variables, found)["params"]
        assert changed["first"]["activation_quantizer"]["step"]
        assert changed["second"]["activation_quantizer"]["step"] == both


# Ordinary models


class Block(nn.Module):
    """As in flax's ImageNet example: layers come from factories."""

    filters: int
    conv: Any
    norm: Any
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=nn.initializers.ones_init())(self.conv(self.filters, (3, 3))(y))
        if x.shape != y.shape:
            x = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    num_classes: int = 4
    num_filters: int = 4
    dtype: Any = jnp.float32
    conv: Any = nn.Conv
    dense: Any = nn.Dense
    quantized: bool = False

    @nn.compact
    def __call__(self, x, train: bool = True):
        mode = {"deterministic": not train} if self.quantized else {}
        conv = functools.partial(self.conv, use_bias=False, dtype=self.dtype, **mode)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, dtype=self.dtype)
        x = nn.Conv(self.num_filters, (3, 3), name="conv_init", dtype=self.dtype)(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = Block(self.num_filters * 2, conv, norm, strides=2)(x)
        x = jnp.mean(x, axis=(1, 2))
        return jnp.asarray(self.dense(self.num_classes, dtype=self.dtype, **mode)(x), jnp.float32)


class Encoder(nn.Module):
    """A transformer's block; attention by hand, of dense layers."""

    dense: Any
    heads: int = 2

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        heads = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (self.dense(x.shape[-1], name=n)(y).reshape(heads) for n in ("q", "k", "v"))
        x += self.dense(x.shape[-1], name="out")(nn.dot_product_attention(q, k, v).reshape(x.shape))
        y = nn.gelu(self.dense(2 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        x += self.dense(x.shape[-1], name="down")(y)
        return x


class VisionTransformer(nn.Module):
    dense: Any = nn.Dense
    conv: Any = nn.Conv

    @nn.compact
    def __call__(self, x, train: bool = True):
        del train
        x = self.conv(8, (2, 2), strides=2, padding="VALID", name="embedding")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = Encoder(self.dense)(x)
        return nn.Dense(4, name="head")(nn.LayerNorm()(x).mean(axis=1))


def quant_conv(activation):
    return functools.partial(QuantConv, weight=UniqWeight(2), activation=activation)


def quant_dense(activation=UNIQ2["activation"]):
    return functools.partial(QuantDense, weight=UniqWeight(2, "channel"), activation=activation)


MODELS = {
    "resnet": ResNet(
        conv=quant_conv(N2uqActivation(2)), dense=quant_dense(), quantized=True, dtype=jnp.bfloat16
    ),
    "vit": VisionTransformer(
        quant_dense(UniqActivation(3, signed=True)), quant_conv(UniqActivation(3, signed=True))
    ),
}
FLOATS = {"resnet": ResNet(), "vit": VisionTransformer()}


def images():
    labels = np.arange(16) % 4
    x = numbers(16, 8, 8, 3) + 0.7 * numbers(4, 1, 1, 3, seed=1)[labels]
    return jnp.asarray(x), jnp.asarray(labels)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_calibrated_and_trained(name):
    model, (x, labels) = MODELS[name], images()
    variables = initial(model, x)
    variables = calibrate(model, variables, [x], apply=evaluation)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    groups = jax.tree.map(lambda q: "steps" if q else "weights", is_quantizer_state(params))
    optimizer = optax.multi_transform(
        {"weights": optax.adamw(2e-2, weight_decay=1e-4), "steps": optax.adam(1e-3)}, groups
    )

    @jax.jit
    def step(params, rest, opt_state):
        def loss_function(params):
            logits, updates = model.apply({"params": params, **rest}, x, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates

        (loss, rest), gradient = jax.value_and_grad(loss_function, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, loss, gradient

    opt_state, losses = optimizer.init(params), []
    for i in range(20):
        params, rest, opt_state, loss, gradient = step(params, rest, opt_state)
        losses.append(float(loss))
        if i == 0:
            selected = jax.tree.leaves(is_quantizer_state(params))
            scalars = [g for g, q in zip(jax.tree.leaves(gradient), selected) if q]
            assert len(scalars) >= 8
            assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in scalars)
            assert all(g.dtype == jnp.float32 for g in scalars)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_checkpoint_loads_by_path(name):
    x, _ = images()
    floats = jax.eval_shape(FLOATS[name].init, jax.random.key(0), x)
    quantized = jax.eval_shape(MODELS[name].init, jax.random.key(0), x)
    flat, extra = flatten_dict(floats), flatten_dict(quantized)
    assert flat.keys() < extra.keys()
    added = set(extra) - set(flat)
    assert {path[-2] for path in added} == {"weight_quantizer", "activation_quantizer"}
    assert {path for path, q in flatten_dict(is_quantizer_state(quantized)).items() if q} == added
    assert all(extra[path] == array for path, array in flat.items())


def test_calibration_adds_what_a_float_checkpoint_lacks():
    model, x = Network(), batches()[0]
    variables = initial(model, x)
    learned = flatten_dict(is_quantizer_state(variables))
    floats = unflatten_dict({k: v for k, v in flatten_dict(variables).items() if not learned[k]})
    assert floats["params"]["first"].keys() == {"kernel", "bias"}
    found = (calibrate(model, v, batches(), apply=evaluation) for v in (floats, variables))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_scanned_layers_have_parameters_and_statistics_of_their_own():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, carried=None):
            del carried
            return x + QuantDense(4, weight=UniqWeight(2, "channel"), **ACTIVATION)(x), None

    class Scanned(nn.Module):
        axes: Any = (STATISTICS,)

        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, **dict.fromkeys(self.axes, 0)}
            lifted = nn.scan(Layer, axes, split_rngs={"params": True}, length=2)
            return lifted(name="layers")(x, jnp.zeros(2))[0]

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x, _ = Layer(name=f"layer{i}")(x)
            return x

    x = jnp.asarray(numbers(3, 4))
    variables = initial(Scanned(), x)
    each = [jax.tree.map(lambda a, i=i: a[i], variables["params"]["layers"]) for i in range(2)]
    separate = {"params": {f"layer{i}": params for i, params in enumerate(each)}}
    scanned = calibrate(Scanned(), variables, [x, 2 * x])["params"]["layers"]
    separate = calibrate(Unrolled(), separate, [x, 2 * x])["params"]
    steps = scanned["Dense_0"]["activation_quantizer"]["step"]
    assert steps.shape == (2,)
    assert steps[0] != steps[1]
    for i in range(2):
        jax.tree.map(
            lambda array, found, i=i: np.testing.assert_allclose(found[i], array, rtol=1e-5),
            separate[f"layer{i}"],
            scanned,
        )
    with pytest.raises(ValueError, match=f"without the collection '{STATISTICS}'; list it in"):
        calibrate(Scanned(axes=()), variables, [x])


def test_rematerialized_layers_have_the_same_values_and_gradients():
    x = jnp.asarray(numbers(5, 4))
    plain, remat = QuantDense(3, **UNIQ2), nn.remat(QuantDense)(3, **UNIQ2)
    variables = initial(remat, x)
    assert variables["params"].keys() == {"kernel", "bias", *map("{}_quantizer".format, UNIQ2)}

    @jax.jit
    def gradients(variables):
        return [
            jax.value_and_grad(lambda v, layer=layer: jnp.sum(jnp.sin(layer.apply(v, x))))(
                variables
            )
            for layer in (plain, remat)
        ]

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *gradients(variables))


def test_jitted_layers_are_calibrated_one_by_one_and_again():
    """Two of them share a trace, and a second calibration reuses it."""
    jitted = nn.jit(QuantDense)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jitted(4, **UNIQ2)(x)
            return jitted(4, **UNIQ2)(2 * x)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = QuantDense(4, **UNIQ2, name="JitDense_0")(x)
            return QuantDense(4, **UNIQ2, name="JitDense_1")(2 * x)

    x = jnp.asarray(numbers(3, 4))
    variables = initial(Two(), x)
    for scale in (1, 3):
        found, wanted = (calibrate(m, variables, [scale * x]) for m in (Two(), Plain()))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)


def test_statistics_must_be_lifted_as_params_are():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={STATISTICS: 0},
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return lifted(QuantDense(4, **UNIQ2), x, jnp.zeros(2))[0]

    x = jnp.asarray(numbers(3, 4))
    with pytest.raises(ValueError, match=r"statistics of shape \(2,\), but params of shape \(\)"):
        calibrate(Tied(), initial(Tied(), x), [x])


def test_vmapped_and_shared_layers():
    class Shared(nn.Module):
        def setup(self):
            lifted = nn.vmap(
                QuantDense,
                variable_axes={"params": 0, STATISTICS: 0},
                split_rngs={"params": True},
            )
            self.several = lifted(4, **UNIQ2)
            self.one = QuantDense(4, **UNIQ2)

        def __call__(self, x):
            return self.one(self.one(self.several(x)))

    x = jnp.asarray(numbers(3, 5, 4) * np.array([1, 2, 3], np.float32)[:, None, None])
    variables = calibrate(Shared(), initial(Shared(), x), [x])
    params = variables["params"]["several"]
    for i in range(3):
        layer = {"params": jax.tree.map(lambda a, i=i: a[i], params)}
        alone = calibrate(QuantDense(4, **UNIQ2), layer, [x[i]])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), alone, layer)
    assert jax.jit(Shared().apply)(variables, x).shape == (3, 5, 4)


# Modes and errors


def test_mode_comes_from_the_field_or_the_call():
    x = jnp.asarray(numbers(16, 64))
    plain = QuantDense(8, **UNIQ2)
    variables = initial(plain, x)

    @jax.jit
    def run(variables, x):
        fields = {d: QuantDense(8, **UNIQ2, deterministic=d) for d in (False, True)}
        return (
            plain.apply(variables, x),
            plain.apply(variables, x, deterministic=False),
            fields[False].apply(variables, x),
            plain.apply(variables, x, deterministic=True),
            fields[True].apply(variables, x),
        )

    default, *training, by_call, by_field = run(variables, x)
    for y in training:
        np.testing.assert_array_equal(y, default)
    np.testing.assert_array_equal(by_call, by_field)
    assert np.any(by_call != default)
    np.testing.assert_allclose(by_call, default, atol=1e-5)
    with pytest.raises(ValueError, match="deterministic"):
        QuantDense(8, **UNIQ2, deterministic=True).apply(variables, x, deterministic=True)


def test_without_methods_it_is_the_float_layer():
    x = jnp.asarray(numbers(2, 5, 5, 4))
    for ours, theirs in (
        (QuantConv(3, (3, 3), dtype=jnp.bfloat16), nn.Conv(3, (3, 3), dtype=jnp.bfloat16)),
        (QuantDense(3), nn.Dense(3)),
    ):
        variables = initial(ours, x)
        jax.tree.map(np.testing.assert_array_equal, variables, initial(theirs, x))
        y, wanted = jax.jit(
            lambda v, ours=ours, theirs=theirs: (ours.apply(v, x), theirs.apply(v, x))
        )(variables)
        np.testing.assert_array_equal(y, wanted)


def test_frozen_variables_and_partitioned_kernels():
    init = nn.with_partitioning(kernels, (None, "model"))
    layer, x = QuantDense(3, kernel_init=init, **UNIQ2), jnp.asarray(numbers(5, 4))
    variables = flax.core.freeze(jax.jit(layer.init)(jax.random.key(0), x))
    calibrated = calibrate(layer, variables, [x])
    assert isinstance(calibrated, flax.core.FrozenDict)
    assert isinstance(calibrated["params"]["kernel"], nn.Partitioned)
    assert jax.eval_shape(layer.apply, calibrated, x).shape == (5, 3)


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match=r"^weight \(=UniqActivation.*UniqWeight"):
        QuantDense(4, weight=UniqActivation(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^activation \(=2\) must be None or.*UniqActivation"):
        QuantConv(4, (3, 3), activation=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^conv_general_dilated_cls .* must be left out: Quant"):
        QuantConv(4, (3, 3), conv_general_dilated_cls=nn.Dense)
    with pytest.raises(TypeError, match=r"^dot_general .* must be left out: QuantDense has its"):
        QuantDense(4, dot_general=lambda *a, **k: a[0])
    with pytest.raises(TypeError, match=r"^promote_dtype .* must be left out"):
        QuantDense(4, promote_dtype=lambda *a, **k: a)  # type: ignore[arg-type]

    def initialize(layer, *shape):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones(shape))

    wide = {"weight": UniqWeight(8), "activation": UniqActivation(8)}
    with pytest.raises(ValueError, match="products of 8-bit"):
        initialize(QuantDense(2, **wide), 1, 70_000)
    mask = jnp.ones((3, 3, 4, 6))
    with pytest.raises(ValueError, match="mask must be None"):
        initialize(QuantConv(6, (3, 3), mask=mask, **UNIQ2), 1, 5, 5, 4)
    initialize(QuantConv(6, (3, 3), mask=mask, activation=UniqActivation(2)), 1, 5, 5, 4)
    with pytest.raises(ValueError, match="1D"):
        initialize(QuantConv(6, (3, 3), padding="CAUSAL", **UNIQ2), 1, 5, 5, 4)
