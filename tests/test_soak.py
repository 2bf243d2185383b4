"""One training, killed 30 times at random moments, and what is left of it."""

import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from uniq_jax.train.checkpoints import read_model
from uniq_jax.train.logs import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.data]

KILLS = 30
MOST_STEPS_BETWEEN = 6
PHASES = ("float", "quantized")

# 64 steps of the first phase and 128 of the second: enough for 30 kills, each at least a step
# further than the one before.
CONFIG = """
from uniq_jax import config as c

def get_config(arg=None):
    config = c.base()
    config.data.batch_size = 32
    config.data.augment = "crop_flip"
    config.data.train_split = "train[:1024]"
    config.data.test_split = "test[:300]"
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.phases = ("float", "quantized")
    config.float = c.phase("float", total_epochs=2.0)
    config.quantized = c.phase("uniq_n2uq", weight_bits=2, activation_bits=2, total_epochs=4.0,
                               calibration_batches=2, optimizer={"learning_rate": 0.01},
                               ema_decay=0.9, batch_norm_batches=2)
    config.eval_every_epochs = 0.25
    config.checkpoint_every_steps = 2
    config.log_every_steps = 1
    config.export.formats = ""
    return config
"""


@pytest.fixture(scope="module")
def arguments(request, tmp_path_factory):
    """Of the command: CIFAR-10 where it is, else digits."""
    file = tmp_path_factory.mktemp("config") / "soak.py"
    file.write_text(CONFIG)
    try:
        directory = request.getfixturevalue("cifar10_dir")
    except pytest.skip.Exception:
        return [f"--config={file}"]
    return [
        f"--config={file}",
        "--config.data.name=cifar10",
        f"--config.data.data_dir={directory}",
    ]


def start(arguments, workdir, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "uniq_jax.main", *arguments, f"--workdir={workdir}"],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def position(workdir):
    """Steps of all phases that the log has."""
    if not (workdir / "metrics.jsonl").exists():
        return 0
    last = {r["phase"]: r["step"] for r in read_metrics(workdir)}
    return sum(last.values())


def wait_for(process, workdir, steps):
    deadline_s = time.monotonic() + 600
    while position(workdir) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s, f"step {steps} was not reached"
        time.sleep(0.01)


def shared_memory():
    directory = pathlib.Path("/dev/shm")
    return set(directory.iterdir()) if directory.is_dir() else set()


def test_thirty_kills_leave_no_trace(arguments, tmp_path, quick_compilation):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**quick_compilation, "TMPDIR": str(temporary)}
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    segments = shared_memory()
    started_s = time.monotonic()
    process = start(arguments, undisturbed, environment)
    wait_for(process, undisturbed, 1)
    startup_s = time.monotonic() - started_s
    output, _ = process.communicate()
    assert process.returncode == 0, output
    undisturbed_s = time.monotonic() - started_s

    rng, reached, begun_s = random.Random(0), [], time.monotonic()
    for kill in range(KILLS):
        process = start(arguments, workdir, environment)
        if rng.random() < 0.25:  # Most of these hit the start: imports, data, reading, compiling.
            time.sleep(rng.uniform(0, startup_s))
        else:
            wait_for(process, workdir, position(workdir) + rng.randint(1, MOST_STEPS_BETWEEN))
            time.sleep(rng.choice((0, rng.uniform(0, 0.05), rng.uniform(0, 0.5))))
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -9, f"ended before kill {kill + 1}: {output}"
        reached.append(position(workdir))
    process = start(arguments, workdir, environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    print(f"\n{KILLS} kills after steps {reached}, in {time.monotonic() - begun_s:.0f} s")
    print(f"undisturbed: {undisturbed_s:.0f} s, of which {startup_s:.0f} s to the first step")

    assert read_metrics(workdir) == read_metrics(undisturbed)
    for phase in PHASES:
        for kind in ("checkpoints", "best"):
            arrays = [read_model(d / phase / kind) for d in (undisturbed, workdir)]
            assert arrays[0].keys() == arrays[1].keys()
            for path in arrays[0]:
                assert arrays[0][path].tobytes() == arrays[1][path].tobytes(), (phase, kind, path)
    names = [path.name for path in workdir.rglob("*")]
    assert not [name for name in names if "tmp" in name.lower()]
    assert not list(temporary.iterdir())
    assert not shared_memory() - segments
