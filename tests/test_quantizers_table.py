"""The table of quantizers that the property tests run over: a new quantizer is one more row.

Each row joins the public functions with their NumPy reference, the thresholds in the very
arithmetic that the functions promise, and the surrogate whose derivatives their gradients are.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings

from uniq_jax import quantizers as q
from uniq_jax.quantizers import reference

# Deterministic, and nothing on disk.
settings.register_profile("uniq_jax", derandomize=True, deadline=None, database=None)
settings.load_profile("uniq_jax")

# One shape for all: every row then compiles once for each width and dtype.
SHAPE = (4, 6, 40)
SIZE = 960


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One quantizer. `learned` is always the tuple of the arguments that follow the input.

    Attributes:
      value, encode: the public functions, called as (x, *learned, bits=bits).
      reference, reference_backward: the same in NumPy, the latter with `g=` for the cotangent.
      learned: (bits, rng, scale) -> learned scalars, exact in float32, for inputs of size `scale`.
      thresholds: (x, learned, bits, dtype) -> what is compared with the thresholds 1..n, those
        thresholds, and whether a tie goes to the even code (else to the lower one), in NumPy of
        that dtype. Broadcasts against x after a leading axis of n.
      decoding: (x, learned, bits, dtype) -> scale, offset.
      surrogate: (x, learned, bits, x0, learned0) -> what to differentiate at (x0, learned0).
      kinks: (x, learned, bits) -> where the surrogate has its kinks, broadcasting as thresholds do.
      weight: (bits, elements that share a scalar) -> the factor of the learned scalar's gradient.
      channels: whether the learned scalar may have one value for each channel.
      idempotent: whether quantizing a quantized value gives it back.
    """

    name: str
    value: Callable
    encode: Callable
    reference: Callable
    reference_backward: Callable
    learned: Callable
    thresholds: Callable
    decoding: Callable
    surrogate: Callable
    kinks: Callable
    weight: Callable = lambda bits, count: 1.0
    maximum_bits: int = 8
    channels: bool = False
    idempotent: bool = True

    def __repr__(self):
        return self.name


def _float32(value):
    return np.asarray(value, np.float32).astype(np.float64)


def _one_step(bits, rng, scale=1.0):
    return (_float32(scale * rng.uniform(0.8, 1.6) * 3 / 2**bits),)


def _levels(bits, offset):
    """Thresholds and ends of an evenly spaced grid, in steps."""
    return np.arange(1, 2**bits) - 0.5 - offset


def _column(values, x):
    return np.asarray(values).reshape((-1,) + (1,) * x.ndim)


def _uniform_row(name, value, encode, forward, backward, offset, weight, **rest):
    def thresholds(x, learned, bits, dtype):
        (step,) = (np.asarray(a, dtype) for a in learned)
        return x, step * _column(_levels(bits, offset(bits)).astype(dtype), x), True

    def surrogate(x, learned, bits, x0, learned0):
        n, v = 2**bits - 1, x0 / learned0[0] + offset(bits)
        # The rounding is held at its residue: what "straight through" means.
        residue = np.round(np.clip(v, 0, n)) - np.clip(v, 0, n)
        inner = np.clip(x / learned[0] + offset(bits), 0, n) + residue
        return learned[0] * (inner - offset(bits))

    return Row(
        name=name,
        value=value,
        encode=encode,
        reference=forward,
        reference_backward=backward,
        learned=_one_step,
        thresholds=thresholds,
        decoding=lambda x, learned, bits, dtype: (np.asarray(learned[0], dtype), offset(bits)),
        surrogate=surrogate,
        kinks=lambda x, learned, bits: (
            learned[0] * _column(np.array([0, 2**bits - 1]) - offset(bits), x)
        ),
        weight=weight,
        channels=True,
        **rest,
    )


def _pact_row(gradient):
    def step(learned, bits, dtype):
        return np.asarray(learned[0], dtype) * dtype(1 / (2**bits - 1))

    def surrogate(x, learned, bits, x0, learned0):
        n, (clip,), (clip0,) = 2**bits - 1, learned, learned0
        clipped = np.minimum(np.maximum(x, 0), clip)
        if gradient == "paper":
            return clipped
        v = n * np.minimum(np.maximum(x0, 0), clip0) / clip0
        return clip / n * (n * clipped / clip0 + np.round(v) - v)

    return Row(
        name=f"pact_{gradient}",
        value=lambda x, clip, bits: q.pact_activation(x, clip, bits=bits, gradient=gradient),
        encode=q.pact_activation_encode,
        reference=reference.pact_activation,
        reference_backward=lambda x, clip, bits, g: reference.pact_activation_backward(
            x, clip, bits, g, gradient
        ),
        learned=lambda bits, rng, scale=1.0: (_float32(scale * rng.uniform(1, 2)),),
        thresholds=lambda x, learned, bits, dtype: (
            x,
            step(learned, bits, dtype) * _column(_levels(bits, 0).astype(dtype), x),
            True,
        ),
        decoding=lambda x, learned, bits, dtype: (step(learned, bits, dtype), 0),
        surrogate=surrogate,
        kinks=lambda x, learned, bits: learned[0] * _column([0.0, 1.0], x),
        channels=True,
    )


def _n2uq_activation_row(name, learned, idempotent):
    def edges(learned, dtype):
        start, intervals = (np.asarray(a, dtype) for a in learned[:2])
        floored = np.maximum(intervals, dtype(1e-3))
        edges = np.concatenate([start.reshape(1), floored])
        for shift in (1, 2, 4, 8, 16):
            edges = edges + np.concatenate([np.zeros(shift, dtype), edges])[: edges.size]
        return edges, floored

    def thresholds(x, learned, bits, dtype):
        (d, a), largest = edges(learned, dtype), np.finfo(dtype).max
        u = np.asarray(learned[2], dtype) * np.clip(x, -largest, largest)
        return u, _column(d[:-1] + a / dtype(2), x), False

    def surrogate(x, learned, bits, x0, learned0):
        # Of the output scale the quantizer itself is a linear function.
        own = reference.n2uq_activation(x0, *learned0[:3], learned[3] - learned0[3])
        return reference.n2uq_surrogate(x, *learned[:3], learned0[3]) + own

    return Row(
        name=name,
        value=lambda x, *learned, bits: q.n2uq_activation(x, *learned),
        encode=lambda x, *learned, bits, **rest: q.n2uq_activation_encode(x, *learned, **rest),
        reference=lambda x, *learned, bits: reference.n2uq_activation(x, *learned),
        reference_backward=lambda x, *learned, bits, g: reference.n2uq_activation_backward(
            x, *learned, g
        ),
        learned=learned,
        thresholds=thresholds,
        decoding=lambda x, learned, bits, dtype: (
            np.asarray(learned[3], dtype) * dtype(2 / (2**bits - 1)),
            0,
        ),
        surrogate=surrogate,
        kinks=lambda x, learned, bits: _column(edges(learned, np.float64)[0] / learned[2], x),
        maximum_bits=5,
        idempotent=idempotent,
    )


def _n2uq_even(bits, rng, scale=1.0):
    """Evenly spaced thresholds of one step: N2UQ as it starts."""
    (step,) = _one_step(bits, rng, scale)
    n = 2**bits - 1
    return (
        np.float64(0),
        _float32(np.full(n, 2 / n)),
        _float32(2 / n / step),
        _float32(step * n / 2),
    )


def _n2uq_general(bits, rng, scale=1.0):
    n = 2**bits - 1
    intervals = rng.uniform(0.4, 1.6, n) * 2 / n
    if n > 1:
        intervals[n // 2] = 5e-4  # below the floor
    scales = rng.uniform(0.7, 1.4, 2) * (1 / scale, scale)
    return tuple(map(_float32, (rng.uniform(-0.1, 0.1), intervals, *scales)))


def _n2uq_weight_row(gradient):
    def step(x, bits, dtype):
        rows = np.abs(np.asarray(x, dtype)).reshape(-1, x.shape[-1])
        count = len(rows)
        rows = np.pad(rows, ((0, 2 ** (count - 1).bit_length() - count), (0, 0)))
        while len(rows) > 1:
            rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
        mean = (rows * dtype(1 / count)).reshape((1,) * (x.ndim - 1) + (-1,))
        return mean * dtype(2.0 ** (2 - bits))

    def surrogate(x, learned, bits, x0, learned0):
        sigma = step(x0, bits, np.float64) * (2**bits - 1) / 2
        return x / sigma if gradient == "reference" else np.clip(x, -sigma, sigma)

    return Row(
        name=f"n2uq_weight_{gradient}",
        value=lambda w, bits: q.n2uq_weight(w, bits=bits, gradient=gradient),
        encode=q.n2uq_weight_encode,
        reference=reference.n2uq_weight,
        reference_backward=lambda w, bits, g: (
            reference.n2uq_weight_backward(w, bits, g, gradient=gradient),
        ),
        learned=lambda bits, rng, scale=1.0: (),
        thresholds=lambda x, learned, bits, dtype: (
            x,
            step(x, bits, dtype) * _column(_levels(bits, (2**bits - 1) / 2).astype(dtype), x),
            True,
        ),
        decoding=lambda x, learned, bits, dtype: (step(x, bits, dtype), (2**bits - 1) / 2),
        surrogate=surrogate,
        kinks=lambda x, learned, bits: (
            step(x, bits, np.float64) * _column(np.array([-0.5, 0.5]) * (2**bits - 1), x)
        ),
        # Its own values have another mean than the weights.
        idempotent=False,
    )


def _half(bits):
    return (2**bits - 1) / 2


def _no_offset(bits):
    return 0


def _weight_gradient_scale(bits, count):
    return 1 / np.sqrt(count * max(2 ** (bits - 1) - 1, 1))


def _activation_gradient_scale(bits, count):
    return 1 / np.sqrt(count * (2**bits - 1))


ROWS = (
    _uniform_row(
        "uniq_weight",
        q.uniq_weight,
        q.uniq_weight_encode,
        reference.uniq_weight,
        reference.uniq_weight_backward,
        _half,
        _weight_gradient_scale,
    ),
    _uniform_row(
        "uniq_activation",
        q.uniq_activation,
        q.uniq_activation_encode,
        reference.uniq_activation,
        reference.uniq_activation_backward,
        _no_offset,
        _activation_gradient_scale,
    ),
    _uniform_row(
        "uniq_activation_signed",
        lambda x, step, **rest: q.uniq_activation(x, step, signed=True, **rest),
        lambda x, step, **rest: q.uniq_activation_encode(x, step, signed=True, **rest),
        reference.uniq_weight,
        reference.uniq_weight_backward,
        _half,
        _weight_gradient_scale,
    ),
    _uniform_row(
        "lsq",
        q.lsq,
        q.lsq_encode,
        reference.lsq,
        reference.lsq_backward,
        lambda bits: 2 ** (bits - 1),
        _weight_gradient_scale,
    ),
    _uniform_row(
        "lsq_unsigned",
        lambda x, step, **rest: q.lsq(x, step, signed=False, **rest),
        lambda x, step, **rest: q.lsq_encode(x, step, signed=False, **rest),
        lambda x, step, bits: reference.lsq(x, step, bits, signed=False),
        lambda x, step, bits, g: reference.lsq_backward(x, step, bits, g, signed=False),
        _no_offset,
        _activation_gradient_scale,
    ),
    _pact_row("paper"),
    _pact_row("reference"),
    _n2uq_activation_row("n2uq_activation_even", _n2uq_even, idempotent=True),
    # General thresholds are not halfway between the levels, which may so be coded anew.
    _n2uq_activation_row("n2uq_activation", _n2uq_general, idempotent=False),
    _n2uq_weight_row("reference"),
    _n2uq_weight_row("clipped"),
)


# Rows whose values are another row's: only their gradients, or names, are their own.
TWINS = {
    "uniq_activation_signed": "uniq_weight",
    "lsq_unsigned": "uniq_activation",
    "pact_reference": "pact_paper",
    "n2uq_weight_clipped": "n2uq_weight_reference",
}
DISTINCT = tuple(row for row in ROWS if row.name not in TWINS)


def cases(*widths, twins=()):
    """Parameters (row, bits): for each row the widths that it has; for twins those of their own."""
    return pytest.mark.parametrize(
        ("row", "bits"),
        [
            pytest.param(row, bits, id=f"{row.name}-{bits}bit")
            for row in ROWS
            for bits in (twins if row.name in TWINS else widths)
            if bits <= row.maximum_bits
        ],
    )


def expected_codes(row, x, learned, bits):
    """Codes by counting thresholds in the dtype that the quantizer calculates in; nan for nan."""
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    x = np.asarray(x).astype(dtype)
    x = np.where(np.abs(x) < np.finfo(dtype).tiny, dtype(0), x)  # as XLA has it on CPU
    with np.errstate(over="ignore", invalid="ignore"):
        position, thresholds, to_even = row.thresholds(x, learned, bits, dtype)
        codes = np.sum(position > thresholds, axis=0)
        if to_even:
            on_threshold = position == thresholds
            even = _column(np.arange(1, 2**bits) % 2 == 0, x)
            codes = codes + np.sum(on_threshold & even, axis=0)
    return np.where(np.isnan(x), np.nan, codes)


def near_thresholds(row, learned, bits, rng, scale=1.0):
    """float32 inputs of SHAPE on thresholds, up to two float32 steps beside them, and elsewhere."""
    if learned:
        zero = np.zeros((1,), np.float32)
        position, thresholds, _ = row.thresholds(zero, learned, bits, np.float32)
        thresholds = thresholds.ravel()
        if position is not zero:
            thresholds = (thresholds / np.float32(learned[2])).astype(np.float32)
        x = rng.choice(thresholds, SIZE)
    else:
        # Thresholds are multiples of the step, which follows from the mean: pairs of multiples
        # whose mean makes it 1, times a scale for each channel.
        half = 2.0 ** (bits - 1)
        first = rng.integers(0 if bits == 1 else 1, half + (bits == 1), SIZE // 2).astype(float)
        sign = rng.choice([-1, 1], (2, SIZE // 2))
        pairs = (sign * np.stack([first, half - first])).reshape(-1, SHAPE[-1])
        x = (pairs * rng.uniform(0.1, 3.0, SHAPE[-1]) * scale).astype(np.float32).ravel()
    for _ in range(2):
        away = rng.choice(np.array([-np.inf, np.inf, 0], np.float32), SIZE)
        x = np.where(away == 0, x, np.nextafter(x, away))
    if learned:
        x = np.where(rng.random(SIZE) < 0.2, rng.normal(scale=scale, size=SIZE), x)
    return x.astype(np.float32).reshape(SHAPE)


def test_every_public_quantizer_has_a_row():
    public = {name.removesuffix("_encode") for name in dir(q) if name.endswith("_encode")}
    rows = {row.name for row in ROWS}
    without = {name for name in public if not any(row.startswith(name) for row in rows)}
    without -= {"pact_activation"} if {"pact_paper", "pact_reference"} <= rows else set()
    assert not without
    assert public == {name for name in public if hasattr(q, name)}


@cases(1, 2, 5, 8)
def test_adversarial_inputs_really_sit_on_thresholds(row, bits):
    rng = np.random.default_rng(bits)
    learned = row.learned(bits, rng)
    x = near_thresholds(row, learned, bits, rng)
    position, thresholds, _ = row.thresholds(x, learned, bits, np.float32)
    distance = np.abs(position - thresholds) / np.maximum(np.abs(thresholds), 1e-6)
    near = np.min(distance, axis=0)
    assert np.mean(near < 1e-6) > 0.4
    assert np.any(near == 0)
    assert np.any((near > 0) & (near < 1e-6)) or row.name.startswith("n2uq_activation")
