"""The pure steps over the training state."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from uniq_jax.spec import LossSpec
from uniq_jax.train import losses, mixup, remat
from uniq_jax.train import oscillation as oscillations
from uniq_jax.train.accumulation import accumulate
from uniq_jax.train.network import Arrays, Teacher, split
from uniq_jax.train.state import Program, TrainState


def train_step(
    program: Program,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    teacher: Teacher | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of training on one global batch.

    Args:
      program: static.
      state: given up (its buffers are donated where this is jitted).
      batch: "image", uint8 (batch, height, width, channels), and "label", int32 (batch,).
      teacher: that the program's loss names; None where it names none.

    Returns:
      The next state, and the step's "loss" (mean over the batch), "accuracy", "gradient_norm"
      and "learning_rate"; and what `oscillation` has to say where its plan is given. See
      `accumulation` for what a batch is that is cut into microbatches.
    """
    if (teacher is not None) != bool(program.loss.teacher):
        raise ValueError(
            f"teacher (={type(teacher).__name__}) must be given if and only if the program's loss "
            f"names one; it names {program.loss.teacher!r}"
        )
    examples, part = dict(batch), None
    if program.loss.mixup_alpha:
        key = jax.random.fold_in(jax.random.key(program.seed), state.step)
        part = mixup.share(key, program.loss.mixup_alpha)
        # Partners are those of the whole batch, also where it is cut.
        examples["image"] = mixup.mix(program.normalize(batch["image"]), part)
        examples["partner"] = mixup.partners(batch["label"])

    def gradients(params: Arrays, statistics: Arrays, examples: Mapping[str, jax.Array]):
        images = examples["image"] if part is not None else program.normalize(examples["image"])
        teacher_logits = None if teacher is None else teacher.logits(images)

        def loss_of(params: Arrays):
            model: Any = program.build(params, statistics)
            model.train()
            remat.rematerialize(model, program.remat)
            logits = model(images)
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            _, updated = split(model)
            values = _losses(program.loss, logits, examples["label"], teacher_logits)
            if part is not None:
                others = _losses(program.loss, logits, examples["partner"], teacher_logits)
                values = part * values + (1 - part) * others
            return jnp.mean(values), (updated, logits)

        (loss, (updated, logits)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        correct = jnp.argmax(logits, axis=-1) == examples["label"]
        return grads, updated, {"loss": loss, "accuracy": jnp.mean(correct)}

    grads, statistics, means = accumulate(
        gradients, state.params, state.statistics, examples, program.accumulation_steps
    )
    plan, more = program.oscillation, {}
    if plan is not None and plan.spec.damping:
        model = program.build(state.params, state.statistics)
        grads, more = oscillations.damped(plan, model, grads, state.step)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    metrics = {
        **means,
        "gradient_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(program.rate(state.step)),
        **more,
    }
    params = cast(Arrays, optax.apply_updates(state.params, updates))
    oscillation = state.oscillation
    if plan is not None and oscillation is not None:
        build = functools.partial(program.build, statistics=statistics)
        params, oscillation, more = oscillations.advance(
            plan, build, state.params, params, oscillation, state.step
        )
        metrics |= more
    averages = state.averages
    if averages is not None:
        values = {**params, **statistics}
        averages = moving_average(averages, values, state.step, program.ema_decay)
    return (
        TrainState(
            step=state.step + 1,
            params=params,
            statistics=statistics,
            opt_state=opt_state,
            averages=averages,
            oscillation=oscillation,
        ),
        metrics,
    )


def moving_average(averages: Arrays, values: Arrays, step: jax.Array, decay: float) -> Arrays:
    """`d · averages + (1 - d) · values`, with `d = min(decay, (1 + step)/(10 + step))`.

    The smaller first decays forget soon where the average started, as in TensorFlow's
    `ExponentialMovingAverage`. Averages over the last steps: Polyak and Juditsky, "Acceleration of
    Stochastic Approximation by Averaging", SIAM J. Control Optim. 30(4), 1992; decaying, Szegedy et
    al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016 (arXiv:1512.00567),
    section 8.

    Args:
      averages: floats, by path.
      values: of the same paths, shapes and dtypes.
      step: steps before this one, int32 ().
      decay: in [0, 1).

    Returns:
      Of the averages' dtypes.
    """
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return {
        path: (old + rate * (values[path] - old)).astype(old.dtype)
        for path, old in averages.items()
    }


def _losses(
    spec: LossSpec, logits: jax.Array, labels: jax.Array, teacher_logits: jax.Array | None
) -> jax.Array:
    if teacher_logits is None:
        return losses.cross_entropy(logits, labels, smoothing=spec.label_smoothing)
    return losses.mixed(
        logits,
        labels,
        teacher_logits,
        smoothing=spec.label_smoothing,
        weight=spec.teacher_weight,
        temperature=spec.teacher_temperature,
    )


def eval_step(
    program: Program, params: Arrays, statistics: Arrays, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Sums over one batch of a test set, in evaluation mode.

    Args:
      program: static.
      params: as in the state.
      statistics: as in the state.
      batch: "image", "label", and "mask", bool (batch,), false where the batch is only filled up.

    Returns:
      "correct" and "count", int32, and "loss", the summed cross entropy.
    """
    model: Any = program.build(params, statistics)
    model.eval()
    logits = model(program.normalize(batch["image"]))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    values = losses.cross_entropy(logits, batch["label"])
    mask = batch["mask"]
    correct = (jnp.argmax(logits, axis=-1) == batch["label"]) & mask
    return {
        "correct": jnp.sum(correct.astype(jnp.int32)),
        "count": jnp.sum(mask.astype(jnp.int32)),
        "loss": jnp.sum(jnp.where(mask, values, 0)),
    }
