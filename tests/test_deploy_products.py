"""Integer products of int8 operands, against float32 products of the levels they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from uniq_jax.deploy import integers, products
from uniq_jax.deploy.graph import Node

NHWC = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC"))
NCHW = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NCHW", "HWIO", "NCHW"))
ACTIVATIONS = [(1, 0.0), (2, 0.0), (8, 0.0), (8, 127.5)]
WEIGHTS = [(1, 0.5), (3, 3.5), (8, 127.5), (8, 128.0)]


def check(node, x_shape, kernel_shape):
    rng = np.random.default_rng(0)
    operands, levels = [], []
    for name, shape in (("activation", x_shape), ("weight", kernel_shape)):
        form = integers.form(*node[name])
        codes = rng.integers(0, 2 ** node[name][0], shape).astype(np.int16)
        operands.append(jnp.asarray(integers.operand(codes, form)))
        levels.append(integers.levels_of(operands[-1], form))
    wanted = products.multiply(node, *levels)
    for found in (
        products.integer_product(node, *operands),
        jax.jit(lambda x: products.integer_product(node, x, operands[1]))(operands[0]),
        jax.jit(lambda *both: products.integer_product(node, *both))(*operands),
    ):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, wanted)


def convolution(activation, weight, numbers=NHWC, groups=1, dilation=(1, 1)):
    attributes = {
        "activation": activation,
        "weight": weight,
        "window_strides": (2, 1),
        "padding": ((1, 1), (2, 0)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": dilation,
        "dimension_numbers": tuple(numbers),
        "feature_group_count": groups,
        "batch_group_count": 1,
    }
    return Node("y", "integer_product", ("x", "kernel"), tuple(attributes.items()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_convolutions_with_padding(activation, weight):
    check(convolution(activation, weight), (2, 5, 6, 3), (3, 3, 3, 4))


@pytest.mark.parametrize("activation", [(2, 0.0), (8, 0.0), (8, 127.5)])
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(4, 4, 4), (4, 8, 4), (6, 4, 2)])
def test_grouped_convolutions(activation, channels, outputs, groups):
    node = convolution(activation, (8, 127.5), groups=groups, dilation=(1, 2))
    check(node, (2, 6, 7, channels), (3, 3, channels // groups, outputs))


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(4, 8, 4), (6, 4, 2), (24, 5, 1)])
def test_products_of_windows_are_convolutions(channels, outputs, groups):
    """Which is what they stand in for on GPUs."""
    node = convolution((8, 0.0), (8, 127.5), groups=groups, dilation=(1, 2))
    rng = np.random.default_rng(0)
    shapes = (2, 6, 7, channels), (3, 3, channels // groups, outputs)
    operands = [jnp.asarray(rng.integers(-128, 128, shape), jnp.int8) for shape in shapes]
    found = products._product_of_windows(node, *operands)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, products.multiply(node, *operands, jnp.int32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_programs_for_gpus_have_no_integer_convolution(activation, groups):
    node = convolution(activation, (8, 127.5), groups=groups)
    # Large enough that a CPU convolves.
    shapes = (2, 32, 32, 64), (3, 3, 64 // groups, 8)
    operands = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]
    product = jax.jit(lambda *both: products.integer_product(node, *both)).trace(*operands)
    counts = {
        platform: product.lower(lowering_platforms=(platform,)).as_text().count("convolution(")
        for platform in ("cpu", "cuda", "rocm", "tpu")
    }
    assert counts["cuda"] == counts["rocm"] == 0
    assert min(counts["cpu"], counts["tpu"]) > 0


def test_other_layouts():
    check(convolution((8, 0.0), (8, 127.5), NCHW), (2, 3, 5, 6), (3, 3, 3, 4))
    check(convolution((1, 0.0), (1, 0.5), NCHW), (2, 3, 5, 6), (3, 3, 3, 4))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("inputs", [((1,), (0,)), ((1,), (1,))])
def test_matrix_products(activation, weight, inputs):
    attributes = {"activation": activation, "weight": weight}
    attributes["dimension_numbers"] = (inputs, ((), ()))
    node = Node("y", "integer_product", ("x", "kernel"), tuple(attributes.items()))
    check(node, (3, 7), (7, 5) if inputs[1] == (0,) else (5, 7))
