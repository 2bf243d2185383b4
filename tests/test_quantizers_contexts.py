"""An array's codes do not depend on the program around the quantizer.

Inputs lie on thresholds and a float32 step beside them, where one rounding more or less moves a
code. Each context is a way to have a compiler see the quantizer; the codes of whatever x it
returns must be those that NumPy counts for that x, and the value theirs, to the last bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quantizers_table import DISTINCT, SHAPE, expected_codes, near_thresholds

from uniq_jax import quantizers as q

# The n2uq_activation rows differ in their scalars only.
PROGRAMS = tuple(row for row in DISTINCT if row.name != "n2uq_activation_even")

rng = np.random.default_rng(0)
FACTOR = rng.uniform(0.5, 2, SHAPE[-1]).astype(np.float32)
SHIFT = rng.uniform(-1, 1, SHAPE[-1]).astype(np.float32)
RESIDUAL = rng.uniform(-1, 1, SHAPE).astype(np.float32)


def setting(row, bits, seed=0):
    generator = np.random.default_rng([seed, bits])
    learned = tuple(np.float32(a) for a in row.learned(bits, generator))
    return near_thresholds(row, learned, bits, generator), learned


def check(row, bits, learned, x, codes, value):
    x, codes, value = map(np.asarray, (x, codes, value))
    expected = expected_codes(row, x, learned, bits)
    wrong = np.sum(codes != expected)
    assert wrong == 0, f"{wrong} of {codes.size} codes"
    scale, offset = row.decoding(np.asarray(x, np.float32), learned, bits, np.float32)
    levels = (scale * (expected.astype(np.float32) - np.float32(offset))).astype(np.float32)
    np.testing.assert_array_equal(value, levels.astype(value.dtype))


def both(row, bits, x, learned):
    codes = row.encode(x, *learned, bits=bits, dtype=jnp.float32).codes
    return x, codes, row.value(x, *learned, bits=bits)


# Where the learned scalars, and x itself, come from


def eager(row, bits, x, learned):
    return both(row, bits, x, learned)


def arguments(row, bits, x, learned):
    return jax.jit(lambda x, *learned: both(row, bits, x, learned))(x, *learned)


def constants(row, bits, x, learned):
    return jax.jit(lambda x: both(row, bits, x, learned))(x)


def all_constant(row, bits, x, learned):
    return jax.jit(lambda: both(row, bits, jnp.asarray(x), learned))()


def first_constant(row, bits, x, learned):
    return jax.jit(lambda x, *rest: both(row, bits, x, (*learned[:1], *rest)))(x, *learned[1:])


def first_argument(row, bits, x, learned):
    return jax.jit(lambda x, *first: both(row, bits, x, (*first, *learned[1:])))(x, *learned[:1])


def loop(row, bits, x, learned):
    def body(_, x):
        return None, both(row, bits, x, learned)[1:]

    if not learned:  # a slice has another step
        return arguments(row, bits, x, learned)
    return x, *jax.jit(lambda x: jax.lax.scan(body, None, x)[1])(x)


def differentiated(row, bits, x, learned):
    def loss(x, *learned):
        x, codes, value = both(row, bits, x, learned)
        return jnp.sum(value * RESIDUAL), (codes, value)

    gradient = jax.value_and_grad(loss, argnums=tuple(range(1 + len(learned))), has_aux=True)
    (_, (codes, value)), _ = jax.jit(gradient)(x, *learned)
    return x, codes, value


def consumed(row, bits, x, learned):
    def run(x, *learned):
        x, codes, value = both(row, bits, x, learned)
        return x, codes, value, jnp.sum(value * FACTOR + RESIDUAL), 3 * codes + x

    return jax.jit(run)(x, *learned)[:3]


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("row", PROGRAMS, ids=repr)
@pytest.mark.parametrize("context", [eager, arguments, constants], ids=lambda f: f.__name__)
def test_codes_are_the_same_wherever_scalars_come_from(context, row, bits):
    if bits > row.maximum_bits:
        return
    x, learned = setting(row, bits)
    check(row, bits, learned, *context(row, bits, x, learned))


@pytest.mark.parametrize("row", PROGRAMS, ids=repr)
@pytest.mark.parametrize(
    "context",
    [all_constant, first_constant, first_argument, loop, differentiated, consumed],
    ids=lambda f: f.__name__,
)
def test_codes_are_the_same_in_any_program(context, row):
    x, learned = setting(row, 3)
    # Denormals are zero in XLA's programs but not in what it computes while it compiles.
    x = np.where(np.abs(x) < 1e-30, np.float32(0), x)
    check(row, 3, learned, *context(row, 3, x, learned))


# How x is made in the same program: (make x, its inverse)

PRODUCERS = {
    "affine": (lambda z: 2 * z + 1, lambda x: (x - 1) / 2),
    "multiplied by a number": (lambda z: z * 2.3, lambda x: x / 2.3),
    "divided by a number": (lambda z: z / 2.3, lambda x: x * 2.3),
    "divided by an array": (lambda z: z / FACTOR, lambda x: x * FACTOR),
    "batch norm": (lambda z: z * FACTOR + SHIFT, lambda x: (x - SHIFT) / FACTOR),
    "residual sum": (
        lambda z: jnp.maximum(z * FACTOR + SHIFT, -9) + RESIDUAL,
        lambda x: (x - RESIDUAL - SHIFT) / FACTOR,
    ),
    "mean": (
        lambda z: jnp.mean(jnp.stack([z, 3 * z]), axis=0),
        lambda x: x / 2,
    ),
    "used twice": (
        lambda z: (z * z) * 0.25 + z * 0.5,
        lambda x: np.sqrt(np.maximum(1 + 4 * x, 0)) - 1,
    ),
    "levels times a scale": (lambda z: 0.37 * jnp.round(z) + SHIFT, lambda x: (x - SHIFT) / 0.37),
}


@pytest.mark.parametrize("constant", [False, True], ids=["arguments", "constants"])
@pytest.mark.parametrize(
    "row",
    [row for row in PROGRAMS if row.name not in ("uniq_activation", "lsq")],  # uniq_weight's code
    ids=repr,
)
def test_codes_are_those_of_the_returned_input(row, constant):
    if constant and not row.learned(3, np.random):
        return
    x, learned = setting(row, 3, seed=1)

    for name, (producer, inverse) in PRODUCERS.items():

        def run(z, *scalars, producer=producer):
            made = producer(z)
            return *both(row, 3, made, learned if constant else scalars), jnp.exp(made)

        z = np.float32(inverse(x.astype(np.float64)))
        *result, _ = jax.jit(run)(z, *learned)
        try:
            check(row, 3, learned, *result)
        except AssertionError as error:
            raise AssertionError(f"x {name}: {error}") from error


@pytest.mark.parametrize("row", PROGRAMS, ids=repr)
def test_a_narrow_input_is_rounded_before_it_is_coded(row):
    # XLA may leave out the rounding of a bfloat16 result that is cast up again at once.
    x, learned = setting(row, 3, seed=2)

    def run(z, *learned):
        made = z * z - z * jnp.asarray(0.3, z.dtype)
        return both(row, 3, made, learned)

    x, codes, value = jax.jit(run)(jnp.asarray(x, jnp.bfloat16), *learned)
    assert x.dtype == value.dtype == jnp.bfloat16
    check(row, 3, learned, x, codes, value)


# Ties and quotients


@pytest.mark.parametrize("step", np.float32([0.25, 8, 0.1, 1 / 3, 1.7e-3, 123.4]))
@pytest.mark.parametrize("bits", [2, 8])
def test_an_input_on_a_threshold_takes_the_even_code(bits, step):
    n = 2**bits - 1
    for encode, offset in (
        (q.uniq_activation_encode, 0),
        (q.uniq_weight_encode, n / 2),
        (q.lsq_encode, 2 ** (bits - 1)),
    ):
        k = np.arange(n)
        x = step * (k + 0.5 - offset).astype(np.float32)
        even = k + k % 2
        run = lambda x, step: encode(x, step, bits=bits).codes  # noqa: E731, B023
        np.testing.assert_array_equal(jax.jit(run)(x, step), even)
        np.testing.assert_array_equal(jax.jit(lambda x: run(x, step))(x), even)  # noqa: B023
        np.testing.assert_array_equal(run(x, step), even)
        if np.log2(step) % 1 == 0:
            np.testing.assert_array_equal(np.round(x / step + offset), even)
        # One float32 step beside the threshold there is no tie.
        up, down = np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))
        away = np.abs(x) > 1e-30
        np.testing.assert_array_equal(jax.jit(run)(up, step)[away], (k + 1)[away])
        np.testing.assert_array_equal(jax.jit(run)(down, step)[away], k[away])


def test_an_n2uq_input_on_a_threshold_takes_the_lower_code():
    for bits in (1, 2, 3):
        n = 2**bits - 1
        scalars = np.float32(0), np.full(n, 0.5, np.float32), np.float32(1), np.float32(1)
        x = (np.arange(n) * 0.5 + 0.25).astype(np.float32)
        codes = jax.jit(q.n2uq_activation_encode)(x, *scalars).codes
        np.testing.assert_array_equal(codes, np.arange(n))
        above = np.nextafter(x, np.float32(9))
        codes = jax.jit(q.n2uq_activation_encode)(above, *scalars).codes
        np.testing.assert_array_equal(codes, np.arange(1, n + 1))


def test_a_quotient_as_input_is_no_nan():
    # XLA makes a/(b·step) of (a/b)/step, and here b·step is flushed to zero.
    def run(a, b, step):
        return q.uniq_activation_encode(a / b, step, bits=2, dtype=jnp.float32).codes

    a, b = np.zeros(4, np.float32), np.full(4, 1e-20, np.float32)
    np.testing.assert_array_equal(jax.jit(run)(a, b, np.float32(1e-19)), np.zeros(4))
