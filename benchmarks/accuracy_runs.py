"""The trainings behind the README's table of accuracies, and how they are run side by side."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

sys.path.append(str(pathlib.Path(__file__).parents[1] / "launch"))

from side_by_side import STOPPED, run_all

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
"""The teacher knows its training images by heart: at 1 it says little but the label."""


def _digits(name: str, seed: int) -> list[str]:
    return [f"--config=configs/{name}.py:seed={seed}", "--config.export.check_images=360"]


_UNIQ_ADAM = {
    "name": "adam",
    "learning_rate": 1.25e-3,
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
    "quantizer_rate_multiplier": 0.1,
}
"""UniQ by N2UQ's optimizer, but by a cosine to 0."""
_N2UQ = {"learning_rate": 1.25e-3}
"""Of N2UQ, as its recipe."""
_W4A4 = "cifar10_uniq_w4a4_soft_teacher_s0"


def _cifar10(
    argument: str,
    optimizer: dict[str, Any],
    loss: dict[str, Any] | None = None,
    *,
    start: str = _FLOAT,
) -> list[str]:
    """CIFAR-10 at a batch of 256, from a float network of 91.30 % unless `start` is another."""
    settings = {"data.data_dir": "runs/tfds", "data.batch_size": 256, "init_from": start}
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
    "cifar10_uniq_w4a4_teacher_s0": _cifar10(
        f"bits=4,epochs=30,{_TEACHER}", {**_SGD, "learning_rate": 0.1, "weight_decay": 1e-4}
    ),
    _W4A4: _cifar10(f"bits=4,epochs=25,{_TEACHER}", _SGD, _SOFT),
    **{
        f"cifar10_{method}_w4a4_soft_teacher_s0": _cifar10(
            f"bits=4,method={method},epochs=10,{_TEACHER}", _N2UQ, _SOFT
        )
        for method in ("n2uq", "uniq_n2uq")
    },
    **{
        f"cifar10_{method}_w{bits}a{bits}_soft_teacher_s0": _cifar10(
            f"bits={bits},method={method},epochs={epochs},{_TEACHER}",
            _N2UQ,
            _SOFT,
            start=f"{WORKDIRS}/{_W4A4}",
        )
        for method in ("n2uq", "uniq_n2uq")
        for bits, epochs in ((3, 12), (2, 25))
    },
    "cifar10_uniq_w3a3_soft_teacher_s0": _cifar10(
        f"bits=3,epochs=25,{_TEACHER}", _SGD, _SOFT, start=f"{WORKDIRS}/{_W4A4}"
    ),
    **{
        f"cifar10_uniq_w{bits}a{bits}_soft_teacher_s{seed}": _cifar10(
            f"{argument},epochs={epochs},{_TEACHER},seed={seed}",
            _UNIQ_ADAM,
            _SOFT,
            start=f"{WORKDIRS}/{_W4A4}",
        )
        for bits, argument, epochs in ((2, "bits=2", 55), (1, "bits=1,granularity=channel", 75))
        for seed in (0, 1)
    },
}
"""Name → arguments of `uniq_jax.main`."""


def start_of(name: str) -> str | None:
    """The run that another one starts from; None where that is a float network, or fresh."""
    starts = [a.partition("=")[2] for a in RUNS[name] if a.startswith("--config.init_from=")]
    paths = [pathlib.Path(start) for start in starts]
    return next((path.name for path in paths if path.parent == WORKDIRS), None)


def train(names: Sequence[str], jobs: int) -> int:
    """Trains runs, several at a time; what is finished stays, what was begun goes on.

    A run that starts from another one comes after it, and only if that has finished.

    Returns:
      How many did not finish.
    """
    missing = 0
    waiting = list(names)
    while waiting:
        stage = [name for name in waiting if start_of(name) not in waiting]
        waiting = [name for name in waiting if name not in stage]
        ready = []
        for name in stage:
            start = start_of(name)
            if start is None or (WORKDIRS / start / "result.json").is_file():
                ready.append(name)
            else:
                print(f"{name}: not trained, as what it starts from, {start}, has not finished")
        statuses = _train(ready, jobs)
        missing += len(stage) - sum(status == 0 for status in statuses.values())
        if len(statuses) < len(ready) or STOPPED in statuses.values():  # By a signal.
            return missing + len(waiting)
    return missing


def _train(names: Sequence[str], jobs: int) -> dict[str, int]:
    """Trains runs that need not wait for one another; their exit statuses, of those that began."""

    def command(name: str) -> list[str]:
        workdir = f"--workdir={WORKDIRS / name}"
        return [sys.executable, "-m", "uniq_jax.main", *RUNS[name], workdir]

    def log(name: str) -> pathlib.Path:
        return WORKDIRS / name / "log.txt"

    def ended(name: str, status: int) -> None:
        text = f"ended with exit status {status}"
        if status == 0:
            result = json.loads((WORKDIRS / name / "result.json").read_text(encoding="utf-8"))
            text = f"{100 * result['test_accuracy']:.2f}%"
        print(f"{name}: {text}", flush=True)

    return run_all(
        {name: command(name) for name in names},
        jobs=jobs,
        log=log,
        began=lambda name: print(f"{name}: trains, see {log(name)}", flush=True),
        ended=ended,
    )
