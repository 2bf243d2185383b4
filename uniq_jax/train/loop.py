"""A run: its phases one after another, in one directory."""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from uniq_jax import deploy
from uniq_jax.spec import PhaseSpec, RunSpec, to_json
from uniq_jax.train import (
    environment,
    exclusive,
    exports,
    frozen,
    handover,
    preemption,
    processes,
    same_run,
    source_digests,
    start,
)
from uniq_jax.train.checkpoints import Checkpoints
from uniq_jax.train.logs import MetricsWriter, remove_torn_files, write_json
from uniq_jax.train.phase import Outcome, train_phase
from uniq_jax.train.progress import say
from uniq_jax.train.result import RESULT_FILE, Result
from uniq_jax.train.run import Run
from uniq_jax.train.sources import CONFIG_FILE
from uniq_jax.train.state import TrainState

OUTCOME_FILE = "outcome.json"
"""What a finished phase leaves in its directory: its accuracy, and what it took."""

REPORT_FILE = "report.html"
"""Drawn from the other files when the run is over (`uniq_jax.report`)."""


def train(
    spec: RunSpec, workdir: Path, console: Console, stop: preemption.Stop = preemption.never
) -> Result:
    """Runs all phases, or what is left of them, and writes `WORKDIR/result.json`.

    A run that was killed goes on from its newest checkpoint, and on as many devices comes to the
    same result, bit for bit.

    Args:
      spec: what to do.
      workdir: made where it is missing.
      console: where progress goes.
      stop: asked at every step, and between the batches of an evaluation; where it says so, the run
        saves and ends. `preemption.listening` makes one that hears signals.

    Raises:
      Stopped: if `stop` said so; the same call goes on from there.
      ValueError: if the spec doesn't fit its data or devices, or `workdir` belongs to another spec,
        or what it starts or learns from has changed since it began.
      FileNotFoundError: if the data, or what to start from, is not there.
      BlockingIOError: if another process trains in `workdir`.
      OSError: if `workdir` cannot be written.
      DivergedError: if the loss is no longer finite.
    """
    exports.check_installed(spec.export)
    same_run.check(spec, workdir, trains=True)
    if processes.all_true((workdir / RESULT_FILE).exists()):
        say(console, f"{workdir} holds the finished run; nothing is left to train")
        return Result.read(workdir)
    run = Run(spec, _note(console))
    # Nothing is written before every network was built once, and the parameters read that they
    # start from or learn from.
    for phase in spec.phases:
        run.program(phase)
        run.teacher(phase)
    sources = handover.of_run(run, workdir)
    first = spec.phases[0]
    if (source := sources[first.name]) is not None:
        start.take(source.read(), _abstract_state(run, first), run.program(first), source.stale)
    digests = source_digests.digests(spec)
    if (workdir / CONFIG_FILE).exists() and same_run.has_begun(workdir):
        source_digests.check(spec, workdir, digests)
    processes.make_workdir(workdir, to_json(spec))
    is_first = jax.process_index() == 0
    with exclusive.writing(workdir) if is_first else contextlib.nullcontext():
        if is_first:
            remove_torn_files(workdir)
            source_digests.write(workdir, digests)  # First: what has a config has begun.
            write_json(workdir / CONFIG_FILE, to_json(spec))
            environment.record(workdir, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
        result = _result(
            run, workdir, _outcomes(run, workdir, sources, console, stop), console, stop
        )
        if is_first:
            result.write(workdir)
    return result


def _outcomes(
    run: Run,
    workdir: Path,
    sources: Mapping[str, handover.Source | None],
    console: Console,
    stop: preemption.Stop,
) -> dict[str, Outcome]:
    """Trains what is left of each phase; what all of them reached."""
    spec, is_first = run.spec, jax.process_index() == 0
    outcomes: dict[str, Outcome] = {}
    with MetricsWriter(workdir, tensorboard=spec.tensorboard, enabled=is_first) as writer:
        for phase in spec.phases:
            preemption.check(stop)
            directory = workdir / phase.name
            outcome_path = directory / OUTCOME_FILE
            if processes.all_true(outcome_path.exists()):
                outcomes[phase.name] = Outcome(**json.loads(outcome_path.read_text()))
                continue
            outcome = outcomes[phase.name] = train_phase(
                run,
                phase,
                directory,
                source=sources[phase.name],
                writer=writer,
                console=console,
                seconds_before=max((o.seconds for o in outcomes.values()), default=0.0),
                stop=stop,
            )
            if is_first:
                write_json(outcome_path, dataclasses.asdict(outcome))
    return outcomes


def evaluate(spec: RunSpec, workdir: Path, console: Console) -> dict[str, float]:
    """Evaluates the newest checkpoint of the last phase that has one, on the whole test set.

    Returns:
      "test_accuracy", "test_loss" and "test_count".

    Raises:
      FileNotFoundError: if `workdir` has no checkpoint.
      ValueError: if `workdir` belongs to another spec.
    """
    same_run.check(spec, workdir, trains=False)
    run = Run(spec, _note(console))
    phase, _, state = newest(run, workdir, console)
    return run.evaluator(run.program(phase))(*state.evaluated)


def export(spec: RunSpec, workdir: Path, console: Console) -> exports.Exported | None:
    """Freezes the newest checkpoint of the last phase that has one, and writes `config.export`.

    Returns:
      What is there now; None on all processes but the first.

    Raises:
      FileNotFoundError: if `workdir` has no checkpoint.
      ValueError, NotImplementedError: if `workdir` belongs to another spec, its network cannot be
        frozen, or an export format cannot hold it.
    """
    if not spec.export.names:
        raise ValueError("config.export.formats (='') must name a format for --mode=export")
    exports.check_installed(spec.export)
    same_run.check(spec, workdir, trains=False)
    run = Run(spec, _note(console))
    phase, step, state = newest(run, workdir, console)
    if phase.is_float:
        raise ValueError(
            f"workdir (={str(workdir)!r}) holds no quantized network to export: its newest "
            f"checkpoint is of the phase {phase.name!r}, whose method is 'float'"
        )
    exported = None
    if processes.is_first():
        exported = exports.write(run, phase, step, frozen.freeze(run, phase, state), workdir)
    processes.barrier("exported")  # JAX gives up a process that waits longer for the end.
    return exported


def newest(run: Run, workdir: Path, console: Console) -> tuple[PhaseSpec, int, TrainState]:
    """The last phase that has a checkpoint; the newest one's step and state."""
    for phase in reversed(run.spec.phases):
        directory = workdir / phase.name / "checkpoints"
        if not directory.is_dir():
            continue
        with contextlib.closing(
            Checkpoints(directory, read_only=True, note=functools.partial(say, console))
        ) as checkpoints:
            restored = checkpoints.restore(_abstract_state(run, phase))
        if restored is not None:
            step, state, _ = restored
            say(console, f"{phase.name}: step {step} of {run.total_steps(phase)}")
            return phase, step, state
    raise FileNotFoundError(f"workdir (={str(workdir)!r}) has no checkpoint to evaluate or export")


def _note(console: Console) -> Callable[[str], None]:
    """Tells of broken images: each process of its own, which no other reads."""
    if processes.is_first():
        return functools.partial(say, console)
    return lambda line: print(f"process {jax.process_index()}: {line}", file=sys.stderr)


def _abstract_state(run: Run, phase: PhaseSpec) -> TrainState:
    return start.abstract_state(run.builder(phase), run.program(phase), run.mesh)


def _result(
    run: Run,
    workdir: Path,
    outcomes: Mapping[str, Outcome],
    console: Console,
    stop: preemption.Stop,
) -> Result:
    spec = run.spec
    last = spec.phases[-1]
    outcome = outcomes[last.name]
    floats = [outcomes[phase.name].accuracy for phase in spec.phases if phase.is_float]
    with contextlib.closing(Checkpoints(workdir / last.name / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(_abstract_state(run, last))
    assert restored is not None, "a finished phase has a checkpoint"
    step, state, _ = restored
    size = deploy.model_size(run.program(last).build(*state.evaluated))
    deployed, files = {}, {}
    if spec.export.names and not last.is_float:
        preemption.check(stop)
        say(console, f"{last.name}: freezes the network, and compares its codes on test images")
        if processes.is_first():
            deployed = _deployed(run, last, step, state, workdir)
            files = {"network": str(workdir / exports.EXPORT_DIRECTORY)}
        processes.barrier("exported")
    return Result(
        dataset=spec.data.name,
        model=spec.model.name,
        method=last.method,
        weight_bits=last.weight_bits,
        activation_bits=last.activation_bits,
        seed=spec.seed,
        steps=sum(o.steps for o in outcomes.values()),
        seconds=outcome.seconds,
        test_accuracy=outcome.accuracy,
        best_accuracy=outcome.best_accuracy,
        float_accuracy=floats[-1] if floats else _float_accuracy(run),
        packed_bytes=size.packed_bytes,
        float_bytes=size.float_bytes,
        files={
            "metrics": str(workdir / "metrics.jsonl"),
            "curves": str(workdir / "events"),
            "last checkpoint": str(workdir / last.name / "checkpoints"),
            "best checkpoint": str(workdir / last.name / "best"),
            "result": str(workdir / RESULT_FILE),
            "report": str(workdir / REPORT_FILE),
            **files,
        },
        **deployed,
    )


def _deployed(
    run: Run, phase: PhaseSpec, step: int, state: TrainState, workdir: Path
) -> dict[str, Any]:
    """The fields of the result that are of the frozen network; what fails there is one of them."""
    fields: dict[str, Any] = {}
    try:
        found = frozen.freeze(run, phase, state)
        fields["codes"], fields["mismatching_codes"] = found.check.codes, found.check.mismatches
        exported = exports.write(run, phase, step, found, workdir)
        fields["file_bytes"] = exported.files.get("packed", {}).get(exports.PACKED_FILE)
        fields["float_ms"], fields["integer_ms"] = frozen.milliseconds(found)
    except Exception as error:  # Whatever it is, it does not undo the training.
        known = isinstance(error, NotImplementedError | ValueError | ImportError)
        fields["not_exported"] = str(error) if known else f"{type(error).__name__}: {error}"
    return fields


def _float_accuracy(run: Run) -> float | None:
    """Accuracy of the float network that a run without a float phase started from."""
    if not run.spec.init_from:
        return None
    widths = {"weight_bits": 32, "activation_bits": 32}
    phase = dataclasses.replace(run.spec.phases[-1], method="float", **widths)
    program = run.program(phase)
    state = start.fresh_state(run.builder(phase), program, run.mesh)
    state, report = start.take(start.read_source(run.spec.init_from), state, program)
    if report.new or any("_quantizer/" in path for path in report.left_over):
        return None
    return run.evaluator(program)(state.params, state.statistics)["test_accuracy"]
