"""One process with four devices and two with two train alike, on photos at 224 x 224.

`make distributed` runs this: the config of N2UQ's ResNet-18, by both methods, with a teacher,
through the command and the real reading path. It takes minutes, and prints what it compares.

The two sum over devices in another order. In float32 the last bit of a batch norm's mean puts a
few of millions of activations on the other side of a threshold: the first losses agree to 1e-7, but
the first gradients' norms to 1e-3 only, and the next steps part. In float64 there is none,
unless sums of integers meet their own mean, where a fresh batch norm puts the ReLU's corner: UniQ
starts there from biases that are not zero. Then the first step's loss and every array of its
gradient must agree to 1e-5. One thing is left to chance: where two sums of UniQ's 8-bit first layer
are equal, rounding decides which of them max-pooling takes, and that channel's gradient follows.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import flax.nnx as nnx
import numpy as np
import pytest

from uniq_jax import interop, models
from uniq_jax.train.logs import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.data]

ROOT = pathlib.Path(__file__).parents[1]
BATCH, STEPS, EXAMPLES = 8, 20, 80

# The command, which besides notes what rows of every batch this process got, and keeps the state
# after the first step: the optimizer's holds the gradient.
CHILD = """
import json, sys, zlib
import jax, numpy as np
from uniq_jax import main
from uniq_jax.train import run

out, rows = sys.argv.pop(1), []
compiled = run.Run.compiled_step

def compiled_step(self, *arguments):
    step_fn, line = compiled(self, *arguments)

    def step(state, batch, teacher):
        here = {}
        for shard, images in zip(*(batch[k].addressable_shards for k in ("label", "image"))):
            first = shard.index[0].start or 0
            labels, images = np.asarray(shard.data), np.asarray(images.data)
            for i, (label, image) in enumerate(zip(labels, images)):
                here[first + i] = [int(label), zlib.crc32(image.tobytes())]
        rows.append(here)
        new, metrics = step_fn(state, batch, teacher)
        if len(rows) == 1:
            leaves = jax.tree_util.tree_leaves_with_path(new)
            arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
            np.savez(f"{out}.npz", **arrays)
        with open(f"{out}.json", "w") as file:
            json.dump([jax.process_count(), len(jax.devices()), rows], file)
        return new, metrics

    return step, line

run.Run.compiled_step = compiled_step
sys.argv[0] = "uniq_jax.main"
main.run()
"""


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """Float weights of a ResNet-18 under torchvision's names, seeded; also to start from."""
    model = nnx.jit(lambda: models.create("resnet18", num_classes=1000, rngs=nnx.Rngs(7)))()
    rng = np.random.default_rng(7)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.bias[...] = rng.normal(0, 0.1, module.bias.shape).astype(np.float32)
    path = tmp_path_factory.mktemp("teacher") / "resnet18.safetensors"
    interop.write_state_dict(path, interop.to_torch_state_dict(model))
    return path


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(directory, method, processes, data_dir, teacher_file, *, steps=STEPS, dtype="float32"):
    """Runs the command in so many processes, four devices in all; returns what they left."""
    # XLA has no fast convolutions of float64 on a CPU: half a batch is enough there.
    batch = BATCH if dtype == "float32" else BATCH // 2
    epochs = steps * batch / EXAMPLES
    config = f"configs/resnet18_w2a2.py:method={method},epochs={epochs}"
    config += f",teacher={teacher_file},teacher_model=resnet18"
    arguments = [
        f"--config={config}",
        f"--workdir={directory / 'run'}",
        f"--config.data.data_dir={data_dir}",
        f"--config.data.batch_size={batch}",
        f"--config.data.test_split=validation[:{4 if steps == 1 else 20}]",
        f"--config.data.eval_batch_size={4 if steps == 1 else 20}",
        "--config.log_every_steps=1",
        "--config.checkpoint_every_steps=0",
        "--config.layer_metrics_every_steps=0",
        f"--config.eval_every_epochs={epochs}",
        "--config.tensorboard=False",
        "--config.export.formats=",
        f"--config.model.dtype={dtype}",
        f"--config.model.param_dtype={dtype}",
    ]
    if method == "uniq":
        arguments.append("--config.quantized.calibration_batches=2")
        if dtype == "float64":
            arguments.append(f"--config.init_from={teacher_file}")
    if processes > 1:
        arguments += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_X64"] = str(int(dtype == "float64"))
    directory.mkdir()
    children = []
    for i in range(processes):
        log = open(directory / f"log{i}", "w")  # noqa: SIM115
        own = [f"--process_id={i}"] if processes > 1 else []
        command = [sys.executable, "-c", CHILD, str(directory / str(i)), *arguments, *own]
        children.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        )
        log.close()
    try:
        codes = [child.wait(timeout=1800) for child in children]
    finally:
        for child in children:
            child.kill()
    logs = [(directory / f"log{i}").read_text() for i in range(processes)]
    assert codes == [0] * processes, "\n".join(logs)
    notes = [json.loads((directory / f"{i}.json").read_text()) for i in range(processes)]
    assert all(note[:2] == [processes, 4] for note in notes)
    # Row of the global batch → label and checksum of its image, from whichever process has it.
    batches = []
    for step in range(steps):
        parts = [note[2][step] for note in notes]
        assert sum(map(len, parts)) == batch, "a row that two processes read, or none"
        merged = {int(row): value for part in parts for row, value in part.items()}
        batches.append([merged[row] for row in range(batch)])
    metrics = [r for r in read_metrics(directory / "run") if "loss" in r]
    states = [dict(np.load(directory / f"{i}.npz")) for i in range(processes)]
    return batches, metrics, states, logs


METHODS = pytest.mark.parametrize("method", ["uniq", "n2uq"])


@METHODS
def test_one_process_and_two_train_alike(method, cifar10_dir, teacher_file, tmp_path, capsys):
    one, two = (
        train(tmp_path / name, method, processes, cifar10_dir, teacher_file)
        for name, processes in (("one", 1), ("two", 2))
    )
    # The same examples with the same crops, each exactly once per epoch.
    assert one[0] == two[0]
    epoch = EXAMPLES // BATCH
    labels = [[label for batch in one[0][i : i + epoch] for label, _ in batch] for i in (0, epoch)]
    assert labels[0] != labels[1]
    for order in labels:
        assert len(set(order)) == len(order) == EXAMPLES  # Every image has a class of its own.
    assert set(labels[0]) == set(labels[1])
    differences = []
    for a, b in zip(one[1], two[1], strict=True):
        differences.append([abs(a[k] - b[k]) / abs(a[k]) for k in ("loss", "gradient_norm")])
    assert len(differences) == STEPS
    with capsys.disabled():
        print(f"\n{method}: one process, and how two differ from it, relatively")
        print("step       loss  gradient norm   differences")
        for record, parts in zip(one[1], differences):
            numbers = f"{record['loss']:10.6f} {record['gradient_norm']:14.6f}"
            print(f"{record['step']:4} {numbers}   {parts[0]:.1e}  {parts[1]:.1e}")
    for name, array in two[2][0].items():
        np.testing.assert_array_equal(array, two[2][1][name], err_msg=name)
    assert differences[0][0] <= 1e-5
    assert differences[0][1] <= 1e-3
    # What only process 0 says.
    assert "test accuracy" in two[3][0]
    assert "test accuracy" not in two[3][1]


@METHODS
def test_all_gradients_of_the_first_step_agree(method, cifar10_dir, teacher_file, tmp_path, capsys):
    one, two = (
        train(tmp_path / name, method, n, cifar10_dir, teacher_file, steps=1, dtype="float64")
        for name, n in (("one", 1), ("two", 2))
    )
    assert one[0] == two[0]
    first, second = one[2][0], two[2][0]
    moved = 0
    if method == "uniq":
        stem = [name for name in first if "['conv1/" in name]
        kernel = next(name for name in stem if "opt_state" in name and "kernel" in name)
        difference = np.abs(first[kernel] - second[kernel]).max((0, 1, 2))
        moved = int(np.sum(difference > 1e-5 * np.abs(first[kernel]).max()))
        first, second = ({k: v for k, v in s.items() if k not in stem} for s in (first, second))
    arrays = compare_states(first, second)
    with capsys.disabled():
        print(
            f"\n{method}, step 1 in float64: the array of each kind that differs most, relatively"
        )
        for kind, (difference, name) in arrays.items():
            print(f"  {kind}: {difference:.1e} ({name})")
        print(f"  channels of the first kernel in which max-pooling took another sum: {moved}")
    for key in ("loss", "gradient_norm"):
        np.testing.assert_allclose(one[1][0][key], two[1][0][key], rtol=1e-5)
    for kind, (difference, name) in arrays.items():
        assert difference <= 1e-5, (kind, name)
    assert moved <= 3


def compare_states(one, two):
    """For each kind of array, the largest relative difference, and of which array.

    The gradient is what the optimizer holds after its first step.
    """
    assert one.keys() == two.keys()
    kinds = {}
    for name in one:
        kind = "gradients" if "opt_state" in name else name.split("[")[0].strip(".")
        kinds.setdefault(kind, []).append(name)
    worst = {}
    for kind, names in kinds.items():
        norms = {name: float(np.linalg.norm(one[name])) for name in names}
        # An array whose gradient is zero but for rounding has no digits to compare.
        floor = 1e-4 * max(norms.values())
        worst[kind] = max(
            (float(np.linalg.norm(one[name] - two[name])) / max(norms[name], floor), name)
            for name in names
        )
    return worst
