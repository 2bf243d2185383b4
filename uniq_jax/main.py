"""Trains, evaluates, or exports a low-bit network as a config file says.

    python -m uniq_jax.main --config=configs/digits_w2a2.py --workdir=runs/digits

Everything the run leaves goes below --workdir. A run that was killed goes on when the same command
is given again. Keys of the config are overridden as in --config.seed=1, and arguments of the config
file follow a colon: --config=configs/cifar10_resnet20_w2a2.py:bits=1,method=n2uq

--mode=eval evaluates the newest checkpoint, and --mode=export freezes it to integers:
--config.export.formats=packed,onnx,openvino,qonnx,stablehlo

SIGTERM, or Ctrl-C, ends it at the next step, with a checkpoint; Ctrl-C twice ends it at once. It
exits with 0 when it is finished, 1 on an error, 69 when another process of the job was lost, and 75
when it was told to stop. In the last two cases the same command resumes it.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from uniq_jax.config import run_spec
from uniq_jax.spec import RunSpec

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="The config file, with its arguments behind a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made where it is missing.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "export"],
    "train: train, or go on training; eval: evaluate the newest checkpoint on the whole test set; "
    "export: freeze the newest checkpoint, and write the files of config.export to WORKDIR/export.",
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "off"],
    "auto: joins the other processes of the job where SLURM, Open MPI, a TPU pod or the variables "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say that there are some; off: "
    "runs on its own.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the job, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, with --coordinator.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout_s", 60, "A process that was not heard of for so long ends the job."
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    if len(argv) > 1:
        _fail(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        _run(Console())
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if _TRACEBACK.value:
            raise
        _fail(str(error))


def _run(console: Console) -> None:
    path, _, _ = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config (={path!r}) is not a file")
    spec = run_spec(_CONFIG.value)
    # After the config is checked: a typo should not wait for JAX to start.
    from uniq_jax.train import compilation, jobs, processes

    job = jobs.find_job(
        os.environ,
        mode=_DISTRIBUTED.value,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        has_libtpu=jobs.has_libtpu(),
    )
    compilation.enable_compilation_cache()
    jobs.connect(job, heartbeat_timeout_s=_HEARTBEAT.value)
    with processes.ends_together(shows_traceback=_TRACEBACK.value):
        _train_or_evaluate(spec, console if processes.is_first() else Console(quiet=True))


def _train_or_evaluate(spec: RunSpec, console: Console) -> None:
    from uniq_jax.train import loop, preemption, processes
    from uniq_jax.train.result import table

    workdir = Path(_WORKDIR.value or "")
    if _MODE.value == "eval":
        values = loop.evaluate(spec, workdir, console)
        console.print(
            f"test accuracy {100 * values['test_accuracy']:.2f}%  test loss "
            f"{values['test_loss']:.4f}  on {values['test_count']} examples"
        )
        return
    if _MODE.value == "export":
        _export(spec, workdir, console)
        return
    try:
        with preemption.listening() as stop:
            result = loop.train(spec, workdir, console, stop)
    except preemption.Stopped as stopped:
        console.print(f"{stopped}; the same command resumes it", soft_wrap=True)
        sys.exit(preemption.EXIT_CODE)
    if processes.is_first():
        _draw(workdir, console)
    console.print()
    console.print(table(result))


def _export(spec: RunSpec, workdir: Path, console: Console) -> None:
    from uniq_jax.train import exports, loop

    exported = loop.export(spec, workdir, console)
    if exported is None:  # The first process has written it.
        return
    console.print(exports.table(exported))
    check = exported.check
    if check.mismatches or check.class_mismatches:
        raise ValueError(
            f"the files in {exported.directory} are not exact: {check.summary()}; "
            f"{check.class_mismatches} of {check.images} images change their class"
        )


def _draw(workdir: Path, console: Console) -> None:
    """Draws the report. What goes wrong there does not undo the training."""
    try:
        from uniq_jax.report import write_report

        write_report(workdir)
    except Exception as error:
        console.print(
            f"no report was drawn ({type(error).__name__}: {error}); the run itself is complete",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with them, or with keys of the config, is one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError) as error:
        # An unknown key comes as an AttributeError around a KeyError, a complaint of the config
        # file's own as text that ends in it.
        inner = error.args[0] if error.args else error
        while isinstance(inner, Exception) and inner.args:
            inner = inner.args[0]
        text = str(inner)
        if isinstance(error, flags.Error):
            _fail(text.rpartition("ConfigError: ")[2].strip())
        key, _, hint = text.replace("'", "").partition("\n")
        paths = (argument.partition("=")[0].removeprefix("--") for argument in argv)
        named = next((path for path in paths if path.endswith(f".{key}")), key)
        _fail(f"{named} is no known key of the config. {hint}".strip())


def _fail(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(
        f"error: {message}", markup=False, highlight=False, style="red"
    )
    sys.exit(1)


def run() -> None:
    """Entry point of the command `uniq-jax`."""
    # As a command, this is not the main module, whose text and flags --help shows.
    sys.modules["__main__"].__doc__ = __doc__
    for flag in flags.FLAGS.get_flags_for_module(sys.modules[__name__]):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    # Orbax logs every step of a checkpoint, and its errors twice; they are printed here.
    logging.set_verbosity(logging.FATAL)
    app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
    run()
