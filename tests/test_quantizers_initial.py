"""Initial steps against brute force, and the errors of the whole public API."""

import math
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from uniq_jax import quantizers as q
from uniq_jax.quantizers import initial
from uniq_jax.quantizers.grid import check_bits

BITS = range(1, 9)

# Optimal steps


def _normal_integrals(low, high):
    """The unit normal's mass, first and second moment between two points."""

    def density(z):
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    first = density(low) - density(high)
    edge = (low * density(low)) - (0 if high == math.inf else high * density(high))
    return mass, first, mass + edge


def _mean_squared_error(step, bits, distribution):
    """Straight from the definition: every cell's ∫ (z − level)² φ(z) dz."""
    n = 2**bits - 1
    offset = n / 2 if distribution == "normal" else 0
    total = 0.0
    for code in range(n + 1):
        low = -math.inf if code == 0 else (code - 0.5 - offset) * step
        high = math.inf if code == n else (code + 0.5 - offset) * step
        if distribution == "rectified_normal":
            low = max(low, 0.0)
        elif low == -math.inf:
            low = -40.0
        mass, first, second = _normal_integrals(low, high)
        level = (code - offset) * step
        total += second - 2 * level * first + level * level * mass
    return total


@pytest.mark.parametrize("bits", BITS)
def test_tables_hold_the_optimal_steps(bits):
    normal = q.optimal_step(bits, "normal")
    assert initial.NORMAL_STEPS[bits] == pytest.approx(normal, rel=1e-12)
    rectified = q.optimal_step(bits, "rectified_normal")
    own = bits in (5, 6, 7)  # the rest are the reference program's
    assert initial.RECTIFIED_NORMAL_STEPS[bits] == pytest.approx(rectified, rel=1e-12 * own or 1e-4)


@pytest.mark.parametrize("distribution", ["normal", "rectified_normal"])
@pytest.mark.parametrize("bits", BITS)
def test_no_step_has_a_smaller_error(bits, distribution):
    step = q.optimal_step(bits, distribution)
    error = _mean_squared_error(step, bits, distribution)
    assert 0 < error < 1
    for factor in (1.0003, 1.003, 1.03, 1.3):
        assert error < _mean_squared_error(step * factor, bits, distribution)
        assert error < _mean_squared_error(step / factor, bits, distribution)
    # And no other valley: on a wide grid the best point is the one beside it.
    grid = step * np.exp(np.linspace(-2, 2, 81))
    errors = [_mean_squared_error(s, bits, distribution) for s in grid]
    assert int(np.argmin(errors)) == 40


def test_known_optimal_steps():
    # Binary: the mean of |z|. Max 1960, table II.
    assert q.optimal_step(1, "normal") == pytest.approx(2 * math.sqrt(2 / math.pi), rel=1e-12)
    for bits, step in ((2, 0.9957), (3, 0.5860), (4, 0.3352), (5, 0.1881)):
        assert q.optimal_step(bits, "normal") == pytest.approx(step, abs=6e-5)


# From arrays

SHAPE = (4, 6, 10)


@pytest.fixture(scope="module")
def array():
    return np.random.default_rng(0).normal(0.3, 1.7, SHAPE).astype(np.float32)


def _over_channels(x, axis):
    moved = np.moveaxis(x.astype(np.float64), axis, 0)
    return moved.reshape(len(moved), -1)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_initial_steps_by_channel(array, axis):
    bits, n = 3, 7
    rows = array.reshape(1, -1).astype(float) if axis is None else _over_channels(array, axis)
    shape = () if axis is None else tuple(m if i == axis % 3 else 1 for i, m in enumerate(SHAPE))

    def check(function, expected):
        step = jax.jit(lambda x: function(x, bits=bits, channel_axis=axis))(array)
        assert step.shape == shape
        assert step.dtype == jnp.float32
        np.testing.assert_allclose(step.ravel(), expected, rtol=1e-5)

    weight = np.std(rows, axis=1, ddof=1) * initial.NORMAL_STEPS[bits]
    check(q.uniq_weight_initial_step, weight)
    check(lambda x, **rest: q.uniq_activation_initial_step(x, signed=True, **rest), weight)
    rectified = np.sqrt(2 * np.mean(rows**2, axis=1)) * initial.RECTIFIED_NORMAL_STEPS[bits]
    check(q.uniq_activation_initial_step, rectified)
    magnitude = np.mean(np.abs(rows), axis=1)
    check(q.lsq_initial_step, 2 * magnitude / math.sqrt(3))
    check(lambda x, **rest: q.lsq_initial_step(x, signed=False, **rest), 2 * magnitude / n**0.5)


@pytest.mark.parametrize(
    "function",
    [
        q.uniq_weight_initial_step,
        q.uniq_activation_initial_step,
        q.lsq_initial_step,
        q.pact_initial_clip,
    ],
)
def test_initial_scalars_are_wide_and_never_zero(function, array):
    run = jax.jit(lambda x: function(x, bits=1))
    assert run(array.astype(jnp.bfloat16)).dtype == jnp.float32
    assert run(np.zeros((3, 2), np.float32)) >= 2.0**-30
    # One weight has no spread, but a step all the same.
    assert np.isfinite(run(np.ones((1,), np.float32)))
    with jax.enable_x64(True):
        assert run(array.astype(np.float64)).dtype == jnp.float64


def test_pact_initial_clip_is_the_top_level(array):
    step = q.uniq_activation_initial_step(array, bits=4)
    np.testing.assert_allclose(q.pact_initial_clip(array, bits=4), 15 * step, rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 6))
def test_n2uq_starts_as_the_uniform_quantizer_of_its_step(array, bits):
    step = np.float32(0.37)
    parameters = q.n2uq_activation_initial(bits=bits, step=step)
    x = array[np.abs(array / step % 1 - 0.5) > 1e-4]  # off ties
    np.testing.assert_allclose(
        q.n2uq_activation(x, *parameters), q.uniq_activation(x, step, bits=bits), rtol=1e-6
    )


def test_n2uq_initial_parameters():
    parameters = q.n2uq_activation_initial(bits=3, dtype=jnp.bfloat16)
    assert [p.shape for p in parameters] == [(), (7,), (), ()]
    assert {p.dtype for p in parameters} == {jnp.dtype(jnp.bfloat16)}
    start, intervals, *scales = q.n2uq_activation_initial(bits=2)
    assert start == 0
    np.testing.assert_allclose(intervals, np.full(3, 2 / 3), rtol=1e-6)
    assert scales == [1, 1]


# Grids and decoding


@pytest.mark.parametrize("integer", [int, np.int8, np.uint8, np.int64])
@pytest.mark.parametrize("bits", BITS)
def test_grids(bits, integer):
    for grid, offset in (
        (q.Grid.unsigned(integer(bits)), 0),
        (q.Grid.symmetric(integer(bits)), (2**bits - 1) / 2),
        (q.Grid.twos_complement(integer(bits)), 2 ** (bits - 1)),
    ):
        assert type(grid.bits) is int
        assert grid.bits == bits
        assert grid.max_code == 2**bits - 1
        assert grid.offset == offset
        assert grid.has_half_levels == (offset % 1 != 0)
        assert hash(grid) == hash(q.Grid(bits, offset))


def test_decode_dtypes():
    codes = jnp.arange(4, dtype=jnp.uint8)
    assert q.decode(q.Encoded(codes, jnp.float32(0.1), 1.5)).dtype == jnp.float32
    narrow = q.decode(q.Encoded(codes, jnp.float32(0.1), 0.0), dtype=jnp.bfloat16)
    # One product, rounded to the narrow dtype once.
    expected = (jnp.arange(4, dtype=jnp.float32) * jnp.float32(0.1)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(narrow, expected)
    assert q.uniq_weight_encode(jnp.zeros(3), 0.1, bits=1, dtype=jnp.int32).codes.dtype == jnp.int32


# Errors

X = np.ones((4, 3), np.float32)
N2UQ = tuple(q.n2uq_activation_initial(bits=2))
WITH_BITS = {
    "uniq_weight": lambda **k: q.uniq_weight(X, 0.5, **k),
    "uniq_weight_encode": lambda **k: q.uniq_weight_encode(X, 0.5, **k),
    "uniq_activation": lambda **k: q.uniq_activation(X, 0.5, **k),
    "uniq_activation_encode": lambda **k: q.uniq_activation_encode(X, 0.5, **k),
    "uniq_activation signed": lambda **k: q.uniq_activation(X, 0.5, signed=True, **k),
    "lsq": lambda **k: q.lsq(X, 0.5, **k),
    "lsq unsigned": lambda **k: q.lsq(X, 0.5, signed=False, **k),
    "lsq_encode": lambda **k: q.lsq_encode(X, 0.5, **k),
    "pact_activation": lambda **k: q.pact_activation(X, 0.5, **k),
    "pact_activation_encode": lambda **k: q.pact_activation_encode(X, 0.5, **k),
    "n2uq_weight": lambda **k: q.n2uq_weight(X, **k),
    "n2uq_weight_encode": lambda **k: q.n2uq_weight_encode(X, **k),
    "n2uq_activation_initial": q.n2uq_activation_initial,
    "uniq_weight_initial_step": lambda **k: q.uniq_weight_initial_step(X, **k),
    "uniq_activation_initial_step": lambda **k: q.uniq_activation_initial_step(X, **k),
    "lsq_initial_step": lambda **k: q.lsq_initial_step(X, **k),
    "pact_initial_clip": lambda **k: q.pact_initial_clip(X, **k),
    "pack_codes": lambda **k: q.pack_codes(np.zeros(3, np.uint8), **k),
    "packed_size": lambda **k: q.packed_size(3, **k),
    "unpack_codes": lambda **k: q.unpack_codes(np.zeros(1, np.uint8), shape=(1,), **k),
    "optimal_step": lambda bits: q.optimal_step(bits, "normal"),
    "Grid": lambda bits: q.Grid(bits, 0.0),
}


@pytest.fixture(autouse=True)
def _messages_of_the_package_itself(request):
    """With jaxtyping's checks on, its own errors would come first."""
    before = jaxtyping.config.jaxtyping_disable
    name = request.node.name
    jaxtyping.config.update("jaxtyping_disable", "error" in name or "grids" in name)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize("name", WITH_BITS)
def test_error_of_bits(name):
    function = WITH_BITS[name]
    maximum = 5 if name == "n2uq_activation_initial" else 8
    function(bits=2)
    for bits in (0, 9, 17, -1):
        message = f"bits (={bits}) must be an integer from 1 to {maximum}"
        with pytest.raises(ValueError, match=re.escape(message) + "$"):
            function(bits=bits)
    for bits in (2.0, True, "2", None):
        if name == "optimal_step" and bits in (2.0, True):
            continue  # functools.cache takes them for 2 and 1
        message = f"bits (={bits!r}) must be an integer from 1 to {maximum}, not a "
        with pytest.raises(TypeError, match=re.escape(message)):
            function(bits=bits)


@pytest.mark.parametrize("name", ["uniq_weight", "n2uq_weight", "pact_activation"])
def test_error_of_traced_bits(name):
    with pytest.raises(TypeError, match="it is static, so it cannot be traced"):
        jax.jit(lambda bits: WITH_BITS[name](bits=bits))(2)


def test_no_error_of_other_integers():
    assert check_bits(np.int8(8)) == 8
    assert check_bits(jnp.asarray(3)) == 3


SCALED = {
    "uniq_weight": (q.uniq_weight, "w", "step"),
    "uniq_weight_encode": (q.uniq_weight_encode, "w", "step"),
    "uniq_activation": (q.uniq_activation, "x", "step"),
    "uniq_activation_encode": (q.uniq_activation_encode, "x", "step"),
    "lsq": (q.lsq, "x", "step"),
    "lsq_encode": (q.lsq_encode, "x", "step"),
    "pact_activation": (q.pact_activation, "x", "clip"),
    "pact_activation_encode": (q.pact_activation_encode, "x", "clip"),
}


@pytest.mark.parametrize("name", SCALED)
def test_error_of_shapes_and_dtypes(name):
    function, x, scalar = SCALED[name]
    for shape in ((4,), (2,), (4, 2), (1, 4, 3), (1, 1, 1)):
        message = f"{scalar} of shape {shape} must broadcast against the quantized array of shape"
        with pytest.raises(ValueError, match=re.escape(message)):
            function(X, np.ones(shape, np.float32), bits=2)
    with pytest.raises(TypeError, match=f"^{x} must have a floating dtype, not int32"):
        function(X.astype(np.int32), 0.5, bits=2)
    with pytest.raises(TypeError, match=f"^{scalar} must have a floating dtype, not int32"):
        function(X, np.int32(1), bits=2)


@pytest.mark.parametrize("function", [q.n2uq_activation, q.n2uq_activation_encode])
def test_error_of_n2uq_activation(function):
    for shape in ((2,), (0,), (63,), (1, 3), ()):
        message = f"intervals of shape {shape} must have shape (n,) with n = 2**bits - 1"
        with pytest.raises(ValueError, match=re.escape(message) + ".*1, 3, 7, 15, 31$"):
            function(X, 0.0, np.ones(shape, np.float32), 1.0, 1.0)
    for index, name in ((1, "start"), (3, "input_scale"), (4, "output_scale")):
        arguments = [X, *N2UQ]
        arguments[index] = np.ones(2, np.float32)
        with pytest.raises(ValueError, match=rf"^{name} of shape \(2,\) must be a single number"):
            function(*arguments)
    for index, name in enumerate(("x", "start", "intervals", "input_scale", "output_scale")):
        arguments = [np.asarray(a) for a in (X, *N2UQ)]
        arguments[index] = arguments[index].astype(np.int32)
        with pytest.raises(TypeError, match=f"^{name} must have a floating dtype, not int32"):
            function(*arguments)


def test_error_of_gradient_words():
    message = r"gradient \(='exact'\) must be '{}' or '{}'"
    with pytest.raises(ValueError, match=message.format("reference", "clipped")):
        q.n2uq_weight(X, bits=2, gradient="exact")
    with pytest.raises(ValueError, match=message.format("paper", "reference")):
        q.pact_activation(X, 1.0, bits=2, gradient="exact")
    with pytest.raises(ValueError, match=r"distribution \(='uniform'\) must be 'normal' or"):
        q.optimal_step(2, "uniform")


@pytest.mark.parametrize("axis", [2, -3, 17])
def test_error_of_channel_axis(axis):
    message = re.escape(f"channel_axis (={axis}) must be ") + ".*which has 2: from -2 to 1"
    for function in (q.n2uq_weight, q.n2uq_weight_encode, q.uniq_weight_initial_step,
                     q.uniq_activation_initial_step, q.lsq_initial_step):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            function(X, bits=2, channel_axis=axis)


def test_error_of_integer_arrays_in_initial_steps():
    for function, name in ((q.uniq_weight_initial_step, "w"), (q.uniq_activation_initial_step, "x"),
                           (q.lsq_initial_step, "x"), (q.pact_initial_clip, "x"),
                           (q.n2uq_weight, "w"), (q.n2uq_weight_encode, "w")):  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name} must have a floating dtype, not int32"):
            function(X.astype(np.int32), bits=2)
