"""What is said when training goes to nan or infinity: when it began, in which layer, what is left.

A step costs nothing for it. Training is the same every time, so the steps since the last checkpoint
are taken again, one by one, until the first that is not finite; that one is then looked into.
"""

import math
from collections.abc import Callable
from pathlib import Path

from flax import nnx

from uniq_jax.spec import PhaseSpec
from uniq_jax.train import preemption, watching
from uniq_jax.train.checkpoints import Progressed
from uniq_jax.train.run import Run
from uniq_jax.train.state import TrainState


class NotFinite(Exception):
    """A loss or a state was seen that is not finite.

    Args:
      step: after which it was seen.
      loss: that is not finite; None if it was the state.
    """

    def __init__(self, step: int, loss: float | None = None):
        super().__init__(f"step {step} is not finite")
        self.step, self.loss = step, loss


class DivergedError(RuntimeError):
    """The loss, or the state, is no longer finite.

    Attributes:
      phase: its name.
      step: at which that was noticed.
      first_step: the first at which it was so; None if that was not found.
      layer: path of the first layer that went bad; None if that was not found.
      checkpoint_step: of the last checkpoint, all of whose arrays are finite; None without one.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str,
        step: int,
        first_step: int | None,
        layer: str | None,
        checkpoint_step: int | None,
    ):
        super().__init__(message)
        self.phase, self.step, self.first_step = phase, step, first_step
        self.layer, self.checkpoint_step = layer, checkpoint_step


# The newest checkpoint's state, and what else it holds; or that before the first step, and None.
Begin = Callable[[], tuple[TrainState, Progressed | None]]


def check(step: int, state: TrainState) -> None:
    """Raises NotFinite unless all of the state is finite."""
    if not watching.is_finite(state):
        raise NotFinite(step)


def check_estimated(phase: str, step: int, batches: int, state: TrainState) -> None:
    """Raises a DivergedError unless statistics that were estimated anew are finite.

    Args:
      phase: its name.
      step: the last one, after which all was finite.
      batches: that they were estimated on.
      state: with them.
    """
    if not watching.is_finite(state):
        raise DivergedError(
            f"the batch-norm statistics of phase {phase!r}, estimated on {batches} batches after "
            f"step {step}, are not finite, though the state of that step is; "
            f"config.{phase}.batch_norm_batches=0 keeps those of training",
            phase=phase,
            step=step,
            first_step=None,
            layer=None,
            checkpoint_step=None,
        )


def explained(
    run: Run,
    phase: PhaseSpec,
    begin: Begin,
    seen: NotFinite,
    *,
    checkpoints: Path,
    checkpoint_step: Callable[[], int | None],
    stop: preemption.Stop,
) -> DivergedError:
    """The error to raise, after the steps since the last checkpoint were taken again.

    Args:
      run: of the phase.
      phase: that has diverged.
      begin: reads the newest checkpoint, or starts the phase anew.
      seen: what was noticed.
      checkpoints: their directory.
      checkpoint_step: of the newest one that `begin` could read; None without one.
      stop: ends the search.
    """
    what = "the state" if seen.loss is None else "the loss"
    value = "not finite" if seen.loss is None else seen.loss
    parts, first, layer = [], None, None
    try:
        first = _first_bad_step(run, phase, begin, seen.step, stop)
        if first is None:
            parts.append("the layer is not known, as the same steps, taken again, stay finite")
        else:
            finding = _examined(run, phase, begin, first, stop)
            layer = None if finding is None else finding.layer
            if finding is not None:
                where = f"the first layer that went bad is {layer}: " if layer else ""
                parts.append(f"{where or 'what went bad is '}{finding.what}")
    except preemption.Stopped:
        parts.append("the layer is not known, as the run was told to stop meanwhile")
    except Exception as error:  # What is known should be said whatever happens here.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        parts.append(f"the layer is not known ({reason[:200]})")
    newest = checkpoint_step()
    if newest is None:
        parts.append("there is no checkpoint of this phase yet")
    else:
        parts.append(f"the last good checkpoint is {checkpoints / str(newest)}")
    since = f" (first at step {first})" if first is not None else ""
    return DivergedError(
        f"{what} of phase {phase.name!r} is {value} at step {seen.step}{since}; "
        f"{'; '.join(parts)}. A smaller config.{phase.name}.optimizer.learning_rate may help",
        phase=phase.name,
        step=seen.step,
        first_step=first,
        layer=layer or None,
        checkpoint_step=newest,
    )


def _first_bad_step(
    run: Run, phase: PhaseSpec, begin: Begin, last: int, stop: preemption.Stop
) -> int | None:
    (state, before), teacher = begin(), run.teacher(phase)
    step_fn = run.train_step(run.program(phase), state)
    with run.train_batches() as batches:
        if before is not None:
            batches.set_state(before.data)
        for step in range(int(state.step) + 1, last + 1):
            preemption.check(stop)
            state, metrics = step_fn(state, run.place(next(batches)), teacher)
            if not math.isfinite(metrics["loss"]) or not watching.is_finite(state):
                return step
    return None


def _examined(
    run: Run, phase: PhaseSpec, begin: Begin, bad: int, stop: preemption.Stop
) -> watching.Finding | None:
    """What is wrong in the step `bad`, up to which everything is finite."""
    (state, before), program, teacher = begin(), run.program(phase), run.teacher(phase)
    step_fn = run.train_step(program, state)
    with run.train_batches() as batches:
        if before is not None:
            batches.set_state(before.data)
        for _ in range(int(state.step) + 1, bad):
            preemption.check(stop)
            state, _ = step_fn(state, run.place(next(batches)), teacher)
        batch = run.place(next(batches))
    model: nnx.Module = nnx.eval_shape(run.builder(phase))
    return watching.examine(run, program, model, state, batch, teacher)
