"""Optimizers and schedules, with learned quantizer state in a group of its own."""

from collections.abc import Mapping

import optax

from uniq_jax.spec import OptimizerSpec


def schedule(spec: OptimizerSpec, *, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of each step: warm-up, then constant, or to zero by a cosine or a line."""
    warmup_steps = round(spec.warmup_epochs * steps_per_epoch)
    decay_steps = max(total_steps - warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(spec.learning_rate, decay_steps),
        "linear": optax.linear_schedule(spec.learning_rate, 0.0, decay_steps),
        "constant": optax.constant_schedule(spec.learning_rate),
    }[spec.schedule]
    if warmup_steps == 0:
        return after
    end = spec.learning_rate if spec.warmup_shape == "linear" else spec.warmup_learning_rate
    before = optax.linear_schedule(spec.warmup_learning_rate, end, warmup_steps)
    return optax.join_schedules([before, after], [warmup_steps])


def optimizer(
    spec: OptimizerSpec,
    rate: optax.Schedule,
    is_quantizer_state: Mapping[str, bool],
    *,
    total_steps: int,
) -> optax.GradientTransformation:
    """SGD or Adam; learned quantizer state has no decay and a rate of its own, and may be frozen.

    Frozen for the last part of a phase, steps and thresholds no longer move, so that weights settle
    within levels that stay (Jain et al., "Trained Quantization Thresholds for Accurate and
    Efficient Fixed-Point Inference of Deep Neural Networks", MLSys 2020, arXiv:1903.08066; there
    one after another, here all at once).

    Args:
      spec: which, and its constants.
      rate: the learning rate by step.
      is_quantizer_state: for each parameter's path, whether a quantizer learns it.
      total_steps: of the phase.
    """
    decayed = {path: not learned for path, learned in is_quantizer_state.items()}
    decay = optax.add_decayed_weights(spec.weight_decay, mask=decayed)
    if spec.name == "sgd":
        # Decay joins the gradient before the momentum, as in both papers' programs.
        direction = [decay, optax.trace(spec.momentum)]
    else:
        direction = [optax.scale_by_adam(b1=spec.momentum, b2=0.999, eps=1e-8), decay]
    slower = optax.masked(optax.scale(spec.quantizer_rate_multiplier), dict(is_quantizer_state))
    transforms = [*direction, slower, optax.scale_by_learning_rate(rate)]
    if spec.quantizer_freeze_fraction:
        first_frozen = round((1 - spec.quantizer_freeze_fraction) * total_steps)
        moves = optax.scale_by_schedule(optax.piecewise_constant_schedule(1.0, {first_frozen: 0.0}))
        transforms.append(optax.masked(moves, dict(is_quantizer_state)))
    return optax.chain(*transforms)
