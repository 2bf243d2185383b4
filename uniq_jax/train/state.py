"""The training state and the pure steps over it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from uniq_jax.nn import QuantizerParam

Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: steps taken, int32 ().
      params: what is trained, by path ("layer1/0/conv1/kernel").
      statistics: what the forward pass updates (batch-norm means and variances), by path.
      opt_state: optax's.
    """

    step: jax.Array
    params: Arrays
    statistics: Arrays
    opt_state: Any


# Compared by identity: as a static argument of `jit` its hash costs nothing.
@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What stays the same from step to step.

    Attributes:
      graphdef: the model without its arrays.
      variables: type of every variable, by its path.
      mean, std: of the images, per channel, in 0..255.
      dtype: of the images that the model gets.
      optimizer: of the parameters.
      rate: the learning rate by step, for the log.
    """

    graphdef: nnx.GraphDef
    variables: Mapping[tuple[Any, ...], type[nnx.Variable]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    optimizer: optax.GradientTransformation
    rate: optax.Schedule

    def build(self, params: Mapping[str, Any], statistics: Mapping[str, Any]) -> nnx.Module:
        """The model with these arrays."""
        values = {**params, **statistics}
        state = [(path, kind(values[join(path)])) for path, kind in self.variables.items()]
        return nnx.merge(self.graphdef, nnx.from_flat_state(state))

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8 images, any batch shape, as the model wants them."""
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        centred = images.astype(dtype) - jnp.asarray(self.mean, dtype)
        return (centred / jnp.asarray(self.std, dtype)).astype(self.dtype)


def quantizer_state(
    variables: Mapping[tuple[Any, ...], type[nnx.Variable]],
) -> dict[str, bool]:
    """For each parameter's path, whether a quantizer learns it."""
    return {
        join(path): issubclass(kind, QuantizerParam)
        for path, kind in variables.items()
        if issubclass(kind, nnx.Param)
    }


def join(path: tuple[Any, ...]) -> str:
    """A variable's path as one string."""
    return "/".join(map(str, path))


def split(model: nnx.Module) -> tuple[Arrays, Arrays]:
    """The model's parameters, and its other variables, by path."""
    params, statistics = {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        kind = params if isinstance(variable, nnx.Param) else statistics
        kind[join(path)] = variable[...]
    return params, statistics


def train_step(
    program: Program, state: TrainState, batch: Mapping[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of training on one global batch.

    Args:
      program: static.
      state: given up (its buffers are donated where this is jitted).
      batch: "image", uint8 (batch, height, width, channels), and "label", int32 (batch,).

    Returns:
      The next state, and the step's "loss" (mean cross entropy), "accuracy", "gradient_norm"
      and "learning_rate".
    """

    def loss_of(params: Arrays):
        model: Any = program.build(params, state.statistics)
        model.train()
        logits = model(program.normalize(batch["image"]))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        _, statistics = split(model)
        return jnp.mean(losses), (statistics, logits)

    (loss, (statistics, logits)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"]),
        "gradient_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(program.rate(state.step)),
    }
    return (
        TrainState(
            step=state.step + 1,
            params=cast(Arrays, optax.apply_updates(state.params, updates)),
            statistics=statistics,
            opt_state=opt_state,
        ),
        metrics,
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
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    mask = batch["mask"]
    correct = (jnp.argmax(logits, axis=-1) == batch["label"]) & mask
    return {
        "correct": jnp.sum(correct.astype(jnp.int32)),
        "count": jnp.sum(mask.astype(jnp.int32)),
        "loss": jnp.sum(jnp.where(mask, losses, 0)),
    }
