"""Weights that oscillate between two levels: how often they do, damping, and freezing.

With a straight-through gradient, a weight whose best value lies between two levels is pushed over
the threshold between them, back, and over again: it never settles, and the statistics of the batch
norms behind it are those of neither level. Counted, damped and frozen are the weights of the
network's lowest width; wider first and last layers, where a crossed threshold means little, are
left alone.

All of it is of Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022
(arXiv:2203.11086), which also estimates batch norms anew after training: `batch_norm_batches`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.nn import QuantLayer
from uniq_jax.quantizers import Encoded, decode
from uniq_jax.spec import OscillationSpec

Arrays = dict[str, jax.Array]

# Moving N2UQ's weights moves the scale that their codes follow from: how often they are looked at
# again. With a learned step the first time is the last.
_ROUNDS = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oscillation:
    """What is known of the codes of every weight, by the path of its kernel, of the kernel's shape.

    Attributes:
      codes: after the last step, uint8.
      directions: of the last change of code, -1 or 1, int8; 0 before any.
      frequencies: moving average of how often a change reversed the one before, float32 in [0, 1].
      averages: moving average of codes, float32; None where no weights are frozen.
      frozen: which weights keep their code, bool; None likewise.
    """

    codes: Arrays
    directions: Arrays
    frequencies: Arrays
    averages: Arrays | None = None
    frozen: Arrays | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a phase does about oscillations.

    Attributes:
      spec: the config's section, of which something is on.
      total_steps: of the phase.
    """

    spec: OscillationSpec
    total_steps: int

    @property
    def freezes(self) -> bool:
        return self.spec.freeze_threshold > 0

    @property
    def tracks(self) -> bool:
        return self.spec.measure or self.freezes

    def damping(self, step: jax.Array) -> jax.Array:
        """λ after so many steps: from 0 to the config's, by a cosine."""
        return annealed(0.0, self.spec.damping, step, self.total_steps)

    def freeze_threshold(self, step: jax.Array) -> jax.Array:
        """The frequency above which weights are frozen: down to the config's, by a cosine."""
        last = self.spec.freeze_threshold
        first = self.spec.freeze_threshold_start or last
        return annealed(first, last, step, self.total_steps)


def plan(spec: OscillationSpec, total_steps: int) -> Plan | None:
    """A phase's plan; None where all is off, and a step costs nothing."""
    found = Plan(spec, total_steps)
    return found if found.tracks or spec.damping else None


def annealed(first: float, last: float, step: jax.Array, total_steps: int) -> jax.Array:
    """From `first` at step 0 to `last` at the end by half a period of a cosine."""
    return last + (first - last) * (1 + jnp.cos(jnp.pi * step / total_steps)) / 2


def counted(
    codes: jax.Array,
    previous: jax.Array,
    direction: jax.Array,
    frequency: jax.Array,
    momentum: float,
) -> tuple[jax.Array, jax.Array]:
    """Direction and frequency of oscillation after one more step.

    A weight oscillates in a step where its code changes, and in the other direction than when it
    changed last, however long ago; `f ← m·o + (1 − m)·f` with o = 1 where it oscillates, else 0
    (section 2.3 of the paper; the first change of all is none).

    Args:
      codes: integers, any shape.
      previous: codes of the step before.
      direction: of the last change, int8.
      frequency: float32.
      momentum: m, in (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> direction, f = jnp.zeros(1, jnp.int8), jnp.zeros(1)
      >>> for old, new in [(1, 2), (2, 2), (2, 1), (1, 2)]:
      ...     direction, f = counted(jnp.array([new]), jnp.array([old]), direction, f, 0.5)
      >>> f
      Array([0.75], dtype=float32)
    """
    sign = jnp.sign(codes.astype(jnp.int32) - previous.astype(jnp.int32)).astype(jnp.int8)
    oscillates = sign * direction < 0
    frequency = momentum * oscillates.astype(frequency.dtype) + (1 - momentum) * frequency
    return jnp.where(sign == 0, direction, sign), frequency


def damping_loss(w: jax.Array, encoded: Encoded, max_code: int) -> jax.Array:
    """`Σ (sg(q(w)) − clip(w, lowest level, highest level))²`, equation 5 of the paper.

    It pulls a weight to the level that it is quantized to; those beyond the last levels are left
    alone. It is a sum: what it does to a weight does not depend on how many others there are. Its
    gradient is `2·(w − q(w))` inside the range and 0 outside; levels and range have none.

    Args:
      w: weights.
      encoded: their codes, with scale and offset.
      max_code: of the grid.

    Returns:
      Shape (), of the scale's dtype.
    """
    scale = jax.lax.stop_gradient(encoded.scale)
    levels = decode(dataclasses.replace(encoded, scale=scale))
    lowest, highest = -scale * encoded.offset, scale * (max_code - encoded.offset)
    # With jnp.clip a weight right on the last level would get half of a gradient, which is zero.
    return jnp.sum(jnp.square(levels - jnp.clip(w.astype(levels.dtype), lowest, highest)))


def kernels(model: nnx.Module) -> dict[str, QuantLayer]:
    """The layers that count, by the path of their kernel: those of the lowest weight width."""
    layers = {
        "/".join(map(str, (*path, "kernel"))): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantLayer) and module.weight_quantizer is not None
    }
    lowest = min((_quantizer(layer).method.bits for layer in layers.values()), default=0)
    return {path: m for path, m in layers.items() if _quantizer(m).method.bits == lowest}


def _quantizer(layer: QuantLayer) -> Any:
    return layer.weight_quantizer


def encode(model: nnx.Module) -> dict[str, Encoded]:
    """The codes (uint8) of the weights that count, by the path of their kernel."""
    return {p: _quantizer(m).encode(m.kernel[...]) for p, m in kernels(model).items()}


def initial(model: nnx.Module, plan: Plan) -> Oscillation:
    """What is known before the first step."""
    codes: Arrays = {path: encoded.codes for path, encoded in encode(model).items()}

    def filled(dtype: Any) -> Arrays:
        return {path: jnp.zeros(array.shape, dtype) for path, array in codes.items()}

    return Oscillation(
        codes=codes,
        directions=filled(jnp.int8),
        frequencies=filled(jnp.float32),
        averages={p: a.astype(jnp.float32) for p, a in codes.items()} if plan.freezes else None,
        frozen=filled(jnp.bool_) if plan.freezes else None,
    )


def damped(
    plan: Plan, model: nnx.Module, grads: Arrays, step: jax.Array
) -> tuple[Arrays, dict[str, jax.Array]]:
    """The gradients with that of λ times `damping_loss`, over all weights that count.

    Args:
      plan: of the phase.
      model: with the parameters that the gradients are of.
      grads: by path.
      step: steps before this one.

    Returns:
      The gradients, and the metric "damping_loss", with its factor.
    """
    strength = plan.damping(step)
    total, grads = jnp.zeros(()), dict(grads)
    for path, layer in kernels(model).items():
        w, quantizer = layer.kernel[...], _quantizer(layer)
        max_code = quantizer.method.grid.max_code
        encoded = jax.lax.stop_gradient(quantizer.encode(w))
        value, slope = jax.value_and_grad(damping_loss)(w, encoded, max_code)
        total = total + value
        grads[path] = grads[path] + (strength * slope).astype(grads[path].dtype)
    return grads, {"damping_loss": strength * total}


def advance(
    plan: Plan,
    build: Callable[[Arrays], nnx.Module],
    before: Arrays,
    after: Arrays,
    state: Oscillation,
    step: jax.Array,
) -> tuple[Arrays, Oscillation, dict[str, jax.Array]]:
    """Counts oscillations of a step, and keeps frozen weights at their codes.

    A weight is frozen once its frequency exceeds the threshold, to the rounded moving average of
    its codes. From then on it takes no updates; where a learned step or N2UQ's scale moves so that
    its code would be another, it is put on its level.

    Args:
      plan: of the phase.
      build: the model of given parameters.
      before: parameters before the optimizer's update, by path.
      after: and after it.
      state: of the step before.
      step: steps before this one.

    Returns:
      The parameters, the state, and the metrics "oscillating_weights", the share of weights whose
      frequency exceeds the config's threshold, and "frozen_weights", the share of frozen ones.
    """
    momentum, params = plan.spec.momentum, dict(after)
    if state.frozen is not None:
        for path, frozen in state.frozen.items():
            params[path] = jnp.where(frozen, before[path], after[path])
    codes, directions, frequencies = {}, {}, {}
    for path, encoded in encode(build(params)).items():
        codes[path] = encoded.codes
        if state.frozen is not None:
            codes[path] = jnp.where(state.frozen[path], state.codes[path], encoded.codes)
        directions[path], frequencies[path] = counted(
            codes[path],
            state.codes[path],
            state.directions[path],
            state.frequencies[path],
            momentum,
        )
    metrics = {"oscillating_weights": _share(above(frequencies, plan.spec.threshold))}
    averages, frozen = state.averages, state.frozen
    if averages is not None and frozen is not None:
        threshold = plan.freeze_threshold(step)
        averages = {
            path: momentum * codes[path].astype(jnp.float32) + (1 - momentum) * old
            for path, old in averages.items()
        }
        newly = {p: (frequencies[p] > threshold) & ~frozen[p] for p in frozen}
        for path, mask in newly.items():
            rounded = jnp.round(averages[path]).astype(codes[path].dtype)
            codes[path] = jnp.where(mask, rounded, codes[path])
        frozen = {path: frozen[path] | mask for path, mask in newly.items()}
        params = held(build, params, codes, frozen)
        metrics["frozen_weights"] = _share(frozen)
    return params, Oscillation(codes, directions, frequencies, averages, frozen), metrics


def held(
    build: Callable[[Arrays], nnx.Module], params: Arrays, codes: Arrays, frozen: Arrays
) -> Arrays:
    """The parameters in which frozen weights that have another code are put on their level."""
    for _ in range(_ROUNDS):
        params = dict(params)
        for path, encoded in encode(build(params)).items():
            level = decode(dataclasses.replace(encoded, codes=codes[path]))
            strays = frozen[path] & (encoded.codes != codes[path])
            params[path] = jnp.where(strays, level.astype(params[path].dtype), params[path])
    return params


def above(frequencies: Arrays, threshold: float) -> Arrays:
    """Which weights oscillate more often than `threshold`, by path, bool."""
    return {path: frequency > threshold for path, frequency in frequencies.items()}


def shares(state: Oscillation, threshold: float) -> dict[str, float]:
    """For each kernel's path the share of its weights that oscillate more often, largest first."""
    found = {p: float(jnp.mean(a)) for p, a in above(state.frequencies, threshold).items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def summary(state: Oscillation, threshold: float, few: int = 3) -> str:
    """One line for people: how many weights oscillate, and the layers where most do."""
    total = float(_share(above(state.frequencies, threshold)))
    worst = [f"{p} ({100 * s:.1f}%)" for p, s in shares(state, threshold).items() if s > 0][:few]
    line = f"{100 * total:.2f}% of the weights oscillate (frequency above {threshold:g})"
    if worst:
        line += f", most in {', '.join(worst)}"
    if state.frozen is not None:
        line += f"; {100 * float(_share(state.frozen)):.2f}% are frozen"
    return line


def _share(masks: Mapping[str, jax.Array]) -> jax.Array:
    """The share of true entries over all arrays, float32 ()."""
    count = sum(mask.size for mask in masks.values())
    return sum(jnp.sum(m, dtype=jnp.float32) for m in masks.values()) / jnp.float32(max(count, 1))
