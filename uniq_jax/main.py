"""Trains, or evaluates, a low-bit network as a config file says.

    python -m uniq_jax.main --config=configs/digits_w2a2.py --workdir=runs/digits

Everything the run leaves goes below --workdir. A run that was killed goes on when the same command
is given again. Keys of the config are overridden as in --config.seed=1, and arguments of the config
file follow a colon: --config=configs/cifar10_resnet20_w2a2.py:bits=1,method=n2uq
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from uniq_jax.config import run_spec

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="The config file, with its arguments behind a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made where it is missing.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval"],
    "train: train, or go on training; eval: evaluate the newest checkpoint on the whole test set.",
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    console = Console()
    try:
        _run(console)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if _TRACEBACK.value:
            raise
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, style="red")
        sys.exit(1)


def _run(console: Console) -> None:
    spec = run_spec(_CONFIG.value)
    # After the config is checked: a typo should not wait for JAX to start.
    from uniq_jax.train import compilation, loop
    from uniq_jax.train.result import table

    compilation.enable_compilation_cache()
    workdir = Path(_WORKDIR.value)
    if _MODE.value == "eval":
        values = loop.evaluate(spec, workdir, console)
        console.print(
            f"test accuracy {100 * values['test_accuracy']:.2f}%  test loss "
            f"{values['test_loss']:.4f}  on {values['test_count']} examples"
        )
        return
    result = loop.train(spec, workdir, console)
    console.print()
    console.print(table(result))


def run() -> None:
    """Entry point of the command `uniq-jax`."""
    # Orbax logs every step of a checkpoint; what concerns the user is printed here.
    logging.set_verbosity(logging.ERROR)
    app.run(main)


if __name__ == "__main__":
    run()
