"""The sums of N2UQ's gradient: walked in chunks, or whole; on one device, or on several."""

import functools
import itertools
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from uniq_jax.quantizers import interval_sums

ROOT = pathlib.Path(__file__).parents[1]

SHAPES = [
    (),
    (1,),
    (0,),
    (3, 0, 2),
    (0, 4),
    (997,),
    (1, 1021),
    (7, 11, 13),
    (1, 8, 8, 6),
    (4, 64),
    (128, 3),
    (2, 3, 4, 5, 7),
    (2, 2 * 1009),
    (600, 2),
]
NAMES = ("g * slope", "sums of g", "sums of g * (u - edge)", "sum of g * code", "g * slope * x")


def _arguments(shape, n, dtype=np.float64):
    rng = np.random.default_rng([n, len(shape), *shape])
    x = rng.normal(0.8, 1.0, shape)
    intervals = rng.uniform(0.4, 1.6, n) * 2 / n
    edges = np.concatenate([[0.05], 0.05 + np.cumsum(intervals)])
    arguments = (x, rng.normal(size=shape), 1.2, edges, edges[:-1] + intervals / 2, 0.9 / intervals)
    return tuple(np.asarray(a, dtype) for a in arguments)


def _expected(x, g, input_scale, edges, thresholds, slopes):
    """As the docstring has it, segment by segment."""
    u = input_scale * x
    masks = [(u > low) & (u <= high) for low, high in itertools.pairwise(edges)]
    grad_u = sum(g * m * s for m, s in zip(masks, slopes))
    code = sum((u > t).astype(float) for t in thresholds)
    return (
        grad_u,
        np.array([np.sum(g * m) for m in masks]),
        np.array([np.sum(g * m * (u - low)) for m, low in zip(masks, edges)]),
        np.sum(g * code),
        np.sum(grad_u * x),
    )


@pytest.fixture
def small_chunks(monkeypatch):
    # Small arrays then take several chunks.
    monkeypatch.setattr(interval_sums, "_CHUNK", 64)


@pytest.mark.parametrize(
    ("shape", "n"), [*((shape, 7) for shape in SHAPES), ((4, 64), 1), ((), 31)], ids=str
)
@pytest.mark.parametrize(
    "form",
    [
        interval_sums._chunked,
        interval_sums._whole,
        functools.partial(interval_sums._whole, most_apart=100),
    ],
    ids=["chunked", "one reduction", "reductions apart"],
)
def test_every_form_has_the_sums_of_the_docstring(form, shape, n, small_chunks):
    arguments = _arguments(shape, n)
    with jax.enable_x64(True):
        found = jax.jit(form)(*arguments)
    for name, a, expected in zip(NAMES, found, _expected(*arguments)):
        assert a.shape == np.shape(expected), name
        np.testing.assert_allclose(a, expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_walk_is_taken(small_chunks):
    def loops(shape):
        return str(jax.make_jaxpr(interval_sums._chunked)(*_arguments(shape, 3))).count("scan[")

    assert loops((4, 64)) == 1
    assert loops((2, 3, 4, 5, 7)) == 1
    assert loops((4, 16)) == 0
    # No divisor fits: one piece.
    assert loops((1, 1021)) == 0


@pytest.mark.parametrize(
    ("width", "target", "expected"),
    [
        (100, 200, 100),
        (100, 30, 25),
        (1021, 100, 1021),
        (1022, 100, 73),
        (12, 1, 1),
        (2 * 1009, 100, 2018),
    ],
)
def test_chunk_width(width, target, expected):
    assert interval_sums._chunk_width(width, target) == expected
    assert width % expected == 0


def test_the_sums_keep_float32_accuracy_over_many_elements(small_chunks):
    arguments = _arguments((16, 64 * 64), 3, np.float32)
    result = jax.jit(interval_sums._chunked)(*arguments)
    expected = _expected(*(a.astype(np.float64) for a in arguments))
    for a, b in zip(result[1:], expected[1:]):
        np.testing.assert_allclose(a, b, atol=1e-6 * arguments[0].size)


DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from uniq_jax import quantizers as q
    from uniq_jax.quantizers import interval_sums

    interval_sums._CHUNK = 256
    assert jax.device_count() == 4
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, same = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, cotangent = np.random.default_rng(0).normal(size=(2, 8, 6, 6, 16)).astype(np.float32)
    parameters = tuple(q.n2uq_activation_initial(bits=2))
    cases = {
        "n2uq_activation": (q.n2uq_activation, parameters),
        "uniq_activation": (lambda x, s: q.uniq_activation(x, s, bits=2), (np.float32(0.3),)),
        "uniq_activation by channel": (
            lambda x, s: q.uniq_activation(x, s, bits=2), (np.full(16, 0.3, np.float32),)),
        "pact_activation": (lambda x, c: q.pact_activation(x, c, bits=2), (np.float32(1.3),)),
    }
    for name, (function, learned) in cases.items():
        def step(x, cotangent, learned):
            value, backward = jax.vjp(function, x, *learned)
            return value, backward(cotangent)
        placed = [jax.device_put(a, split) for a in (x, cotangent)]
        placed.append(jax.device_put(learned, same))
        compiled = jax.jit(step).lower(*placed).compile()
        text = compiled.as_text()
        assert "all-reduce" in text, name
        for word in ("all-gather", "all-to-all", "collective-permute"):
            assert word not in text, (name, word)
        value, (grad_x, *grads) = compiled(*placed)
        assert value.sharding.is_equivalent_to(split, 4), (name, value.sharding)
        assert grad_x.sharding.is_equivalent_to(split, 4), (name, grad_x.sharding)
        alone = jax.jit(step)(x, cotangent, learned)
        np.testing.assert_array_equal(value, alone[0])
        np.testing.assert_array_equal(grad_x, alone[1][0])
        for a, b in zip(grads, alone[1][1:]):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    # That the word would be found.
    gathered = jax.jit(lambda x: 2 * x, out_shardings=same)
    assert "all-gather" in gathered.lower(placed[0]).compile().as_text()
    print("done")
"""


def test_a_sharded_batch_is_never_gathered():
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEVICES)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "done"
