"""Quantized layers against the float layers on quantized operands."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax.nn import (
    LsqActivation,
    LsqWeight,
    N2uqActivation,
    N2uqWeight,
    PactActivation,
    QuantConv,
    QuantEinsum,
    QuantLinear,
    QuantLinearGeneral,
    UniqActivation,
    UniqWeight,
    calibrate,
)
from uniq_jax.quantizers import decode

QUANTIZED = {
    nnx.Conv: QuantConv,
    nnx.Einsum: QuantEinsum,
    nnx.Linear: QuantLinear,
    nnx.LinearGeneral: QuantLinearGeneral,
}

METHODS = {
    "uniq1": (UniqWeight(1), UniqActivation(1)),
    "uniq2": (UniqWeight(2), UniqActivation(2)),
    "uniq4-channel": (UniqWeight(4, "channel"), UniqActivation(4)),
    "uniq8-signed": (UniqWeight(8), UniqActivation(8, signed=True)),
    "lsq3": (LsqWeight(3), LsqActivation(3)),
    "lsq4-signed-channel": (LsqWeight(4, "channel"), LsqActivation(4, signed=True)),
    "n2uq2": (N2uqWeight(2), N2uqActivation(2)),
    "n2uq1-clipped": (N2uqWeight(1, "clipped"), N2uqActivation(1)),
    "pact3": (N2uqWeight(3), PactActivation(3)),
    "pact2-reference": (UniqWeight(2), PactActivation(2, "reference")),
    "weight-only": (UniqWeight(2), None),
    "activation-only": (None, UniqActivation(2)),
}

# Input shape, output features, kernel size, and options of nnx.Conv.
CONVOLUTIONS = {
    "same": ((2, 5, 5, 4), 6, (3, 3), {"padding": "SAME"}),
    "valid": ((2, 5, 5, 4), 6, (3, 3), {"padding": "VALID", "use_bias": False}),
    "strided": ((2, 5, 5, 4), 6, (3, 3), {"strides": (2, 1)}),
    "strided-int": ((2, 5, 5, 4), 6, (3, 3), {"strides": 2}),
    "explicit": ((2, 5, 5, 4), 6, (3, 3), {"padding": [(0, 2), (1, 0)]}),
    "int-padding": ((2, 5, 5, 4), 6, (3, 3), {"padding": 2}),
    "circular": ((2, 5, 5, 4), 6, (3, 3), {"padding": "CIRCULAR"}),
    "reflect": ((2, 5, 5, 4), 6, (3, 3), {"padding": "REFLECT", "kernel_dilation": (1, 2)}),
    "groups": ((2, 5, 5, 4), 6, (3, 3), {"feature_group_count": 2}),
    "depthwise": ((2, 5, 5, 4), 8, (3, 3), {"feature_group_count": 4}),
    "dilated": ((2, 5, 5, 4), 6, (3, 3), {"kernel_dilation": 2}),
    "input-dilated": ((2, 5, 5, 4), 6, (3, 3), {"input_dilation": (2, 1), "padding": 1}),
    "1d": ((2, 9, 4), 6, 3, {}),
    "causal": ((2, 9, 4), 6, (3,), {"padding": "CAUSAL", "kernel_dilation": 2}),
    "3d": ((1, 3, 4, 3, 2), 3, (2, 2, 2), {}),
    "no-batch": ((5, 5, 4), 6, (3, 3), {}),
    "two-batch": ((2, 3, 5, 5, 4), 6, (3, 3), {}),
    "highest": ((2, 5, 5, 4), 6, (3, 3), {"precision": jax.lax.Precision.HIGHEST}),
}


def numbers(key, shape, dtype):
    """An initializer that compiles nothing."""
    del key
    values = np.random.default_rng(sum(shape)).normal(0, 0.5, size=shape)
    return jnp.asarray(values.astype(np.float32), dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A float layer, the quantized one, and an input."""

    plain_class: type
    arguments: tuple
    options: dict
    methods: tuple
    shape: tuple
    dtype: Any = jnp.float32
    channel_axes: tuple = (-1,)

    def build(self):
        options = {"kernel_init": numbers, "bias_init": numbers, **self.options}
        plain = self.plain_class(*self.arguments, **options, rngs=nnx.Rngs(3))
        weight, activation = self.methods
        layer = QUANTIZED[self.plain_class](
            *self.arguments, **options, weight=weight, activation=activation, rngs=nnx.Rngs(3)
        )
        return plain, layer

    @property
    def x(self):
        values = np.random.default_rng(5).normal(0.3, 1.5, size=self.shape)
        return jnp.asarray(values.astype(np.float32), self.dtype)


def conv_case(name, methods, *, dtype=jnp.float32, **more):
    shape, features, kernel_size, options = CONVOLUTIONS[name]
    arguments = (shape[-1], features, kernel_size)
    return Case(nnx.Conv, arguments, {**options, **more}, methods, shape, dtype)


def linear_case(methods, *, shape=(3, 2, 7), dtype=jnp.float32, **options):
    return Case(nnx.Linear, (shape[-1], 5), options, methods, shape, dtype)


def state_dict(layer):
    """Path to array, of everything learned."""
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {"/".join(path): variable[...] for path, variable in flat}


def of_quantizer(arrays, name):
    prefix = f"{name}_quantizer/"
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def by_channel(quantize, kernel, parameters, axes):
    """`quantize` of the kernel as a matrix that has the channels along its last axis."""
    if axes == (-1,):
        return quantize(kernel, parameters)
    others = [axis for axis in range(-kernel.ndim, 0) if axis not in axes]

    def matrix(array):
        taps = np.prod([array.shape[axis] for axis in others], dtype=int)
        return jnp.moveaxis(array, axes, range(-len(axes), 0)).reshape(taps, -1)

    result = quantize(
        matrix(kernel), {k: matrix(v) if v.ndim else v for k, v in parameters.items()}
    )
    shape = [kernel.shape[axis] for axis in (*others, *axes)]
    return jnp.moveaxis(result.reshape(shape), range(-len(axes), 0), axes)


def reference(plain, methods, arrays, x, channel_axes=(-1,)):
    """The float layer on operands that the methods' functions have quantized."""
    plain = nnx.clone(plain)
    if isinstance(plain, nnx.Conv) and plain.padding in ("CIRCULAR", "REFLECT"):
        # Copies of the border count as inputs.
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[plain.padding]
        dilations = np.broadcast_to(plain.kernel_dilation, len(plain.kernel_size))
        sizes = [(k - 1) * int(d) + 1 for k, d in zip(plain.kernel_size, dilations)]
        x = jnp.pad(x, [(0, 0), *(((s - 1) // 2, s // 2) for s in sizes), (0, 0)], mode=mode)
        plain.padding = "VALID"
    weight, activation = methods
    kernel = arrays["kernel"]
    if weight is not None:
        parameters = of_quantizer(arrays, "weight")
        kernel = by_channel(weight.quantize, kernel, parameters, channel_axes)
    if activation is not None:
        x = activation.quantize(x, of_quantizer(arrays, "activation"))
    plain.kernel[...] = kernel
    if plain.bias is not None:
        plain.bias[...] = arrays["bias"]
    return plain(x)


def value_and_gradients(function, arrays, x):
    value = function(arrays, x)
    cotangent = jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape)
    gradients = jax.grad(lambda *a: jnp.sum(function(*a) * cotangent), argnums=(0, 1))(arrays, x)
    return value, gradients[0], gradients[1]


def check(case, *, tolerance=2e-6, mode="train"):
    """Values and gradients of the layer are those of `reference`, and its evaluation is near."""

    @jax.jit
    def run(x):
        plain, layer = case.build()
        getattr(layer, mode)()
        arrays = state_dict(layer)
        graphdef, state, rest = nnx.split(layer, nnx.Param, ...)
        paths = {"/".join(path): path for path, _ in nnx.to_flat_state(state)}

        def layer_function(arrays, x):
            merged = nnx.merge(graphdef, nnx.clone(state), rest)
            nnx.update(merged, nnx.from_flat_state((paths[k], v) for k, v in arrays.items()))
            return merged(x)

        got = value_and_gradients(layer_function, arrays, x)
        wanted = value_and_gradients(
            lambda arrays, x: reference(plain, case.methods, arrays, x, case.channel_axes),
            arrays,
            x,
        )
        layer.eval()
        return got, wanted, layer(x)

    got, wanted, evaluated = run(case.x)
    assert got[0].dtype == wanted[0].dtype == evaluated.dtype
    np.testing.assert_array_equal(got[0], wanted[0])
    largest = np.abs(wanted[0]).max()
    np.testing.assert_allclose(evaluated, wanted[0], rtol=0, atol=tolerance * largest)
    for name, wanted_gradient in (*wanted[1].items(), ("x", wanted[2])):
        gradient = got[2] if name == "x" else got[1][name]
        assert np.any(wanted_gradient != 0), f"{name}: the reference says nothing"
        atol = tolerance * np.abs(wanted_gradient).max()
        if np.size(gradient) == 1:
            atol *= 3  # A step's is a sum of many terms that cancel, in another order.
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=0, atol=atol, err_msg=name)
    return got


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_has_values_and_gradients_of_the_float_one_on_quantized_operands(name):
    check(conv_case(name, METHODS["uniq2"]))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_values_and_gradients_of_the_float_layer(name):
    check(linear_case(METHODS[name]))
    if name != "uniq2":
        check(conv_case("strided", METHODS[name]))


# Class, arguments, options, input shape, and the kernel's axes that the output has.
GENERAL = {
    "heads": (nnx.LinearGeneral, (7, (2, 3)), {}, (3, 5, 7), (-2, -1)),
    "merged-heads": (nnx.LinearGeneral, ((2, 3), 5), {"axis": (-2, -1)}, (4, 2, 3), (-1,)),
    "outer-axes": (nnx.LinearGeneral, ((4, 3), (2, 5)), {"axis": (0, -1)}, (4, 2, 3), (-2, -1)),
    "batch": (nnx.LinearGeneral, (7, (2, 3)), {"batch_axis": {0: 4}}, (4, 5, 7), (-4, -2, -1)),
    "einsum": (nnx.Einsum, ("nta, hab -> nthb", (2, 7, 3), (2, 3)), {}, (3, 5, 7), (-3, -1)),
    "einsum-moved": (nnx.Einsum, ("...a,abc->c...b", (7, 2, 3)), {}, (3, 5, 7), (-2, -1)),
    "einsum-batch": (nnx.Einsum, ("bta,bac->btc", (3, 7, 4), (3, 4)), {}, (3, 5, 7), (-3, -1)),
    "einsum-alone": (nnx.Einsum, ("ta,ab->t", (7, 4)), {}, (5, 7), ()),
}
GENERAL_METHODS = {
    "channel": (UniqWeight(2, "channel"), UniqActivation(2, signed=True)),
    "layer": (LsqWeight(3), LsqActivation(3)),
    "n2uq2": METHODS["n2uq2"],
    "digits": (UniqWeight(8, "channel"), UniqActivation(8)),
}


def general_case(name, methods, **more):
    kind, arguments, options, shape, channel_axes = GENERAL[name]
    return Case(kind, arguments, {**options, **more}, methods, shape, channel_axes=channel_axes)


@pytest.mark.parametrize("name", GENERAL)
def test_layers_with_several_axes_have_values_and_gradients_of_the_float_ones(name):
    case = general_case(name, GENERAL_METHODS["channel"])
    check(case)
    _, layer = case.build()
    kept = {axis % layer.kernel.ndim for axis in case.channel_axes}
    assert layer.weight_quantizer.step.shape == tuple(
        size if axis in kept else 1 for axis, size in enumerate(layer.kernel.shape)
    )
    # Each channel's first step is that of its weights alone.
    kernel = np.moveaxis(np.asarray(layer.kernel[...]), sorted(kept), range(-len(kept), 0))
    stds = kernel.reshape(-1, layer.weight_quantizer.step.size).std(axis=0, ddof=1)
    steps = np.asarray(layer.weight_quantizer.step[...]).ravel()
    np.testing.assert_allclose(steps / stds, steps[0] / stds[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "methods"), [("batch", "n2uq2"), ("einsum-moved", "layer"), ("einsum-moved", "digits")]
)
def test_layers_with_several_axes_take_every_method(name, methods):
    check(general_case(name, GENERAL_METHODS[methods]))


@pytest.mark.parametrize("name", ["heads", "batch", "einsum-moved"])
@pytest.mark.parametrize("methods", ["channel", "n2uq2"])
def test_codes_of_kernels_with_several_axes_decode_to_the_quantized_kernel(name, methods):
    _, layer = general_case(name, GENERAL_METHODS[methods]).build()

    @jax.jit
    def run(layer):
        quantizer, kernel = layer.weight_quantizer, layer.kernel[...]
        return quantizer.encode(kernel), quantizer(kernel)

    encoded, wanted = run(layer)
    assert encoded.codes.shape == layer.kernel.shape
    np.testing.assert_array_equal(decode(encoded), wanted)


@pytest.mark.parametrize("name", ["heads", "einsum"])
@pytest.mark.parametrize(
    "options",
    [{"dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}],
)
def test_layers_with_several_axes_keep_the_dtype(name, options):
    case = general_case(name, GENERAL_METHODS["channel"], **options)

    def run(x):
        plain, layer = case.build()
        trained = layer(x)
        layer.eval()
        return plain(x), trained, layer(x)

    wanted, trained, evaluated = jax.eval_shape(run, case.x)
    assert wanted == trained == evaluated


@pytest.mark.parametrize(
    ("equation", "shape", "message"),
    [
        ("ab,...b->a...", (4, 3), "name each of the kernel's axes"),
        ("ab,bb->a", (3, 3), "name each of the kernel's axes"),
        ("abz,bc->ac", (3, 4), "keep the input's axes .* 'z'"),
        ("...b,bc->c", (3, 4), "keep the input's axes"),
        ("bc,bc->bc", (3, 4), "sum over an axis of the kernel"),
    ],
)
def test_equations_that_do_not_say_what_an_output_sums_are_errors(equation, shape, message):
    with pytest.raises(ValueError, match=rf"^einsum_str \(='{equation[:2]}.*must {message}"):
        QuantEinsum(equation, shape, weight=UniqWeight(2), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_another_equation_in_the_call_keeps_the_kernels_axes(mode):
    case = general_case("einsum", GENERAL_METHODS["channel"])
    _, layer = case.build()
    getattr(layer, mode)()
    other = layer(case.x, "nta,hab->tnhb")
    np.testing.assert_allclose(other, layer(case.x).transpose(1, 0, 2, 3), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="must keep the same axes of the kernel as 'nta,hab"):
        layer(case.x, "nta,hab->ntb")


STACKED = {
    "conv": (lambda **o: nnx.Conv(4, 6, (3, 3), **o), (2, 5, 5, 4), UniqWeight(2, "channel")),
    "linear": (lambda **o: nnx.Linear(4, 6, **o), (5, 4), LsqWeight(2)),
    "general": (lambda **o: nnx.LinearGeneral(4, (2, 3), **o), (5, 4), N2uqWeight(2)),
    "einsum": (
        lambda **o: nnx.Einsum("ta,hab->htb", (2, 4, 3), **o),
        (5, 4),
        UniqWeight(2, "channel"),
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers_are_the_layers_one_by_one(name):
    """Initial values, calibration, training values, evaluation and codes."""
    make, shape, weight = STACKED[name]
    float_layer = make(kernel_init=numbers, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(float_layer)

    def quantized(factor):
        layer = nnx.merge(graphdef, jax.tree.map(lambda a: np.asarray(a) * factor(a), state))
        kind = QUANTIZED[type(layer)]
        return kind.from_float(layer, weight=weight, activation=N2uqActivation(2))

    factors = np.float32([1, 3, 0.5])
    together = quantized(lambda a: factors.reshape(-1, *(1,) * a.ndim))
    singles = [quantized(lambda a, factor=factor: factor) for factor in factors]
    x = np.random.default_rng(0).normal(0.5, 1, size=(3, *shape)).astype(np.float32)
    x = jnp.asarray(x * factors.reshape(-1, *(1,) * len(shape)))

    mapped = nnx.vmap(lambda layer, x: layer(x))
    encode = jax.jit(lambda layer: layer.weight_quantizer.encode(layer.kernel[...]).codes)
    runs = nnx.jit(mapped), nnx.jit(lambda layer, x: layer(x))
    calibrate(together, [x, x / 2], apply=mapped)
    for i, single in enumerate(singles):
        calibrate(single, [x[i], x[i] / 2])
        wanted, found = state_dict(single), state_dict(together)
        assert wanted.keys() == found.keys()
        for path in wanted:
            np.testing.assert_allclose(found[path][i], wanted[path], rtol=1e-6, err_msg=path)
        np.testing.assert_array_equal(encode(together)[i], encode(single))
    for mode in ("train", "eval"):
        getattr(together, mode)()
        values = runs[0](together, x)
        for i, single in enumerate(singles):
            getattr(single, mode)()
            np.testing.assert_allclose(values[i], runs[1](single, x[i]), rtol=0, atol=1e-5)


def test_a_kernel_of_another_shape_names_the_shape_it_must_have():
    layer = nnx.Linear(4, 6, kernel_init=numbers, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.ones((4, 3, 6)))
    with pytest.raises(ValueError, match=r"shape \(4, 3, 6\) must have shape \(4, 6\).*first axis"):
        QuantLinear.from_float(layer, weight=UniqWeight(2))


def test_from_float_and_back_is_the_layer():
    """Attributes that a user has added included, and the padding that is done elsewhere."""
    layer = nnx.Conv(4, 6, (3,), padding="CAUSAL", kernel_init=numbers, rngs=nnx.Rngs(0))
    layer.remark = "mine"
    quantized = QuantConv.from_float(layer, weight=UniqWeight(2), activation=UniqActivation(2))
    assert quantized.remark == layer.remark
    assert quantized.kernel is layer.kernel
    back = quantized.to_float()
    assert type(back) is nnx.Conv
    assert vars(back).keys() == vars(layer).keys()
    assert all(vars(back)[name] is vars(layer)[name] for name in ("kernel", "bias", "padding"))
    assert nnx.graphdef(back) == nnx.graphdef(layer)
    built = QuantConv(4, 6, (3,), padding="CAUSAL", kernel_init=numbers, rngs=nnx.Rngs(0))
    del layer.remark
    assert nnx.graphdef(built.to_float()) == nnx.graphdef(layer)


@pytest.mark.parametrize("name", ["uniq2", "n2uq2"])
def test_float64(name):
    with jax.enable_x64(True):
        for make in (linear_case, functools.partial(conv_case, "groups")):
            case = make(METHODS[name], param_dtype=jnp.float64, dtype=jnp.float64)
            _, gradients, _ = check(case, tolerance=1e-14)
            assert all(gradient.dtype == jnp.float64 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("options", "input_dtype"),
    [
        ({"dtype": jnp.bfloat16}, jnp.float32),
        ({"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}, jnp.bfloat16),
        ({"param_dtype": jnp.bfloat16}, jnp.bfloat16),
        ({}, jnp.bfloat16),
        ({"dtype": jnp.float16}, jnp.float32),
        ({"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}, jnp.float32),
    ],
)
def test_narrow_dtypes(options, input_dtype):
    """The output's dtype is the float layer's, in both modes; steps stay wide."""
    methods = METHODS["uniq2"]
    shape, features, kernel_size, _ = CONVOLUTIONS["same"]
    for case in (
        Case(nnx.Conv, (4, features, kernel_size), options, methods, shape, input_dtype),
        Case(nnx.Linear, (7, 5), options, methods, (3, 7), input_dtype),
    ):

        @jax.jit
        def run(x, case=case):
            plain, layer = case.build()
            steps = layer.weight_quantizer.step[...], layer.activation_quantizer.step[...]
            trained = layer(x)
            layer.eval()
            return plain(x), trained, layer(x), steps

        wanted, trained, evaluated, steps = run(case.x)
        assert [step.dtype for step in steps] == [jnp.float32] * 2
        assert trained.dtype == evaluated.dtype == wanted.dtype
        trained, evaluated = np.asarray(trained, np.float64), np.asarray(evaluated, np.float64)
        np.testing.assert_allclose(evaluated, trained, rtol=0, atol=0.03 * np.abs(trained).max())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_kernel_is_quantized_before_it_is_narrowed(mode):
    """Just above a threshold, which bfloat16 would round it to."""
    layer = QuantLinear(
        4,
        1,
        dtype=jnp.bfloat16,
        kernel_init=nnx.initializers.constant(1 + 2**-12),
        weight=UniqWeight(2),
        activation=UniqActivation(2),
        rngs=nnx.Rngs(0),
    )
    layer.weight_quantizer.step[...] = jnp.float32(1)
    layer.activation_quantizer.step[...] = jnp.float32(1)
    getattr(layer, mode)()
    assert layer(jnp.ones((1, 4))) == 4 * 1.5


def test_evaluation_in_bfloat16_rounds_the_exact_sum_once():
    """Also where the sum is asked for in bfloat16, in which it would not be exact."""
    layer = QuantLinear(
        512,
        32,
        use_bias=False,
        dtype=jnp.bfloat16,
        preferred_element_type=jnp.bfloat16,
        kernel_init=numbers,
        weight=UniqWeight(4),
        activation=UniqActivation(4),
        rngs=nnx.Rngs(0),
    )
    layer.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 512)), jnp.bfloat16)
    inputs = layer.activation_quantizer.encode(x)
    kernel = layer.weight_quantizer.encode(layer.kernel[...])
    sums = np.int64(inputs.codes) @ (2 * np.int64(kernel.codes) - 15)
    assert np.abs(sums).max() > 2**8
    scale = np.float32(inputs.scale) * np.float32(kernel.scale / 2)
    np.testing.assert_array_equal(layer(x), (np.float32(sums) * scale).astype(jnp.bfloat16))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_without_methods_it_is_the_float_layer_bit_for_bit(mode, dtype):
    for case in (
        conv_case("strided", (None, None)),
        conv_case("circular", (None, None)),
        linear_case((None, None)),
    ):
        plain, layer = dataclasses.replace(case, options={**case.options, "dtype": dtype}).build()
        getattr(layer, mode)()
        np.testing.assert_array_equal(layer(case.x), plain(case.x))
        assert state_dict(layer).keys() == state_dict(plain).keys() == {"kernel", "bias"}


def test_a_mask_holds_where_the_kernel_is_float():
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 3, 4, 6)), jnp.float32)
    check(conv_case("same", (None, UniqActivation(2)), mask=mask))
    with pytest.raises(ValueError, match="mask must be None"):
        conv_case("same", METHODS["uniq2"], mask=mask).build()


@pytest.mark.parametrize("name", ["1d", "causal"])
def test_zero_padding_is_zero_on_grids_where_zero_is_no_level_or_another_code(name):
    """Zeros that were quantized would count as half a step (signed) or a code (this N2UQ)."""
    for activation in (UniqActivation(2, signed=True), N2uqActivation(2)):
        plain, layer = conv_case(name, (UniqWeight(2), activation)).build()
        if isinstance(activation, N2uqActivation):
            layer.activation_quantizer.start[...] = jnp.float32(-0.6)
        x = conv_case(name, ()).x
        quantized = activation.quantize(x, layer.activation_quantizer.parameters)
        zero = activation.quantize(jnp.zeros(()), layer.activation_quantizer.parameters)
        assert zero != 0
        left, right = (4, 0) if name == "causal" else (1, 1)
        padded = np.pad(quantized, [(0, 0), (left, right), (0, 0)])
        plain.padding = "VALID"
        plain.kernel[...] = layer.weight_quantizer(layer.kernel[...])
        expected = plain(jnp.asarray(padded))
        np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-6)
        layer.eval()
        np.testing.assert_allclose(layer(x), expected, rtol=0, atol=4e-6)


def test_causal_padding_looks_back_only_and_is_for_one_axis():
    case = conv_case("causal", METHODS["uniq2"])
    _, layer = case.build()
    late = layer(case.x.at[:, 5:].set(9.0))
    np.testing.assert_array_equal(layer(case.x)[:, :5], late[:, :5])
    assert np.any(layer(case.x)[:, 5:] != late[:, 5:])
    layer = QuantConv(4, 6, (3, 3), padding="CAUSAL", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="1D"):
        layer(jnp.ones((1, 5, 5, 4)))


def test_errors_name_the_argument():
    rngs = nnx.Rngs(0)
    with pytest.raises(TypeError, match=r"^weight \(=UniqActivation.*UniqWeight"):
        QuantLinear(3, 4, weight=UniqActivation(2), rngs=rngs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^activation \(=2\) must be None or.*UniqActivation"):
        QuantConv(3, 4, (3, 3), activation=2, rngs=rngs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^conv_general_dilated .* must be left out: QuantConv"):
        QuantConv(3, 4, (3, 3), conv_general_dilated=lambda *a, **k: a[0], rngs=rngs)
    with pytest.raises(TypeError, match=r"^dot_general .* must be left out: QuantLinear"):
        QuantLinear(3, 4, dot_general=lambda *a, **k: a[0], rngs=rngs)
    with pytest.raises(TypeError, match=r"^promote_dtype .* must be left out"):
        QuantLinear(3, 4, promote_dtype=lambda a, **k: a, rngs=rngs)
    with pytest.raises(ValueError, match="bits"):
        QuantLinear(3, 4, weight=UniqWeight(9), rngs=rngs)
    with pytest.raises(ValueError, match="granularity"):
        UniqWeight(2, "kernel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="granularity"):
        LsqWeight(2, "kernel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient"):
        N2uqWeight(2, "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient"):
        PactActivation(2, "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 to 5"):
        N2uqActivation(6)
    with pytest.raises(TypeError, match="bits"):
        UniqActivation(2.0)  # type: ignore[arg-type]
