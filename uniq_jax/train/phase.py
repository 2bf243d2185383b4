"""One phase of a run: from its start, or its newest checkpoint, to its end."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from uniq_jax.spec import PhaseSpec
from uniq_jax.train import processes, start
from uniq_jax.train.checkpoints import Checkpoints, Progressed
from uniq_jax.train.logs import MetricsWriter, write_json
from uniq_jax.train.progress import Progress, say
from uniq_jax.train.run import Run
from uniq_jax.train.state import Program, TrainState

# Every parameter that was taken, new, or left over when the phase started from others.
START_FILE = "start.json"


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished phase reached.

    Attributes:
      accuracy: on the test set, at the end.
      best_accuracy: on the test set, at any evaluation.
      steps: taken in this phase.
      seconds: that all phases took until the end of this one.
    """

    accuracy: float
    best_accuracy: float
    steps: int
    seconds: float


def train_phase(
    run: Run,
    phase: PhaseSpec,
    directory: Path,
    *,
    source: Callable[[], Mapping[str, np.ndarray]] | None,
    writer: MetricsWriter,
    console: Console,
    seconds_before: float,
) -> Outcome:
    """Trains a phase, or what is left of it.

    Args:
      run: what the phases share.
      phase: which.
      directory: where its checkpoints go.
      source: reads the parameters it starts from; None for fresh ones.
      writer: of metrics.
      console: where progress goes.
      seconds_before: that earlier phases took.

    Raises:
      ValueError: if parameters or checkpoints are of another architecture.
      OSError: if a checkpoint or metric cannot be written.
      DivergedError: if the loss is no longer finite.
    """
    spec, program, total_steps = run.spec, run.program(phase), run.total_steps(phase)
    note = functools.partial(say, console)
    with contextlib.ExitStack() as stack:
        latest = stack.enter_context(
            contextlib.closing(Checkpoints(directory / "checkpoints", note=note))
        )
        best = stack.enter_context(
            contextlib.closing(Checkpoints(directory / "best", keep=1, note=note))
        )
        restored = latest.restore(start.abstract_state(run.builder(phase), program, run.mesh))
        if restored is not None:
            first_step, state, before = restored
            say(console, f"{phase.name}: resumes at step {first_step} of {total_steps}")
        else:
            first_step, state = 0, _first_state(run, phase, program, directory, source, console)
            before = Progressed(data={}, best_accuracy=-1.0, seconds=seconds_before)
        best.drop_after(first_step)
        writer.rewind(phase.name, first_step, [p.name for p in spec.phases])
        batches = stack.enter_context(contextlib.closing(run.train_batches()))
        if restored is not None:
            batches.set_state(before.data)
        progress = stack.enter_context(
            Progress(
                console,
                total_steps=total_steps,
                start_step=first_step,
                steps_per_epoch=run.steps_per_epoch,
                batch_size=spec.data.batch_size,
                description=phase.name,
            )
        )
        stack.enter_context(processes.ends_when_one_is_lost())
        step_fn, evaluate = run.train_step(program, state), run.evaluator(program)
        teacher = run.teacher(phase)
        started_s = time.monotonic()
        best_accuracy, accuracy = before.best_accuracy, math.nan

        def progressed() -> Progressed:
            elapsed_s = time.monotonic() - started_s
            return Progressed(batches.get_state(), best_accuracy, before.seconds + elapsed_s)

        def report(step: int, metrics: Mapping[str, jax.Array]) -> None:
            if step % spec.log_every_steps == 0 or step == total_steps:
                values = {name: float(value) for name, value in metrics.items()}
                writer.write(phase.name, step, values)
                if not math.isfinite(values["loss"]):
                    raise DivergedError(
                        f"the loss of phase {phase.name!r} is {values['loss']} at step {step}; its "
                        f"checkpoints are those of steps {latest.steps}. A smaller "
                        f"config.{phase.name}.optimizer.learning_rate may help"
                    )
            progress.update(step, loss=metrics["loss"], accuracy=metrics["accuracy"])

        unreported: tuple[int, Any] | None = None
        for step in range(first_step + 1, total_steps + 1):
            state, metrics = step_fn(state, run.place(next(batches)), teacher)
            # The devices are at work on this step while the one before is read.
            if unreported is not None:
                report(*unreported)
            unreported = step, metrics
            evaluates = _falls_due(step, total_steps, run.steps_per_epoch * spec.eval_every_epochs)
            saves = _falls_due(step, total_steps, spec.checkpoint_every_steps)
            if evaluates or saves:
                report(*unreported)
                unreported = None
            if step == total_steps and phase.batch_norm_batches:
                count = phase.batch_norm_batches
                progress.note(f"{phase.name}: estimates batch-norm statistics on {count} batches")
                estimated = run.estimate_statistics(program, *state.evaluated, count)
                state = state.with_evaluated_statistics(estimated)
            if evaluates:
                values = evaluate(*state.evaluated)
                accuracy = values["test_accuracy"]
                writer.write(phase.name, step, values)
                progress.note(
                    f"{phase.name}  epoch {step / run.steps_per_epoch:g}  "
                    f"test accuracy {100 * accuracy:.2f}%  test loss {values['test_loss']:.4f}"
                )
                if accuracy > best_accuracy:
                    best_accuracy = accuracy
                    best.save(step, state, progressed())
            if saves:
                latest.save(step, state, progressed())
        if first_step == total_steps:
            accuracy = evaluate(*state.evaluated)["test_accuracy"]
        return Outcome(accuracy, best_accuracy, total_steps, progressed().seconds)


def _first_state(
    run: Run,
    phase: PhaseSpec,
    program: Program,
    directory: Path,
    source: Callable[[], Mapping[str, np.ndarray]] | None,
    console: Console,
) -> TrainState:
    """The state before the first step: fresh or taken parameters, and calibrated quantizers."""
    state = start.fresh_state(run.builder(phase), program, run.mesh)
    if source is not None:
        state, report = start.take(source(), state, program)
        state = start.restart_weight_quantizers(program, state, report)
        say(console, f"{phase.name}: starts from trained parameters: {report.summary()}")
        if jax.process_index() == 0:
            write_json(directory / START_FILE, dataclasses.asdict(report))
    if phase.calibration_batches and not phase.is_float:
        say(console, f"{phase.name}: calibrates on {phase.calibration_batches} batches")
        with contextlib.closing(run.train_batches()) as batches:
            placed = (run.place(batch) for batch in batches)
            state = start.calibrate(program, state, placed, phase.calibration_batches)
    return start.restart_averages(state)


def _falls_due(step: int, total_steps: int, every: float) -> bool:
    """Whether what is done every so many (possibly fractional) steps falls on this one."""
    return step == total_steps or (every > 0 and step // every > (step - 1) // every)
