"""The training state, and what stays the same from step to step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from uniq_jax import exact
from uniq_jax.spec import LossSpec
from uniq_jax.train import oscillation as oscillations
from uniq_jax.train.network import Arrays, Network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: steps taken, int32 ().
      params: what is trained, by path ("layer1/0/conv1/kernel").
      statistics: what the forward pass updates (batch-norm means and variances), by path.
      opt_state: optax's.
      averages: moving averages of params and statistics, by path; None where there are none.
      oscillation: of weights between levels; None where it is not followed.
    """

    step: jax.Array
    params: Arrays
    statistics: Arrays
    opt_state: Any
    averages: Arrays | None = None
    oscillation: oscillations.Oscillation | None = None

    @property
    def evaluated(self) -> tuple[Arrays, Arrays]:
        """Parameters and statistics to evaluate: the averages, where there are some."""
        if self.averages is None:
            return self.params, self.statistics
        params, statistics = (
            {path: self.averages[path] for path in arrays}
            for arrays in (self.params, self.statistics)
        )
        return params, statistics

    def with_evaluated_statistics(self, statistics: Arrays) -> "TrainState":
        """The state with other statistics to evaluate."""
        if self.averages is None:
            return dataclasses.replace(self, statistics=statistics)
        return dataclasses.replace(self, averages={**self.averages, **statistics})


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What stays the same from step to step.

    Attributes:
      network: that is trained.
      mean, std: of the images, per channel, in 0..255.
      dtype: of the images that the model gets.
      optimizer: of the parameters.
      rate: the learning rate by step, for the log.
      loss: what is minimized.
      ema_decay: of the moving averages; 0 for none.
      seed: of what is random in a step, besides the step's number.
      accumulation_steps: microbatches that a batch is cut into.
      remat: what is computed again for gradients, see `remat.rematerialize`.
      oscillation: what is done about weights that oscillate between levels; None for nothing.
    """

    network: Network
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    loss: LossSpec
    ema_decay: float
    seed: int
    accumulation_steps: int = 1
    remat: str = "none"
    oscillation: oscillations.Plan | None = None

    def build(self, params: Mapping[str, Any], statistics: Mapping[str, Any]) -> nnx.Module:
        """The model with these arrays."""
        return self.network.build(params, statistics)

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8 images, any batch shape, as the model wants them."""
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return exact.normalize(images, self.mean, self.std, dtype).astype(self.dtype)
