"""Products of bits, against the same products of integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import uniq_jax
from uniq_jax import models
from uniq_jax.deploy import popcount

CONV = ("NHWC", "HWIO", "NHWC")


def operands(x_shape, kernel_shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2, x_shape).astype(np.int8)
    return x, (2 * rng.integers(0, 2, kernel_shape) - 1).astype(np.int8)


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 96])
def test_packed_bits_are_numpys(channels):
    x, _ = operands((3, 5, channels), (1,))
    bytes_ = np.packbits(np.pad(x, ((0, 0), (0, 0), (0, -channels % 32))), -1, bitorder="little")
    np.testing.assert_array_equal(popcount.pack(jnp.asarray(x)), bytes_.view("<u4"))


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "strides", "padding", "dilation"),
    [
        (8, 32, 3, (1, 1), ((1, 1), (1, 1)), (1, 1)),
        (9, 40, 3, (2, 1), ((1, 1), (0, 2)), (1, 1)),
        (7, 3, 1, (2, 2), ((0, 0), (0, 0)), (1, 1)),
        (11, 70, 3, (1, 2), ((2, 2), (2, 1)), (2, 3)),
        (5, 700, 3, (1, 1), ((1, 1), (1, 1)), (1, 1)),  # More terms than are written out at once.
    ],
)
def test_convolutions_are_exact(size, channels, kernel, strides, padding, dilation):
    x, w = operands((2, size, size, channels), (kernel, kernel, channels, 5))
    wanted = lax.conv_general_dilated(
        x.astype(np.float32),
        w.astype(np.float32),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=CONV,
    )
    found = popcount.convolve(jnp.asarray(x), jnp.asarray(w), strides, padding, dilation)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, wanted)


def test_matrix_products_are_exact_and_kernels_may_be_arguments():
    x, w = operands((4, 77), (77, 9))
    found = jax.jit(popcount.multiply)(x, w)
    np.testing.assert_array_equal(found, x.astype(int) @ w)


def test_binary_layers_of_a_frozen_network_count_bits():
    model = models.create(
        "resnet8",
        num_classes=5,
        rngs=nnx.Rngs(0),
        method="uniq",
        weight_bits=1,
        activation_bits=1,
        width=4,
    )
    frozen = uniq_jax.freeze(model, (8, 8, 3))
    program = str(jax.make_jaxpr(frozen)(jnp.zeros((1, 8, 8, 3))))
    assert program.count("population_count") >= 6 * 9
