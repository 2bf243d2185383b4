"""Parameters spread over the axis "model": the same training as on one device."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from uniq_jax.train import sharding
from uniq_jax.train.checkpoints import read_model

CHILD = """
import json, pathlib, sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from flax import nnx
from uniq_jax import config as c, models
from uniq_jax.train import sharding, start
from uniq_jax.train.accumulation import cut
from uniq_jax.train.checkpoints import Checkpoints, Progressed
from uniq_jax.train.run import Run
from uniq_jax.train.network import split

out, method, meshes, taught = pathlib.Path(sys.argv[1]), *sys.argv[2:]
OPTIONS = {"width": 8}
MESHES = {"one": (1, 1), "data": (4, 1), "model": (2, 2)}


def float_file(seed):
    model = models.create("resnet8", num_classes=10, in_features=1, param_dtype=jnp.float64,
                          rngs=nnx.Rngs(seed), **OPTIONS)
    # Fresh batch-norm biases are 0, and a mean of a few low-bit sums may equal one of them
    # exactly: the ReLU's gradient there hangs on the last bit. Trained parameters have no such tie.
    rng = np.random.default_rng(seed)
    params, statistics = split(model)
    arrays = {p: np.asarray(v) + 0.01 * rng.standard_normal(v.shape) for p, v in params.items()}
    path = out / f"float{seed}.npz"
    np.savez(path, **arrays, **{p: np.asarray(v) for p, v in statistics.items()})
    return str(path)


def shards(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(leaf.shape), list(leaf.addressable_shards[0].data.shape)
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def arrays_of(tree, prefix):
    return {
        f"{prefix}:{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def train(method, where):
    data, model = MESHES[where]
    config = c.base()
    config.data.batch_size, config.data.eval_batch_size = 32, 180
    config.data.train_split, config.data.augment = "train[:256]", "crop"
    config.model.name, config.model.options = "resnet8", OPTIONS
    config.model.dtype = config.model.param_dtype = "float64"
    config.mesh = {"data": 4 // model, "model": model}
    config.phases = ("quantized",)
    config.quantized = c.phase(
        method, **WIDTHS, ema_decay=0.8,
        optimizer={"learning_rate": 0.02, "weight_decay": 0.0},
        loss=LOSS,
    )
    spec = c.run_spec(config)
    phase, run = spec.phases[0], Run(spec)
    if where == "one":
        run.mesh = sharding.create_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    program = run.program(phase)
    build = run.builder(phase)
    state = start.fresh_state(build, program, run.mesh)
    source = start.read_source(SOURCE)
    state, report = start.take(source, state, program)
    state = start.restart_weight_quantizers(program, state, report)
    with run.train_batches() as batches:
        batches = [run.place(next(batches)) for _ in range(STEPS)]
    if WIDTHS:
        state = start.calibrate(program, state, batches[:2], 2)
    state = start.restart_averages(state)
    start_shards = shards(state)
    teacher = run.teacher(phase)
    step, line = run.compiled_step(phase, program, state, teacher)
    arrays, losses = arrays_of(state.params, "calibrated"), []
    for i, batch in enumerate(batches):
        state, metrics = step(state, batch, teacher)
        losses.append(float(metrics["loss"]))
        if i == 0:  # Without decay, the first momentum is the gradient.
            arrays |= arrays_of(state.opt_state[1].trace, "gradient")
    arrays |= arrays_of(state.params, "param") | arrays_of(state.statistics, "stat")
    estimated = run.estimate_statistics(program, *state.evaluated, 2)
    state = state.with_evaluated_statistics(estimated)
    arrays |= arrays_of(state.averages, "average")
    result = {"losses": losses, "line": line, "start_shards": start_shards,
              "shards": shards(state), **run.evaluator(program)(*state.evaluated)}
    np.savez(out / f"{method}-{where}.npz", **arrays)
    if where == "model":
        with_checkpoint(run, build, program, state)
    return result


def with_checkpoint(run, build, program, state):
    # What lies on a mesh with two parts of everything is read back there, and on another mesh.
    checkpoints = Checkpoints(out / "checkpoints")
    checkpoints.save(3, state, Progressed({}, 0.5, 1.0))
    for mesh in (run.mesh, sharding.create_mesh({"data": 4, "model": 1})):
        wanted = start.abstract_state(build, program, mesh)
        step, restored, _ = checkpoints.restore(wanted)
        assert step == 3
        for a, b, place in zip(*map(jax.tree.leaves, (state, restored, wanted))):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            assert b.sharding == place.sharding
    checkpoints.close()


def cut_program():
    spread = sharding.batch_sharding(sharding.create_mesh({"data": 4, "model": 1}))
    images = jax.ShapeDtypeStruct((32, 8, 8, 1), jnp.uint8, sharding=spread)
    compiled = jax.jit(lambda images: cut(images, 4)).lower(images).compile()
    return {"text": compiled.as_text(), "spec": [str(s) for s in compiled.output_shardings.spec]}


STEPS, SOURCE, LOSS = 6, float_file(7), {}
WIDTHS = {} if method == "float" else {"weight_bits": 2, "activation_bits": 2}
if taught == "taught":
    LOSS = {"teacher": float_file(8), "teacher_model": "resnet8", "teacher_options": OPTIONS,
            "teacher_weight": 0.5}
results = {where: train(method, where) for where in meshes.split(",")}
(out / "results.json").write_text(json.dumps({"runs": results, "cut": cut_program()}))
"""


def run_child(directory, quick_compilation, *arguments):
    flags = quick_compilation["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), *arguments],
        env={**os.environ, **quick_compilation, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads((directory / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_compilation):
    """UniQ's weights and N2UQ's activations on two meshes: directory and results."""
    directory = tmp_path_factory.mktemp("meshes")
    return directory, run_child(directory, quick_compilation, "uniq_n2uq", "one,model", "untaught")


def check_alike(directory, results, method):
    """One device is what the other meshes are held against."""
    runs = results["runs"]
    one = dict(np.load(directory / f"{method}-one.npz"))
    for where in [name for name in runs if name != "one"]:
        assert runs[where]["test_count"] == 360
        assert runs[where]["test_accuracy"] == runs["one"]["test_accuracy"]
        np.testing.assert_allclose(runs[where]["losses"], runs["one"]["losses"], rtol=1e-9)
        other = dict(np.load(directory / f"{method}-{where}.npz"))
        assert one.keys() == other.keys()
        for name, array in one.items():
            kind, _, path = name.partition(":")
            size, error = np.linalg.norm(array), np.linalg.norm(array - other[name])
            if kind == "gradient":
                # A scale before a batch norm has a gradient of rounding size.
                largest = max(np.linalg.norm(a) for n, a in one.items() if n.startswith(kind))
                assert error <= 1e-5 * max(size, 1e-4 * largest), (where, name)
            elif path.endswith(("/mean", "/var")):  # Statistics are float32.
                assert error <= 1e-6 * max(size, 1), (where, name)
            else:
                assert error <= 1e-9 * max(size, 1), (where, name)


def test_every_mesh_trains_as_one_device_does(trained):
    check_alike(*trained, "uniq_n2uq")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uniq", "n2uq", "lsq", "float"])
def test_every_method_trains_alike_on_every_mesh(method, tmp_path, quick_compilation):
    results = run_child(tmp_path, quick_compilation, method, "one,data,model", "taught")
    check_alike(tmp_path, results, method)


def test_large_arrays_lie_in_parts_and_small_ones_everywhere(trained):
    runs = trained[1]["runs"]
    assert all(whole == part for whole, part in runs["one"]["shards"].values())
    shards = runs["model"]["shards"]
    # Where an array lies never changes.
    assert shards == runs["model"]["start_shards"]
    parts = {path: part for path, (whole, part) in shards.items() if whole != part}
    kernels = {
        "layer3/0/conv1/kernel": [3, 3, 16, 16],
        "layer3/0/conv2/kernel": [3, 3, 32, 16],
    }
    expected = {f"params/{path}": part for path, part in kernels.items()}
    expected |= {f"averages/{path}": part for path, part in kernels.items()}
    expected |= {f"opt_state/1/trace/{path}": part for path, part in kernels.items()}
    assert parts == expected
    # They are most of the state.
    total = sum(np.prod(whole) for whole, _ in shards.values())
    assert sum(np.prod(part) for part in parts.values()) * 2 > 0.7 * total


def test_parameters_are_read_on_other_devices_than_they_were_saved_on(trained):
    directory, _ = trained
    assert len(jax.devices()) < 4
    found = read_model(directory / "checkpoints")
    arrays = np.load(directory / "uniq_n2uq-model.npz")
    expected = {n.partition(":")[2]: a for n, a in arrays.items() if n.startswith("average:")}
    assert found.keys() == expected.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path])


def test_a_batch_is_cut_without_communication(trained):
    found = trained[1]["cut"]
    assert found["spec"][:2] == ["None", "data"]
    for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert word not in found["text"], word


def test_the_rule_of_placement():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))

    def spec(*shape):
        array = jax.ShapeDtypeStruct(shape, np.float32)
        return sharding.state_shardings(mesh, {"a": array})["a"].spec

    assert spec(3, 3, 64, 128) == PartitionSpec(None, None, None, "model")
    assert spec(3, 3, 128, 64) == PartitionSpec(None, None, "model")
    assert spec(64, 64) == PartitionSpec(None, "model")  # The last of equal axes.
    assert spec(1024, 1001) == PartitionSpec("model")
    # Nothing to divide, too small, or a vector.
    for shape in ((1023, 1001), (3, 3, 8, 8), (64, 63), (8192,), ()):
        assert spec(*shape) == PartitionSpec(), shape
