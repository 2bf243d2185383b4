"""The trainings behind the README's table of accuracies, and how they are run side by side."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

WORKDIRS = pathlib.Path("runs/results")

_CIFAR10 = "configs/cifar10_resnet20_w2a2.py"
_FLOAT = "runs/weights/cifar10_resnet20.npz"
_TEACHER = "teacher=runs/weights/cifar10_resnet56.npz,teacher_model=resnet56"
_LOGGING = {
    "log_every_steps": 100,
    "layer_metrics_every_steps": 0,
    "eval_every_epochs": 10.0,
    "tensorboard": False,
    "export.formats": "packed",
    "export.check_images": 5000,
}
_SGD = {"name": "sgd", "learning_rate": 0.02, "weight_decay": 5e-4, "warmup_epochs": 0.0}
"""Of UniQ, as its recipe, for twice the batch."""
_SOFT = {"teacher_temperature": 4.0}
"""The teacher knows its training images by heart: at temperature 1 it says little but the label."""


def _digits(name: str, seed: int) -> list[str]:
    return [f"--config=configs/{name}.py:seed={seed}", "--config.export.check_images=360"]


def _cifar10(
    argument: str, optimizer: dict[str, Any], loss: dict[str, Any] | None = None
) -> list[str]:
    """CIFAR-10 at a batch of 256, from a float network of 91.30 %."""
    settings = {"data.data_dir": "runs/tfds", "data.batch_size": 256, "init_from": _FLOAT}
    settings |= _LOGGING | {f"quantized.optimizer.{k}": v for k, v in optimizer.items()}
    settings |= {f"quantized.loss.{k}": v for k, v in (loss or {}).items()}
    return [f"--config={_CIFAR10}:{argument}", *(f"--config.{k}={v}" for k, v in settings.items())]


RUNS: dict[str, list[str]] = {
    **{
        f"digits_w{bits}a{bits}_s{seed}": _digits(f"digits_w{bits}a{bits}", seed)
        for bits in (2, 1)
        for seed in range(3)
    },
    **{
        f"cifar10_uniq_w{bits}a{bits}_labels_s0": _cifar10(f"bits={bits},epochs=20", _SGD)
        for bits in (4, 3, 2)
    },
    **{
        f"cifar10_uniq_w{bits}a{bits}_soft_teacher_s0": _cifar10(
            f"bits={bits},epochs={epochs},{_TEACHER}", _SGD, _SOFT
        )
        for bits, epochs in ((4, 25), (3, 25))
    },
    "cifar10_uniq_w4a4_teacher_s0": _cifar10(
        f"bits=4,epochs=30,{_TEACHER}", {**_SGD, "learning_rate": 0.1, "weight_decay": 1e-4}
    ),
}
"""Name → arguments of `uniq_jax.main`."""


def train(names: Sequence[str], jobs: int) -> int:
    """Trains runs, several at a time; what is finished stays, what was begun goes on.

    A signal to end is passed on, and each run saves where it is.

    Returns:
      How many did not finish.
    """
    waiting, running, failed = list(names), {}, 0
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        for process in running.values():
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while running or (waiting and not stopped):
        while waiting and len(running) < jobs and not stopped:
            name = waiting.pop(0)
            workdir = WORKDIRS / name
            workdir.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "uniq_jax.main", *RUNS[name], f"--workdir={workdir}"]
            with open(workdir / "log.txt", "a", encoding="utf-8") as log:
                # A group of its own: the terminal's signals come through this process.
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=log, start_new_session=True
                )
            print(f"{name}: trains, see {workdir / 'log.txt'}", flush=True)
        time.sleep(0.2)
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            failed += process.returncode != 0
            result = WORKDIRS / name / "result.json"
            if process.returncode == 0:
                accuracy = json.loads(result.read_text(encoding="utf-8"))["test_accuracy"]
                print(f"{name}: {100 * accuracy:.2f}%", flush=True)
            else:
                print(f"{name}: ended with exit status {process.returncode}", flush=True)
    return failed + len(waiting)
