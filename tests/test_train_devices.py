"""One device and four agree: gradients, parameters after training, and evaluation."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

CHILD = """
import dataclasses, json, sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from uniq_jax import config as c
from uniq_jax.train import start
from uniq_jax.train.run import Run
from uniq_jax.train.step import train_step

sys.path.insert(0, "tests")
import small_runs

out = sys.argv[1]
small_runs.make_known()
results, arrays = {}, {}


def check(method):
    config = c.base()
    config.data.batch_size = 32
    config.data.eval_batch_size = 52
    config.data.augment = "crop"
    config.model.name = "small"
    config.model.dtype = config.model.param_dtype = "float64"
    config.phases = ("quantized",)
    bits = {} if method == "float" else {"weight_bits": 2, "activation_bits": 2}
    config.quantized = c.phase(method, **bits, optimizer={"learning_rate": 0.02})
    spec = c.run_spec(config)
    run = Run(spec)
    assert len(run.test_data) % 52
    program = run.program(spec.phases[0])
    state = start.fresh_state(run.builder(spec.phases[0]), program, run.mesh)
    with run.train_batches() as batches:
        batches = [run.place(next(batches)) for _ in range(20)]
    assert len(batches[0]["image"].sharding.device_set) == len(jax.devices())
    if method != "float":
        state = start.calibrate(program, state, batches[:3], 3)
    # Fresh batch-norm biases are 0, and a mean of a few low-bit sums may equal one of them
    # exactly: the ReLU's gradient there hangs on the last bit. Trained parameters have no such tie.
    rng = np.random.default_rng(0)
    moved = {p: v + 0.01 * rng.standard_normal(v.shape) for p, v in state.params.items()}
    placed = {p: jax.device_put(v, state.params[p].sharding) for p, v in moved.items()}
    state = dataclasses.replace(state, params=placed)

    def loss_of(params):
        model = program.build(params, state.statistics)
        model.train()
        logits = model(program.normalize(batches[0]["image"]))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(32), batches[0]["label"]])

    grads = jax.jit(jax.grad(loss_of))(state.params)
    step_fn = run.train_step(program, state)
    losses = []
    for batch in batches:
        state, metrics = step_fn(state, batch)
        losses.append(float(metrics["loss"]))
    values = run.evaluator(program)(state.params, state.statistics)
    for kind, tree in (("grad", grads), ("param", state.params), ("stat", state.statistics)):
        arrays.update({f"{method}:{kind}:{path}": np.asarray(v) for path, v in tree.items()})
    results[method] = {"losses": losses, **values}


for method in ("uniq", "n2uq"):
    check(method)
assert all(array.dtype == np.float64 for name, array in arrays.items() if ":stat:" not in name)
np.savez(out, **arrays)
print(json.dumps({"devices": len(jax.devices()), "methods": results}))
"""


def test_one_device_and_four_agree(tmp_path, quick_compilation):
    results, arrays = [], []
    for devices in (1, 4):
        flags = quick_compilation["XLA_FLAGS"]
        flags += f" --xla_force_host_platform_device_count={devices}"
        out = tmp_path / f"{devices}.npz"
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(out)],
            env={**os.environ, **quick_compilation, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        results.append(json.loads(child.stdout.splitlines()[-1]))
        arrays.append(dict(np.load(out)))
    assert [result["devices"] for result in results] == [1, 4]
    for method, one in results[0]["methods"].items():
        four = results[1]["methods"][method]
        assert one["test_count"] == four["test_count"] == 360
        assert one["test_accuracy"] == four["test_accuracy"]
        np.testing.assert_allclose(one["losses"], four["losses"], rtol=1e-9)
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        method, kind, _ = name.split(":")
        size, error = np.linalg.norm(array), np.linalg.norm(array - arrays[1][name])
        if kind == "grad":
            # A scale before a batch norm has a gradient of rounding size.
            gradients = [a for n, a in arrays[0].items() if n.startswith(f"{method}:grad:")]
            floor = 1e-4 * max(map(np.linalg.norm, gradients))
            assert error <= 1e-5 * max(size, floor), name
        elif kind == "param":
            assert error <= 1e-9 * max(size, 1), name
        else:  # Running statistics are float32.
            assert error <= 1e-6 * max(size, 1), name
