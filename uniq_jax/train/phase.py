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
from rich.console import Console

from uniq_jax.spec import PhaseSpec
from uniq_jax.train import diagnosis, oscillation, preemption, processes, start
from uniq_jax.train.checkpoints import Checkpoints, Progressed
from uniq_jax.train.diagnosis import DivergedError as DivergedError
from uniq_jax.train.handover import Source
from uniq_jax.train.layer_log import LayerLog
from uniq_jax.train.logs import MetricsWriter, write_json
from uniq_jax.train.progress import Progress, say
from uniq_jax.train.run import Run
from uniq_jax.train.state import Program, TrainState

# Every parameter that was taken, new, or left over when the phase started from others.
START_FILE = "start.json"


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
    source: Source | None,
    writer: MetricsWriter,
    console: Console,
    seconds_before: float,
    stop: preemption.Stop = preemption.never,
) -> Outcome:
    """Trains a phase, or what is left of it.

    Args:
      run: what the phases share.
      phase: which.
      directory: where its checkpoints go.
      source: of the parameters it starts from; None for fresh ones.
      writer: of metrics.
      console: where progress goes.
      seconds_before: that earlier phases took.
      stop: asked at every step whether to save and end.

    Raises:
      Stopped: if `stop` said so.
      ValueError: if parameters or checkpoints are of another architecture.
      OSError: if a checkpoint or metric cannot be written.
      DivergedError: if the loss is no longer finite.
    """
    begin = functools.partial(_begin, run, phase, directory, source, console, stop)
    try:
        return _train(run, phase, directory, begin, writer, console, seconds_before, stop)
    except diagnosis.NotFinite as error:
        seen = diagnosis.NotFinite(error.step, error.loss)  # Without the frames, and their arrays.
    say(console, f"{phase.name}: is no longer finite at step {seen.step}; looks for where it began")
    with contextlib.closing(Checkpoints(directory / "checkpoints")) as latest:
        raise diagnosis.explained(
            run,
            phase,
            lambda: begin(latest),
            seen,
            checkpoints=directory / "checkpoints",
            checkpoint_step=lambda: max(latest.steps, default=None),
            stop=stop,
        )


def _begin(
    run: Run,
    phase: PhaseSpec,
    directory: Path,
    source: Source | None,
    console: Console,
    stop: preemption.Stop,
    latest: Checkpoints,
) -> tuple[TrainState, Progressed | None]:
    """The newest checkpoint; without one, the state before the first step, and None."""
    program = run.program(phase)
    restored = latest.restore(start.abstract_state(run.builder(phase), program, run.mesh))
    if restored is not None:
        _, state, before = restored
        return state, before
    return _first_state(run, phase, program, directory, source, console, stop), None


def _train(
    run: Run,
    phase: PhaseSpec,
    directory: Path,
    begin: Callable[[Checkpoints], tuple[TrainState, Progressed | None]],
    writer: MetricsWriter,
    console: Console,
    seconds_before: float,
    stop: preemption.Stop,
) -> Outcome:
    spec, program, total_steps = run.spec, run.program(phase), run.total_steps(phase)
    note = functools.partial(say, console)
    with contextlib.ExitStack() as stack:
        latest = stack.enter_context(
            contextlib.closing(Checkpoints(directory / "checkpoints", note=note))
        )
        best = stack.enter_context(
            contextlib.closing(Checkpoints(directory / "best", keep=1, note=note))
        )
        state, restored = begin(latest)
        first_step = int(state.step)
        if restored is not None:
            say(console, f"{phase.name}: resumes at step {first_step} of {total_steps}")
        before = restored or Progressed(data={}, best_accuracy=-1.0, seconds=seconds_before)
        owes = before.owes_evaluation
        best.drop_after(first_step - owes)
        if not best.steps:  # On other devices the one that was dropped may not be reached again.
            before = dataclasses.replace(before, best_accuracy=-1.0)
        names = [p.name for p in spec.phases]
        writer.rewind(phase.name, first_step, names, owes_evaluation=owes)
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
        evaluate, teacher = run.evaluator(program, stop), run.teacher(phase)
        layer_log = LayerLog(run, program, phase, directory, writer, total_steps, progress.note)
        started_s = time.monotonic()
        step_fn, memory = run.compiled_step(phase, program, state, teacher)
        processes.barrier("compiled")
        progress.note(f"{phase.name}: {memory}")
        best_accuracy, accuracy = before.best_accuracy, math.nan

        def progressed(owes_evaluation: bool = False) -> Progressed:
            seconds = before.seconds + time.monotonic() - started_s
            return Progressed(batches.get_state(), best_accuracy, seconds, owes_evaluation)

        def report(step: int, metrics: Mapping[str, jax.Array]) -> None:
            # JAX would queue dozens of steps, and their batches: what is reported has been done.
            jax.block_until_ready(metrics)
            if step % spec.log_every_steps == 0 or step == total_steps:
                values = {name: float(value) for name, value in metrics.items()}
                writer.write(phase.name, step, values)
                if not math.isfinite(values["loss"]):
                    raise diagnosis.NotFinite(step, values["loss"])
            progress.update(step, loss=metrics["loss"], accuracy=metrics["accuracy"])

        def evaluates(step: int) -> bool:
            return _falls_due(step, total_steps, run.steps_per_epoch * spec.eval_every_epochs)

        def saves(step: int) -> bool:
            return _falls_due(step, total_steps, spec.checkpoint_every_steps)

        def conclude(step: int, state: TrainState) -> TrainState:
            """Does what falls due after a step, which estimates statistics at the end."""
            nonlocal accuracy, best_accuracy
            if step == total_steps and phase.batch_norm_batches:
                count = phase.batch_norm_batches
                progress.note(f"{phase.name}: estimates batch-norm statistics on {count} batches")
                estimated = run.estimate_statistics(program, *state.evaluated, count, stop)
                state = state.with_evaluated_statistics(estimated)
                diagnosis.check_estimated(phase.name, step, count, state)
            if evaluates(step):
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
                    best.wait()  # A checkpoint that knows of it must not be there first.
            # One that owes an evaluation is as good to resume from, but not to end with.
            if saves(step) and (step == total_steps or step not in latest.steps):
                latest.save(step, state, progressed())
            return state

        if owes:
            state = conclude(first_step, state)
        unreported: tuple[int, Any] | None = None
        for step in range(first_step + 1, total_steps + 1):
            batch = run.place(next(batches))
            measured = layer_log.measure(step, state, batch, teacher)
            state, metrics = step_fn(state, batch, teacher)
            # The devices are at work on this step while the one before is read.
            if unreported is not None:
                report(*unreported)
            layer_log.write(step, state, measured)
            unreported = step, metrics
            stops = stop()
            if not (stops or evaluates(step) or saves(step)):
                continue
            report(*unreported)
            unreported = None
            diagnosis.check(step, state)
            try:
                preemption.check(lambda stops=stops: stops)
                state = conclude(step, state)
            except preemption.Stopped:
                latest.save(step, state, progressed(owes_evaluation=evaluates(step)))
                latest.wait()
                raise preemption.Stopped(
                    f"{phase.name}: stopped after step {step} of {total_steps}, which is saved"
                ) from None
        if state.oscillation is not None:
            threshold = phase.oscillation.threshold
            note(f"{phase.name}: {oscillation.summary(state.oscillation, threshold)}")
        if math.isnan(accuracy):  # The last step was taken before this run resumed.
            accuracy = evaluate(*state.evaluated)["test_accuracy"]
        return Outcome(accuracy, best_accuracy, total_steps, progressed().seconds)


def _first_state(
    run: Run,
    phase: PhaseSpec,
    program: Program,
    directory: Path,
    source: Source | None,
    console: Console,
    stop: preemption.Stop,
) -> TrainState:
    """The state before the first step: fresh or taken parameters, and calibrated quantizers."""
    state = start.fresh_state(run.builder(phase), program, run.mesh)
    kept: tuple[str, ...] = ()
    calibrates = phase.calibration_batches > 0 and not phase.is_float
    if source is not None:
        state, report = start.take(source.read(), state, program, source.stale)
        kept = report.taken
        calibrates = calibrates and any("_quantizer/" in path for path in report.new)
        state = start.restart_weight_quantizers(program, state, report)
        say(console, f"{phase.name}: starts from trained parameters: {report.summary()}")
        if jax.process_index() == 0:
            write_json(directory / START_FILE, dataclasses.asdict(report))
    if calibrates:
        say(console, f"{phase.name}: calibrates on {phase.calibration_batches} batches")
        with contextlib.closing(run.train_batches()) as batches:
            placed = (run.place(batch) for batch in preemption.until(stop, batches))
            state = start.calibrate(program, state, placed, phase.calibration_batches, kept)
    return start.restart_oscillation(program, start.restart_averages(state))


def _falls_due(step: int, total_steps: int, every: float) -> bool:
    """Whether what is done every so many (possibly fractional) steps falls on this one."""
    return step == total_steps or (every > 0 and step // every > (step - 1) // every)
