"""Every quantizer of the table has every property: values, codes, gradients, layouts, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantizers_table import (
    DISTINCT,
    ROWS,
    SHAPE,
    SIZE,
    TWINS,
    cases,
    expected_codes,
    near_thresholds,
)

from uniq_jax import quantizers as q

NARROW = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


@functools.cache
def forward(row, bits):
    """(value, codes as uint8, codes in floating point, decoded from the former).

    Two programs, lest the compiler computes what is to be compared only once.
    """

    @jax.jit
    def codes(x, *learned):
        encoded = row.encode(x, *learned, bits=bits)
        floating = row.encode(x, *learned, bits=bits, dtype=jnp.float32).codes
        return encoded.codes, floating, q.decode(encoded, dtype=x.dtype)

    value = jax.jit(lambda x, *learned: row.value(x, *learned, bits=bits))

    def run(x, *learned):
        return tuple(map(np.asarray, (value(x, *learned), *codes(x, *learned))))

    return run


@functools.cache
def gradients(row, bits):
    def run(x, learned, cotangent):
        value, backward = jax.vjp(lambda x, *rest: row.value(x, *rest, bits=bits), x, *learned)
        return value, backward(cotangent)

    return jax.jit(run)


# A twin shares all code but a constant: one width does for it.
WIDTHS = cases(1, 2, 3, 5, 8, twins=(2,))


def setting(row, bits, *, seed=0, scale=1.0, dtype=np.float32):
    """A generator, and learned scalars in a dtype."""
    rng = np.random.default_rng([seed, bits, ROWS.index(row)])
    return rng, tuple(np.asarray(a, dtype) for a in row.learned(bits, rng, scale))


def off_kinks(row, x, learned, bits, distance):
    """1 where no kink of the surrogate is near, else 0."""
    with np.errstate(invalid="ignore"):
        return np.all(np.abs(x - row.kinks(x, learned, bits)) > distance, axis=0).astype(float)


# Against the reference, in float64


@WIDTHS
def test_equals_numpy_reference(row, bits):
    rng, learned = setting(row, bits, dtype=np.float64)
    x, cotangent = rng.normal(size=(2, *SHAPE))
    with jax.enable_x64(True):
        value, (grad_x, *grads) = gradients(row, bits)(x, learned, cotangent)
    np.testing.assert_allclose(value, row.reference(x, *learned, bits=bits), rtol=1e-12, atol=1e-14)
    expected_x, *expected = row.reference_backward(x, *learned, bits=bits, g=cotangent)
    np.testing.assert_allclose(grad_x, expected_x, rtol=1e-11, atol=1e-13)
    assert len(grads) == len(expected)
    for grad, wanted in zip(grads, expected):
        assert grad.dtype == np.float64
        np.testing.assert_allclose(grad, wanted, rtol=1e-10, atol=1e-11 * np.abs(cotangent).sum())


@WIDTHS
def test_gradients_are_the_derivatives_of_the_surrogate(row, bits):
    rng, learned = setting(row, bits, seed=1, dtype=np.float64)
    x, cotangent = rng.normal(size=(2, *SHAPE))
    cotangent = cotangent * off_kinks(row, x, learned, bits, 1e-4)
    with jax.enable_x64(True):
        _, grads = gradients(row, bits)(x, learned, cotangent)
        grad_x, *grads = map(np.asarray, grads)

    def central(index, direction, size):
        arguments = [x, *learned]
        sides = []
        for sign in (1, -1):
            arguments[index] = [x, *learned][index] + sign * size * direction
            sides.append(row.surrogate(arguments[0], arguments[1:], bits, x, learned))
        return (sides[0] - sides[1]) / (2 * size)

    size = 1e-6
    np.testing.assert_allclose(grad_x, cotangent * central(0, 1.0, size), rtol=1e-6, atol=1e-7)
    factor = row.weight(bits, SIZE)
    for i, (grad, scalar) in enumerate(zip(grads, learned)):
        for entry in np.ndindex(scalar.shape):
            if row.name == "n2uq_activation" and scalar.ndim and scalar[entry] < 1e-3:
                assert grad[entry] == 0
                continue
            direction = np.zeros(scalar.shape)
            direction[entry] = 1.0
            terms = factor * cotangent * central(i + 1, direction, size)
            np.testing.assert_allclose(
                grad[entry], terms.sum(), rtol=1e-6, atol=1e-6 * np.abs(terms).sum()
            )


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_gradients_exactly_on_the_edges(row):
    n, size = 3, 0.25
    if row.name.startswith("n2uq_activation"):
        # Segments are open below and closed above: each has a slope of its own here.
        learned = np.float32([0]), np.float32([0.25, 0.5, 1]), np.float32([1]), np.float32([1.5])
        edges, expected = [0, 0.25, 0.75, 1.75], [0, 4, 2, 1]
    elif row.name.startswith("pact"):
        learned, edges, expected = (np.float32(n * size),), [0, n * size], [0, 0]
    elif row.name.startswith("n2uq_weight"):
        # mean |w| = 3/4 has the clip at σ = n/2 · mean|w| = 9/8.
        learned, edges = (), [1.125, -1.125, 0.375, -0.375]
        expected = [0.5, 0.5, 1, 1] if row.name.endswith("clipped") else [8 / 9] * 4
    else:
        (step,) = learned = (np.float32(size),)
        offset = row.decoding(None, learned, 2, np.float32)[1]
        edges, expected = [-offset * step, (n - offset) * step], [0.5, 0.5]

    def fill(values):
        # Every channel, the last axis, holds all of them.
        return np.moveaxis(np.resize(values, (SHAPE[-1], *SHAPE[:-1])), 0, -1)

    x = fill(np.float32(edges))
    _, (grad, *_) = gradients(row, 2)(x, learned, np.ones_like(x))
    np.testing.assert_allclose(grad, fill(expected), rtol=1e-6)


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_gradient_scale_is_the_only_thing_that_its_switch_takes_off(row):
    if row.name.startswith(("pact", "n2uq")):
        assert row.weight(2, SIZE) == 1
        return
    rng, (step,) = setting(row, 2)
    x = rng.normal(size=SHAPE).astype(np.float32)

    def grad(**rest):
        return jax.grad(lambda x, s: row.value(x, s, bits=2, **rest).sum(), (0, 1))(x, step)

    (with_x, with_step), (without_x, without_step) = grad(), grad(gradient_scale=False)
    np.testing.assert_array_equal(with_x, without_x)
    np.testing.assert_allclose(with_step, without_step * row.weight(2, SIZE), rtol=1e-6)


# Codes


@cases(1, 2, 3, 5, 8)
@settings(max_examples=6)
@given(data=st.data())
def test_codes_and_values(row, bits, data):
    exponent = data.draw(st.integers(-18, 18), label="exponent")
    scale = data.draw(st.floats(0.5, 1.0, width=32), label="scale") * 2.0**exponent
    rng, learned = setting(row, bits, seed=data.draw(st.integers(0, 2**32 - 1)), scale=scale)
    x = near_thresholds(row, learned, bits, rng, scale)
    if learned:
        drawn = data.draw(st.lists(st.floats(width=32), max_size=8))
        x.ravel()[: len(drawn)] = drawn

    value, codes, codes_float, decoded = forward(row, bits)(x, *learned)

    expected = expected_codes(row, x, learned, bits)
    np.testing.assert_array_equal(codes_float, expected)
    np.testing.assert_array_equal(codes, np.where(np.isnan(expected), 0, expected))
    assert codes.dtype == np.uint8
    assert codes.max() < 2**bits
    known = ~np.isnan(x)
    np.testing.assert_array_equal(value[known], decoded[known])
    np.testing.assert_array_equal(np.isnan(value), np.isnan(x))
    factor, offset = row.decoding(x, learned, bits, np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(value, factor * (codes_float - np.float32(offset)))
    if np.size(factor) == 1:
        assert len(np.unique(value[known])) <= 2**bits
        order = np.argsort(x[known])
        assert np.all(np.diff(value[known][order]) >= 0)
    else:
        for channel in range(SHAPE[-1]):
            order = np.argsort(x[..., channel].ravel())
            ordered = value[..., channel].ravel()[order]
            assert np.all(np.diff(ordered) >= 0)
            assert len(np.unique(ordered)) <= 2**bits


@cases(1, 2, 3, 4, 5, 6, 7, 8)
def test_quantizing_twice_changes_nothing(row, bits):
    rng, learned = setting(row, bits, seed=2)
    x = near_thresholds(row, learned, bits, rng)
    once = forward(row, bits)(x, *learned)
    np.testing.assert_array_equal(once[1], expected_codes(row, x, learned, bits))
    twice = forward(row, bits)(once[0], *learned)
    if row.idempotent:
        np.testing.assert_array_equal(once[0], twice[0])
        np.testing.assert_array_equal(once[1], twice[1])
    elif bits > 2:  # the exception is real
        assert np.any(once[0] != twice[0])


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_same_values(name):
    row, twin = (next(row for row in ROWS if row.name == n) for n in (name, TWINS[name]))
    rng, learned = setting(row, 3)
    x = near_thresholds(row, learned, 3, rng)
    for a, b in zip(forward(row, 3)(x, *learned), forward(twin, 3)(x, *learned)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("row", ROWS, ids=repr)
@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
def test_narrow_dtypes(row, dtype):
    if dtype == jnp.float16 and row not in DISTINCT:
        return
    bits = 3
    rng, learned = setting(row, bits, seed=3)
    x, cotangent = (jnp.asarray(a, dtype) for a in rng.normal(size=(2, *SHAPE)))
    value, codes, codes_float, decoded = forward(row, bits)(x, *learned)
    assert value.dtype == dtype
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(value, decoded)
    np.testing.assert_array_equal(codes_float, expected_codes(row, np.asarray(x), learned, bits))

    jitted, (grad_x, *grads) = gradients(row, bits)(x, learned, cotangent)
    np.testing.assert_array_equal(jitted, value)
    assert grad_x.dtype == dtype
    wide = [np.asarray(a, np.float64) for a in (x, *learned)]
    expected_x, *expected = row.reference_backward(
        *wide, bits=bits, g=np.asarray(cotangent, np.float64)
    )
    resolution = float(jnp.finfo(dtype).eps)
    flips = np.abs(np.asarray(grad_x, np.float64) - expected_x) > resolution * np.abs(expected_x)
    # Inputs with 8 bits do fall on edges, where float32 and float64 part.
    assert np.mean(flips) < 0.01
    for grad, scalar, wanted in zip(grads, learned, expected):
        assert grad.dtype == np.float32
        assert grad.shape == scalar.shape
        # Summed in float32, not in the narrow dtype.
        np.testing.assert_allclose(grad, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("row", [row for row in ROWS if row.maximum_bits == 8], ids=repr)
def test_learned_scalars_may_be_narrow_too(row):
    rng, learned = setting(row, 2, dtype=np.float32)
    learned = tuple(jnp.asarray(a, jnp.bfloat16) for a in learned)
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.bfloat16)
    value, grads = gradients(row, 2)(x, learned, jnp.ones(SHAPE, jnp.bfloat16))
    assert {value.dtype, *(g.dtype for g in grads)} == {jnp.dtype(jnp.bfloat16)}
    wide = tuple(np.asarray(a, np.float32) for a in learned)
    np.testing.assert_array_equal(value, forward(row, 2)(x, *wide)[0])


@cases(3)
def test_float64_decodes_to_the_last_bit(row, bits):
    rng, learned = setting(row, bits, seed=4, dtype=np.float64)
    x = rng.normal(size=SHAPE)
    with jax.enable_x64(True):
        value, codes, _, decoded = forward(row, bits)(x, *learned)
    assert value.dtype == np.float64
    np.testing.assert_array_equal(value, decoded)
    np.testing.assert_array_equal(codes, expected_codes(row, x, learned, bits))


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_strict_promotion(row):
    _, learned = setting(row, 1)

    def run(x, *learned):
        _, backward = jax.vjp(lambda x, *rest: row.value(x, *rest, bits=1), x, *learned)
        return backward(x), q.decode(row.encode(x, *learned, bits=1), dtype=x.dtype)

    x = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        (grad_x, *_), decoded = jax.eval_shape(run, x, *learned)
    assert grad_x.dtype == decoded.dtype == x.dtype


# Transformations and layouts


@pytest.mark.parametrize("row", DISTINCT, ids=repr)
def test_vmap_over_a_batch_equals_the_loop(row):
    bits = 2
    rng, learned = setting(row, bits, seed=5)
    x = rng.normal(size=SHAPE).astype(np.float32)

    def run(x, *learned):
        value, backward = jax.vjp(lambda x, *rest: row.value(x, *rest, bits=bits), x, *learned)
        codes = row.encode(x, *learned, bits=bits).codes
        return codes, value, backward(jnp.cos(7 * x))

    run = jax.jit(run)
    axes = (0,) + (None,) * len(learned)
    codes, value, grads = jax.jit(jax.vmap(run, axes))(x, *learned)
    for i in range(SHAPE[0]):
        codes_, value_, grads_ = run(x[i], *learned)
        np.testing.assert_array_equal(codes[i], codes_)
        np.testing.assert_array_equal(value[i], value_)
        for grad, grad_ in zip(grads, grads_):
            np.testing.assert_allclose(grad[i], grad_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", [r for r in DISTINCT if r.learned(1, np.random)], ids=repr)
def test_vmap_over_learned_scalars_equals_the_loop(row):
    bits = 2
    rng, _ = setting(row, bits)
    several = [setting(row, bits, seed=seed)[1] for seed in range(3)]
    stacked = [np.stack(scalars) for scalars in zip(*several)]
    x = rng.normal(size=SHAPE).astype(np.float32)

    def run(x, *learned):
        value, backward = jax.vjp(lambda x, *rest: row.value(x, *rest, bits=bits), x, *learned)
        return value, backward(jnp.ones_like(x))

    run = jax.jit(run)
    value, grads = jax.jit(jax.vmap(run, (None,) + (0,) * len(stacked)))(x, *stacked)
    for i, learned in enumerate(several):
        value_, grads_ = run(x, *learned)
        np.testing.assert_array_equal(value[i], value_)
        for grad, grad_ in zip(grads, grads_):
            np.testing.assert_allclose(grad[i], grad_, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("row", [row for row in DISTINCT if row.channels], ids=repr)
@pytest.mark.parametrize("axis", range(3))
def test_one_scalar_per_channel_on_any_axis(row, axis):
    bits = 2
    rng, (scalar,) = setting(row, bits, seed=6)
    shape = tuple(n if i == axis else 1 for i, n in enumerate(SHAPE))
    scalars = (scalar * rng.uniform(0.5, 2, shape)).astype(np.float32)
    x, cotangent = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    value, codes, _, decoded = forward(row, bits)(x, scalars)
    np.testing.assert_array_equal(codes, expected_codes(row, x, (scalars,), bits))
    np.testing.assert_array_equal(value, decoded)

    if axis != 1:
        return
    _, (grad_x, grad) = gradients(row, bits)(x, (scalars,), cotangent)
    expected_x, expected = row.reference_backward(
        x.astype(float), scalars.astype(float), bits=bits, g=cotangent.astype(float)
    )
    assert grad.shape == shape
    np.testing.assert_array_equal(grad_x, expected_x.astype(np.float32))
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)
    # N counts the elements of one channel.
    channel = np.moveaxis(x, axis, 0)[1], np.moveaxis(cotangent, axis, 0)[1]
    _, alone = row.reference_backward(channel[0], scalars.ravel()[1], bits=bits, g=channel[1])
    np.testing.assert_allclose(grad.ravel()[1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_n2uq_weight_has_one_scale_per_channel_on_any_axis(axis):
    w = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    moved = np.moveaxis(w, axis, -1)
    expected = np.moveaxis(np.asarray(jax.jit(lambda w: q.n2uq_weight(w, bits=2))(moved)), -1, axis)
    value = jax.jit(lambda w: q.n2uq_weight(w, bits=2, channel_axis=axis))(w)
    np.testing.assert_array_equal(value, expected)
    encoded = jax.eval_shape(lambda w: q.n2uq_weight_encode(w, bits=2, channel_axis=axis), w)
    assert encoded.scale.shape == tuple(n if i == axis % 3 else 1 for i, n in enumerate(SHAPE))


@pytest.mark.parametrize("row", ROWS, ids=repr)
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
def test_gradients_have_the_shape_of_their_scalars(row, shape):
    _, learned = setting(row, 2)
    learned = tuple(a.reshape(shape) if a.ndim == 0 else a for a in learned)
    x = np.linspace(-1, 2, SIZE, dtype=np.float32).reshape(SHAPE)
    value, grads = jax.eval_shape(gradients(row, 2), x, learned, x)
    assert value.shape == SHAPE
    assert [g.shape for g in grads] == [SHAPE, *(a.shape for a in learned)]


@pytest.mark.parametrize("row", DISTINCT, ids=repr)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (2, 1, 3, 2, 2)])
def test_any_shape(row, shape):
    if row.name.startswith("n2uq_weight") and shape == ():
        with pytest.raises(ValueError, match="must be an axis of w, which has 0"):
            row.value(jnp.zeros(()), bits=1)
        return
    _, learned = setting(row, 1)
    x = np.linspace(-1, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    value, grads = gradients(row, 1)(x, learned, np.ones_like(x))
    assert value.shape == grads[0].shape == shape
    assert all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_only_the_arguments_are_kept_for_the_backward_pass(row):
    rng, learned = setting(row, 2)
    arguments = (rng.normal(size=SHAPE).astype(np.float32), *learned)
    _, backward = jax.vjp(lambda x, *rest: row.value(x, *rest, bits=2), *arguments)
    leaves = jax.tree.leaves(backward)
    assert len(leaves) <= len(arguments)
    for leaf in leaves:
        assert any(np.array_equal(leaf, argument) for argument in arguments)


# Extremes


@cases(1, 2, 5)
def test_extreme_inputs(row, bits):
    if not row.learned(bits, np.random):
        return  # its step is the inputs' own: see the tests of its channels
    rng, learned = setting(row, bits, seed=7)
    x = rng.normal(size=SHAPE).astype(np.float32)
    extremes = np.float32([0, -0.0, 1e-45, -1e-40, 1e30, -1e30, 3e38, np.inf, -np.inf, np.nan])
    x.ravel()[: extremes.size] = extremes
    value, codes, codes_float, _ = forward(row, bits)(x, *learned)
    np.testing.assert_array_equal(np.isnan(value), np.isnan(x))
    np.testing.assert_array_equal(codes_float, expected_codes(row, x, learned, bits))
    assert list(codes.ravel()[4:10]) == [2**bits - 1, 0, 2**bits - 1, 2**bits - 1, 0, 0]
    _, (grad_x, *grads) = gradients(row, bits)(x, learned, np.ones_like(x))
    assert np.all(np.isfinite(grad_x))
    x.ravel()[extremes.size - 1] = 0
    _, (grad_x, *grads) = gradients(row, bits)(x, learned, np.ones_like(x))
    assert all(np.all(np.isfinite(grad)) for grad in (grad_x, *grads))


STEPPED = pytest.mark.parametrize("row", [row for row in ROWS if row.channels], ids=repr)


@STEPPED
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_bad_step_makes_its_own_values_nan(row, bad):
    rng, (scalar,) = setting(row, 2)
    scalars = np.full((1, SHAPE[1], 1), scalar, np.float32)
    scalars[0, 2] = bad
    x = rng.normal(size=SHAPE).astype(np.float32)
    value, codes, codes_float, _ = forward(row, 2)(x, scalars)
    wrong = np.arange(SHAPE[1]) == 2
    assert np.all(np.isnan(value) == wrong[:, None])
    assert np.all(np.isnan(codes_float) == wrong[:, None])
    assert np.all(codes[:, wrong] == 0)


@STEPPED
def test_of_a_negative_step_the_magnitude_counts(row):
    rng, (scalar,) = setting(row, 2)
    x, cotangent = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    for a, b in zip(forward(row, 2)(x, scalar), forward(row, 2)(x, -scalar)):
        np.testing.assert_array_equal(a, b)
    _, (grad_x, grad) = gradients(row, 2)(x, (scalar,), cotangent)
    _, (grad_x_, grad_) = gradients(row, 2)(x, (-scalar,), cotangent)
    np.testing.assert_array_equal(grad_x, grad_x_)
    assert grad == -grad_ != 0


@STEPPED
@pytest.mark.parametrize("small", [0.0, -0.0, 1e-42, -1e-20])
def test_a_step_near_zero_counts_as_the_smallest(row, small):
    rng, _ = setting(row, 2)
    x = rng.normal(size=SHAPE).astype(np.float32)
    unit = 2**2 - 1 if row.name.startswith("pact") else 1
    smallest = np.float32(2.0**-30 * unit)
    for a, b in zip(forward(row, 2)(x, np.float32(small)), forward(row, 2)(x, smallest)):
        np.testing.assert_array_equal(a, b)
        assert np.all(np.isfinite(a))
    _, (_, grad) = gradients(row, 2)(x, (np.float32(small),), np.ones_like(x))
    # What pushes it out again is the gradient at the smallest.
    _, (_, expected) = gradients(row, 2)(x, (smallest,), np.ones_like(x))
    np.testing.assert_allclose(np.abs(grad), np.abs(expected), rtol=1e-3)


@pytest.mark.parametrize("index", range(4))
def test_a_nan_scalar_makes_every_n2uq_value_nan(index):
    row = next(row for row in ROWS if row.name == "n2uq_activation")
    _, learned = setting(row, 2)
    learned[index].ravel()[-1:] = np.nan
    x = np.linspace(-1, 3, SIZE, dtype=np.float32).reshape(SHAPE)
    assert np.all(np.isnan(forward(row, 2)(x, *learned)[0]))


def test_n2uq_with_infinite_thresholds_or_without_input_scale_is_not_nan():
    x = jnp.array([-np.inf, -1.0, 0.0, 1.0, np.inf], jnp.float32)
    start, intervals, input_scale, output_scale = q.n2uq_activation_initial(bits=2)
    infinite = q.n2uq_activation(x, start + np.inf, intervals, input_scale, output_scale)
    np.testing.assert_array_equal(infinite, np.zeros(5))
    no_scale = q.n2uq_activation(x, start, intervals, 0 * input_scale, output_scale)
    np.testing.assert_array_equal(no_scale, np.zeros(5))


def test_n2uq_with_a_negative_input_scale_falls():
    x = np.linspace(-3, 3, SIZE, dtype=np.float32).reshape(SHAPE)
    row = next(row for row in ROWS if row.name == "n2uq_activation")
    _, (start, intervals, input_scale, output_scale) = setting(row, 2)
    value = forward(row, 2)(x, start, intervals, -input_scale, output_scale)[0].ravel()
    assert np.all(np.diff(value) <= 0)
    assert value[0] > value[-1] == 0


@pytest.mark.parametrize("gradient", ["reference", "clipped"])
def test_n2uq_weight_channels_of_zeros_and_of_nan(gradient):
    w = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    w[:, 0], w[2, 1], w[3, 2] = 0, np.nan, np.inf
    run = jax.jit(lambda w: q.n2uq_weight(w, bits=2, gradient=gradient))
    value, backward = jax.vjp(run, w)
    np.testing.assert_array_equal(np.isnan(value), [[False, True, True, False]] * 5)
    np.testing.assert_array_equal(value[:, 0], np.zeros(5))
    (grad,) = backward(jnp.ones_like(w))
    np.testing.assert_array_equal(grad[:, 0], np.full(5, 1.0 if gradient == "clipped" else 0.0))
    assert np.all(np.isfinite(grad[:, 3]))
    decoded = jax.jit(lambda w: q.decode(q.n2uq_weight_encode(w, bits=2)))(w)
    np.testing.assert_array_equal(decoded, value)


def test_steps_at_the_ends_of_the_range():
    levels = np.arange(8, dtype=np.float32)
    for step in np.float32([2.0**-30, 1e-8, 2.0**100, 4e37]):
        codes = q.uniq_activation_encode(levels * step, step, bits=3).codes
        np.testing.assert_array_equal(codes, levels)
    # The reciprocal of larger ones is flushed to zero: they count as infinite.
    assert np.all(np.isnan(q.uniq_activation(levels, np.float32(1e38), bits=3)))
