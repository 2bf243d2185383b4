"""Evaluation on integer levels: equal to int64 arithmetic, bit for bit, wherever it is compiled."""

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
    levels,
)
from uniq_jax.quantizers import Grid

# Powers of two, so that a scale moves no bit of a sum.
WEIGHT_STEP, ACTIVATION_STEP = 2.0**-8, 2.0**-5

PAIRS = {
    "uniq1": (UniqWeight(1), UniqActivation(1)),
    "uniq2": (UniqWeight(2), UniqActivation(2)),
    "uniq2-signed": (UniqWeight(2), UniqActivation(2, signed=True)),
    "uniq-mixed": (UniqWeight(3), UniqActivation(5)),
    "uniq8": (UniqWeight(8), UniqActivation(8)),
    "uniq8-signed": (UniqWeight(8), UniqActivation(8, signed=True)),
    "lsq8": (LsqWeight(8), LsqActivation(8)),
    "lsq8-signed": (LsqWeight(8), LsqActivation(8, signed=True)),
    "lsq8-uniq8": (LsqWeight(8), UniqActivation(8, signed=True)),
    "lsq2": (LsqWeight(2), LsqActivation(2, signed=True)),
}


def numbers(key, shape, dtype):
    """An initializer that compiles nothing."""
    del key
    values = np.random.default_rng(sum(shape)).normal(0, 0.5, size=shape)
    return jnp.asarray(values.astype(np.float32), dtype)


def integer_levels(x, step, grid):
    """Levels in int64 from float64, doubled where they are halves; and their scale."""
    codes = np.clip(np.round(np.asarray(x, np.float64) / step + grid.offset), 0, grid.max_code)
    factor = 2 if grid.has_half_levels else 1
    return np.int64(factor * (codes - grid.offset)), step / factor


def int64_convolution(x, kernel, stride, padding, groups):
    """(N, H, W, C) with (h, w, C / groups, O): plain windows and products."""
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    windows = windows[:, ::stride, ::stride]
    inputs = np.split(windows, groups, axis=3)
    kernels = np.split(kernel, groups, axis=3)
    sums = [np.einsum("nyxcij,ijco->nyxo", a, b) for a, b in zip(inputs, kernels)]
    return np.concatenate(sums, axis=-1)


def set_steps(layer):
    layer.weight_quantizer.step[...] = jnp.full_like(layer.weight_quantizer.step[...], WEIGHT_STEP)
    layer.activation_quantizer.step[...] = jnp.float32(ACTIVATION_STEP)


def evaluated(layer):
    layer.eval()
    return layer


def spread(shape, seed, size):
    """Numbers over the whole grid and beyond; a positive mean makes the sums large."""
    return np.random.default_rng(seed).normal(size, size, size=shape).astype(np.float32)


def expected_product(layer, x, multiply):
    grids = layer.activation_quantizer.method.grid, layer.weight_quantizer.method.grid
    inputs, input_scale = integer_levels(x, ACTIVATION_STEP, grids[0])
    kernel, kernel_scale = integer_levels(layer.kernel[...], WEIGHT_STEP, grids[1])
    sums = multiply(inputs, kernel)
    return sums, np.float32(sums) * np.float32(input_scale * kernel_scale)


@pytest.mark.parametrize("name", PAIRS)
def test_convolution_sums_are_int64_sums(name):
    weight, activation = PAIRS[name]
    for channels, stride, padding, groups in ((4, 1, 1, 1), (96, 2, 1, 2)):
        layer = evaluated(
            QuantConv(
                channels,
                8,
                (3, 3),
                strides=stride,
                padding=[(padding, padding + 1)] * 2,
                feature_group_count=groups,
                use_bias=False,
                kernel_init=numbers,
                weight=weight,
                activation=activation,
                rngs=nnx.Rngs(0),
            )
        )
        set_steps(layer)
        layer.kernel[...] = spread(layer.kernel.shape, 1, WEIGHT_STEP * 2**weight.bits / 3)
        x = spread((2, 6, 5, channels), 2, ACTIVATION_STEP * 2**activation.bits / 2)
        _, expected = expected_product(
            layer,
            x,
            lambda a, b, s=stride, p=padding, g=groups: int64_convolution(
                a, b, s, [(p, p + 1)] * 2, g
            ),
        )
        np.testing.assert_array_equal(jax.jit(lambda x, f=layer: f(x))(x), expected)


@pytest.mark.parametrize("name", PAIRS)
def test_linear_sums_are_int64_sums_however_many(name):
    """8 bits and 5000 inputs: beyond 2**24, where float32 alone would be wrong (checked)."""
    weight, activation = PAIRS[name]
    layer = evaluated(
        QuantLinear(
            5000,
            16,
            use_bias=False,
            kernel_init=numbers,
            weight=weight,
            activation=activation,
            rngs=nnx.Rngs(0),
        )
    )
    set_steps(layer)
    layer.kernel[...] = spread((5000, 16), 1, WEIGHT_STEP * 2**weight.bits / 3)
    x = spread((16, 5000), 2, ACTIVATION_STEP * 2**activation.bits / 2)
    sums, expected = expected_product(layer, x, np.matmul)
    np.testing.assert_array_equal(jax.jit(lambda x, f=layer: f(x))(x), expected)
    if weight.bits == activation.bits == 8:
        assert np.abs(sums).max() > 2**24
        inputs, _ = integer_levels(x, ACTIVATION_STEP, activation.grid)
        kernel, _ = integer_levels(layer.kernel[...], WEIGHT_STEP, weight.grid)
        naive = jnp.float32(inputs) @ jnp.float32(kernel)
        assert np.any(np.asarray(naive) != np.float32(sums))


def test_the_extremes_of_the_accumulator():
    """All levels the largest or smallest, as many as the check lets pass."""
    for weight, activation in (
        (LsqWeight(8), LsqActivation(8)),
        (UniqWeight(8), UniqActivation(8)),
        (UniqWeight(8), UniqActivation(8, signed=True)),
    ):
        bound = levels.largest_level(weight.grid) * levels.largest_level(activation.grid)
        taps = min((2**31 - 1) // bound, 65535)
        layer = evaluated(
            QuantLinear(
                taps,
                2,
                use_bias=False,
                kernel_init=numbers,
                weight=weight,
                activation=activation,
                rngs=nnx.Rngs(0),
            )
        )
        set_steps(layer)
        layer.kernel[...] = jnp.tile(jnp.array([1e6, -1e6], jnp.float32), (taps, 1))
        for x in (np.full((1, taps), 1e6, np.float32), np.full((1, taps), -1e6, np.float32)):
            _, expected = expected_product(layer, x, np.matmul)
            np.testing.assert_array_equal(jax.jit(lambda x, f=layer: f(x))(x), expected)


def test_check_accumulator():
    eight = Grid.unsigned(8)
    levels.check_accumulator(eight, Grid.symmetric(8), (2**31 - 1) // 255**2)
    with pytest.raises(ValueError, match=r"33026 products of 8-bit activations.*beyond an int32"):
        levels.check_accumulator(eight, Grid.symmetric(8), (2**31 - 1) // 255**2 + 1)
    with pytest.raises(ValueError, match="8-bit activations with 8-bit weights"):
        QuantLinear(33026, 1, weight=UniqWeight(8), activation=UniqActivation(8), rngs=nnx.Rngs(0))
    # Codes of one bit need no digits, whatever their number; those of eight do.
    levels.check_accumulator(Grid.unsigned(1), Grid.symmetric(1), 2**24 - 1)
    levels.check_accumulator(eight, Grid.symmetric(1), 65535)
    with pytest.raises(ValueError, match="at most 65535 products are exact"):
        levels.check_accumulator(eight, Grid.symmetric(1), 65795)


def test_digits_are_exact_up_to_their_bound():
    """8-bit inputs with binary weights, whose digits −1 and 15 are larger than they are."""
    taps = 65535
    layer = evaluated(
        QuantLinear(
            taps,
            1,
            use_bias=False,
            kernel_init=numbers,
            weight=UniqWeight(1),
            activation=UniqActivation(8, signed=True),
            rngs=nnx.Rngs(0),
        )
    )
    set_steps(layer)
    layer.kernel[...] = jnp.full((taps, 1), -1.0)
    x = np.where(np.random.default_rng(0).uniform(size=(4, taps)) < 0.01, -9, 9).astype(np.float32)
    _, expected = expected_product(layer, x, np.matmul)
    np.testing.assert_array_equal(jax.jit(lambda x, f=layer: f(x))(x), expected)


@pytest.mark.parametrize(
    ("grid", "largest"),
    [
        (Grid.unsigned(2), 3),
        (Grid.symmetric(2), 3),
        (Grid.symmetric(1), 1),
        (Grid.twos_complement(2), 2),
        (Grid.unsigned(8), 255),
        (Grid.symmetric(8), 255),
        (Grid.twos_complement(8), 128),
    ],
)
def test_largest_level(grid, largest):
    assert levels.largest_level(grid) == largest


ALL = {
    **PAIRS,
    "uniq4-channel": (UniqWeight(4, "channel"), UniqActivation(4)),
    "lsq4-channel": (LsqWeight(4, "channel"), LsqActivation(4)),
    "n2uq2": (N2uqWeight(2), N2uqActivation(2)),
    "n2uq8-5": (N2uqWeight(8), N2uqActivation(5)),
    "pact4": (N2uqWeight(4), PactActivation(4)),
}


def conv_layer(methods):
    """In evaluation mode; an input for it."""
    layer = QuantConv(
        32,
        12,
        (3, 3),
        weight=methods[0],
        activation=methods[1],
        kernel_init=numbers,
        bias_init=numbers,
        rngs=nnx.Rngs(1),
    )
    layer.eval()
    return layer, jnp.asarray(np.random.default_rng(3).normal(size=(4, 7, 7, 32)), jnp.float32)


@pytest.mark.parametrize("name", ALL)
def test_evaluation_has_the_same_bits_everywhere_and_is_training_but_for_rounding(name):
    """Jitted, in a larger function whose sums follow it, image by image, and (some) eagerly."""
    layer, x = conv_layer(ALL[name])
    graphdef, state = nnx.split(layer)
    shortcut = jnp.asarray(np.random.default_rng(4).normal(size=(4, 7, 7, 12)), jnp.float32)

    @jax.jit
    def larger(state, x):
        layer = nnx.merge(graphdef, state)
        y = layer(jnp.negative(-x)) + shortcut
        one_by_one = jnp.concatenate([layer(x[:1]), layer(x[1:])])
        layer.bias, layer.use_bias = None, False
        return y, jnp.tanh(y), one_by_one, layer(x) + shortcut, layer(x)

    alone = np.asarray(jax.jit(lambda x: layer(x))(x))
    with_shortcut, _, one_by_one, unbiased_with_shortcut, unbiased = larger(state, x)
    np.testing.assert_array_equal(one_by_one, alone)
    # NumPy fuses nothing: the scale is rounded before the bias and the shortcut are added.
    np.testing.assert_array_equal(with_shortcut, alone + np.asarray(shortcut))
    np.testing.assert_array_equal(unbiased_with_shortcut, unbiased + np.asarray(shortcut))
    np.testing.assert_array_equal(alone, unbiased + np.asarray(layer.bias[...]))
    if name in ("uniq2", "uniq8", "n2uq2"):
        np.testing.assert_array_equal(layer(x), alone)
    layer.train()
    trained = np.asarray(jax.jit(lambda x: layer(x))(x))
    np.testing.assert_allclose(alone, trained, rtol=0, atol=4e-6 * np.abs(trained).max())


@pytest.mark.parametrize("name", ["uniq2", "uniq8", "uniq8-signed", "n2uq2", "pact4", "lsq8"])
def test_nan_reaches_exactly_the_outputs_that_see_it(name):
    layer, x = conv_layer(ALL[name])
    run = jax.jit(lambda x: layer(x))
    clean = np.asarray(run(x))
    dirty = np.asarray(run(x.at[1, 2, 3, 5].set(jnp.nan)))
    seen = np.zeros(clean.shape, bool)
    seen[1, 1:4, 2:5] = True
    np.testing.assert_array_equal(np.isnan(dirty), seen)
    np.testing.assert_array_equal(dirty[~seen], clean[~seen])
    assert np.all(np.isfinite(run(x.at[0, 0, 0].set(jnp.inf))))


@pytest.mark.parametrize("name", ["uniq2", "uniq8"])
def test_a_step_that_is_none_makes_nan_and_a_negative_one_counts_as_its_magnitude(name):
    layer, x = conv_layer(ALL[name])
    graphdef, state = nnx.split(layer)

    @jax.jit
    def run(state, steps):
        layer = nnx.merge(graphdef, state)
        layer.weight_quantizer.step[...], layer.activation_quantizer.step[...] = steps
        values = layer(x)
        layer.train()
        return values, layer(x)

    good = layer.weight_quantizer.step[...], layer.activation_quantizer.step[...]
    wanted = run(state, good)
    assert np.all(np.isfinite(wanted))
    np.testing.assert_array_equal(run(state, (-good[0], -good[1])), wanted)
    for bad in (np.nan, np.inf):
        for steps in ((bad, good[1]), (good[0], bad)):
            assert np.all(np.isnan(run(state, steps)))


MIXTURES = {
    "uniq-n2uq": (UniqWeight(2), N2uqActivation(2)),
    "lsq-pact": (LsqWeight(2), PactActivation(2)),
    "n2uq": (N2uqWeight(2), N2uqActivation(2)),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_scale_of_sums_is_the_same_in_one_program_as_in_several(name):
    """Both have constant factors, which XLA would gather in one product."""
    methods = MIXTURES[name]
    layer, x = conv_layer(methods)
    rng = np.random.default_rng(4)

    def scale_of(method, x, parameters):
        return levels.integer_levels(method.encode(x, parameters, x.dtype), method.grid)[1]

    def both(x, kernel, activation, weight):
        scales = scale_of(methods[1], x, activation), scale_of(methods[0], kernel, weight)
        return levels.joint_scale(*scales)

    alone, together = jax.jit(scale_of, static_argnums=0), jax.jit(both)
    parameters = layer.activation_quantizer.parameters, layer.weight_quantizer.parameters
    kernel = jnp.asarray(rng.normal(size=(9 * 32, 12)), jnp.float32)
    for _ in range(40):
        activation, weight = jax.tree.map(lambda v: v * np.float32(rng.uniform(0.5, 2)), parameters)
        scales = alone(methods[1], x, activation), alone(methods[0], kernel, weight)
        wanted = np.asarray(scales[0]) * np.asarray(scales[1])
        np.testing.assert_array_equal(together(x, kernel, activation, weight), wanted)
