"""Batch norms and calibration on four devices: sums in one order, and the same results."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from uniq_jax import data_parallel, nn

CHILD = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from uniq_jax import data_parallel, nn, quantizers
from uniq_jax.train import sharding

mesh = sharding.create_mesh({"data": 4, "model": 1})
spread = sharding.batch_sharding(mesh)
found = {}


rng = np.random.default_rng(0)


def draw(*shape):
    return jax.device_put(rng.normal(1, 2, shape), spread)


def collectives(compiled):
    text = compiled.as_text()
    return [text.count(f" {name}(") for name in ("all-gather", "all-reduce")]


def normalized(norm, x, weights):
    graphdef, params, statistics = nnx.split(norm, nnx.Param, ...)

    def run(params, statistics, x, weights):
        norm = nnx.merge(graphdef, params, nnx.clone(statistics))
        y = norm(x)
        # Gradients alone come back: the sum of y would need one more sum over devices.
        return jnp.sum(y * weights), (y, nnx.state(norm, nnx.BatchStat))

    graded = jax.grad(run, argnums=(0, 2), has_aux=True)
    step = data_parallel.on_mesh(mesh, graded) if type(norm) is nn.BatchNorm else graded
    compiled = jax.jit(step).lower(params, statistics, x, weights).compile()
    return jax.tree.leaves(compiled(params, statistics, x, weights)), collectives(compiled)


for dtype, options in ((jnp.float32, {}), (jnp.bfloat16, {"use_scale": False, "use_bias": False})):
    x, weights = draw(8, 3, 5, 6).astype(dtype), draw(8, 3, 5, 6).astype(dtype)
    norm = nnx.BatchNorm(6, momentum=0.8, dtype=dtype, rngs=nnx.Rngs(0), **options)
    if not options:
        norm.scale[...], norm.bias[...] = jnp.arange(1.0, 7), jnp.arange(6.0)
    (wanted, theirs), (got, ours) = (
        normalized(n, x, weights) for n in (norm, nn.BatchNorm.from_float(norm))
    )
    assert [a.dtype for a in wanted] == [a.dtype for a in got]
    errors = [
        float(jnp.linalg.norm((a - b).astype(float)) / jnp.linalg.norm(a.astype(float)))
        for a, b in zip(wanted, got)
    ]
    found[str(jnp.dtype(dtype))] = {"errors": errors, "ours": ours, "theirs": theirs}

x = draw(8, 4, 4, 3).astype(jnp.float32)
for signed in (False, True):
    def step(x):
        return quantizers.uniq_activation_initial_step(x, bits=2, signed=signed)

    compiled = [
        jax.jit(f).lower(x).compile() for f in (step, data_parallel.on_mesh(mesh, step))
    ]
    plain, ordered = (float(c(x)) for c in compiled)
    found[f"step {signed}"] = {
        "errors": [abs(plain - ordered) / plain],
        "ours": collectives(compiled[1]), "theirs": collectives(compiled[0]),
    }


def inside(x):
    found["parts"].append(data_parallel.parts(len(x)))
    return x


found["parts"] = [data_parallel.parts(8)]
jax.eval_shape(data_parallel.on_mesh(mesh, inside), jnp.zeros(8))
jax.eval_shape(data_parallel.on_mesh(mesh, inside), jnp.zeros(6))
shared = jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
jax.eval_shape(data_parallel.on_mesh(mesh, shared), jnp.zeros(16))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(quick_compilation):
    flags = quick_compilation["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, **quick_compilation, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_a_batch_norm_is_that_of_the_whole_batch(found):
    assert len(found["float32"]["errors"]) == 6  # scale, bias, x, y, mean and var
    assert max(found["float32"]["errors"]) < 1e-5
    assert len(found["bfloat16"]["errors"]) == 4
    assert max(found["bfloat16"]["errors"]) < 1e-2


def test_calibration_finds_the_step_of_the_whole_batch(found):
    assert max(found[f"step {signed}"]["errors"][0] for signed in (False, True)) < 1e-6


def test_one_message_goes_forward_and_one_back(found):
    """All-reduces alone, of parts and zeros: what Gloo's all-gathers bring is not always right."""
    for dtype in ("float32", "bfloat16"):
        assert found[dtype]["ours"] == [0, 2]
    assert found["step False"]["ours"] == [0, 1]
    assert found["step True"]["ours"] == [0, 2]


def test_a_batch_is_cut_where_it_can_be(found):
    # Outside of a mesh, inside, one that doesn't divide, and within `jax.shard_map`.
    assert found["parts"] == [1, 4, 1, 1]


def test_on_one_device_it_is_the_float_layer():
    x = jnp.arange(24.0).reshape(4, 2, 3)
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    ours = nn.BatchNorm.from_float(norm)
    texts = [str(jax.make_jaxpr(lambda x, n=n: nnx.clone(n)(x))(x)) for n in (norm, ours)]
    assert data_parallel.on_mesh(mesh, lambda: data_parallel.parts(4))() == 1
    assert texts[0] == texts[1]
