"""Equality with the figures that the two reference programs gave, in float64 and in float32."""

import os
import pathlib

import jax
import numpy as np
import pytest

from uniq_jax import quantizers as q
from uniq_jax.quantizers import reference

pytestmark = pytest.mark.data

UNIQ_BITS = (1, 2, 3, 4, 8)
CASES = [
    *(f"uniq/{role}/{grain}_wise/{bits}bit" for role in ("weight", "activation")
      for grain in ("layer", "kernel") for bits in UNIQ_BITS),
    *(f"n2uq/activation/{bits}bit" for bits in (1, 2, 3, 4)),
    *(f"n2uq/weight/{bits}bit" for bits in UNIQ_BITS),
    *(f"pact/activation/{bits}bit" for bits in UNIQ_BITS),
]  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    named = os.environ.get("UNIQ_JAX_SHARED")
    root = pathlib.Path(named) if named else pathlib.Path(__file__).parents[2] / "shared"
    path = root / "golden" / "quantizers.npz"
    if not path.exists():
        pytest.skip(f"no golden files: {path} is missing; set UNIQ_JAX_SHARED")
    with np.load(path) as file:
        return dict(file)


class Case:
    """One case of the file: its arrays, and what each implementation makes of them."""

    def __init__(self, golden, name):
        self.arrays = {
            key.removeprefix(name + "/"): value
            for key, value in golden.items()
            if key.startswith(name + "/")
        }
        assert self.arrays, f"{name} is not in the golden file"
        self.family, self.role = name.split("/")[:2]
        self.bits = int(name.split("/")[-1].removesuffix("bit"))
        # Kernels are OIHW.
        self.axis = 0 if self.role == "weight" else 1
        self.input = "w" if (self.family, self.role) == ("n2uq", "weight") else "x"
        self.learned = {
            "uniq": ("delta",),
            "pact": ("clip_val",),
            "n2uq": ("start", "a", "scale1", "scale2") if self.role == "activation" else (),
        }[self.family]
        self.arguments = [self.arrays[key] for key in (self.input, *self.learned)]
        self.gradients = [self.arrays[f"grad_{key}"] for key in (self.input, *self.learned)]

    def value(self, *arguments):
        bits, axis = self.bits, self.axis
        return {
            "uniq/weight": lambda *a: q.uniq_weight(*a, bits=bits),
            "uniq/activation": lambda *a: q.uniq_activation(*a, bits=bits),
            "n2uq/activation": lambda *a: q.n2uq_activation(*a),
            "n2uq/weight": lambda w: q.n2uq_weight(w, bits=bits, channel_axis=axis),
            "pact/activation": lambda *a: q.pact_activation(*a, bits=bits, gradient="reference"),
        }[f"{self.family}/{self.role}"](*arguments)

    def decoded(self, *arguments):
        bits, axis = self.bits, self.axis
        encoded = {
            "uniq/weight": lambda *a: q.uniq_weight_encode(*a, bits=bits),
            "uniq/activation": lambda *a: q.uniq_activation_encode(*a, bits=bits),
            "n2uq/activation": lambda *a: q.n2uq_activation_encode(*a),
            "n2uq/weight": lambda w: q.n2uq_weight_encode(w, bits=bits, channel_axis=axis),
            "pact/activation": lambda *a: q.pact_activation_encode(*a, bits=bits),
        }[f"{self.family}/{self.role}"](*arguments)
        return q.decode(encoded)

    def reference(self, g):
        x, *learned = self.arguments
        bits, axis = self.bits, self.axis
        if self.family == "uniq":
            forward = getattr(reference, f"uniq_{self.role}")(x, *learned, bits)
            return forward, getattr(reference, f"uniq_{self.role}_backward")(x, *learned, bits, g)
        if self.family == "pact":
            forward = reference.pact_activation(x, *learned, bits)
            return forward, reference.pact_activation_backward(x, *learned, bits, g, "reference")
        if self.role == "activation":
            learned = [a if key == "a" else a.item() for key, a in zip(self.learned, learned)]
            forward = reference.n2uq_activation(x, *learned)
            return forward, reference.n2uq_activation_backward(x, *learned, g)
        forward = reference.n2uq_weight(x, bits, axis)
        return forward, (reference.n2uq_weight_backward(x, bits, g, axis),)

    def with_gradients(self, dtype):
        def run(cotangent, *arguments):
            value, backward = jax.vjp(self.value, *arguments)
            return value, backward(cotangent)

        arguments = [a.astype(dtype) for a in (self.arrays["cotangent"], *self.arguments)]
        value, gradients = jax.jit(run)(*arguments)
        return np.asarray(value), [np.asarray(g) for g in gradients]

    def magnitudes(self):
        """For each learned argument the sum of its gradient's terms, one an element, unsigned."""
        cotangent, totals = self.arrays["cotangent"], None
        for index in np.ndindex(cotangent.shape):
            one = np.zeros_like(cotangent)
            one[index] = cotangent[index]
            terms = [np.abs(term) for term in self.reference(one)[1][1:]]
            totals = terms if totals is None else [a + b for a, b in zip(totals, terms)]
        return totals


def equal(actual, expected):
    """To a relative 1e-9; entries of rounding size are measured by the array's largest."""
    assert np.shape(actual) == np.shape(expected) or np.size(expected) == 1
    actual = np.reshape(actual, np.shape(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12 * np.max(np.abs(expected)))


@pytest.mark.parametrize("name", CASES)
def test_float64(golden, name):
    case = Case(golden, name)
    with jax.enable_x64(True):
        value, gradients = case.with_gradients(np.float64)
        decoded = np.asarray(jax.jit(case.decoded)(*case.arguments))
    equal(value, case.arrays["y"])
    np.testing.assert_array_equal(decoded, value)
    assert len(gradients) == len(case.gradients)
    for gradient, expected in zip(gradients, case.gradients):
        assert gradient.dtype == np.float64
        equal(gradient, expected)


@pytest.mark.parametrize("name", CASES)
def test_numpy_reference(golden, name):
    case = Case(golden, name)
    value, gradients = case.reference(case.arrays["cotangent"])
    equal(value, case.arrays["y"])
    assert len(gradients) == len(case.gradients)
    for gradient, expected in zip(gradients, case.gradients):
        equal(gradient, expected)


@pytest.mark.parametrize("name", CASES)
def test_float32(golden, name):
    case = Case(golden, name)
    # Every number that goes in is a float32 one, so that only our own rounding can differ.
    assert all(np.array_equal(a, a.astype(np.float32)) for a in case.arguments)
    value, (gradient, *learned) = case.with_gradients(np.float32)
    expected = case.arrays["y"]
    size = np.max(np.abs(expected))
    # A value may be a level off where x lies within float32 rounding of a threshold. These data
    # have no such x (and if a backend finds one, it does not keep the promise of `uniform.py`).
    assert np.sum(np.abs(value - expected) > 1e-3 * size / 2**case.bits) == 0
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6 * size)

    size = np.max(np.abs(case.gradients[0]))
    np.testing.assert_allclose(gradient, case.gradients[0], rtol=1e-5, atol=1e-6 * size)
    for gradient, expected, magnitude in zip(learned, case.gradients[1:], case.magnitudes()):
        assert gradient.dtype == np.float32
        error = np.abs(gradient.reshape(expected.shape) - expected)
        assert np.all(error <= 1e-5 * magnitude), np.max(error / magnitude)


@pytest.mark.parametrize("grain", ["layer", "kernel"])
@pytest.mark.parametrize("bits", UNIQ_BITS)
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_initial_steps(golden, role, grain, bits):
    case = Case(golden, f"uniq/{role}/{grain}_wise/{bits}bit")
    initial = {"weight": q.uniq_weight_initial_step, "activation": q.uniq_activation_initial_step}
    axis = case.axis if grain == "kernel" else None
    with jax.enable_x64(True):
        run = jax.jit(lambda x: initial[role](x, bits=bits, channel_axis=axis))
        equal(run(case.arguments[0]), case.arrays["initial_delta"])
    narrow = np.asarray(run(case.arguments[0].astype(np.float32)))
    np.testing.assert_allclose(narrow, case.arrays["initial_delta"], rtol=1e-6)


def test_every_array_of_the_file_is_used(golden):
    used = {f"{name}/{key}" for name in CASES for key in Case(golden, name).arrays}
    assert used == set(golden)


def test_a_wrong_figure_is_noticed(golden):
    case = Case(golden, "n2uq/activation/2bit")
    with pytest.raises(AssertionError):
        equal(case.gradients[0] * (1 + 1e-8), case.gradients[0])
