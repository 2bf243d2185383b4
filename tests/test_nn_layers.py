"""Quantized layers against `nnx.Conv` and `nnx.Linear` on quantized operands."""

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
    QuantLinear,
    UniqActivation,
    UniqWeight,
)

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

    def build(self):
        options = {"kernel_init": numbers, "bias_init": numbers, **self.options}
        plain = self.plain_class(*self.arguments, **options, rngs=nnx.Rngs(3))
        weight, activation = self.methods
        quant_class = {nnx.Conv: QuantConv, nnx.Linear: QuantLinear}[self.plain_class]
        layer = quant_class(
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


def reference(plain, methods, arrays, x):
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
        kernel = weight.quantize(kernel, of_quantizer(arrays, "weight"))
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
            lambda arrays, x: reference(plain, case.methods, arrays, x), arrays, x
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
