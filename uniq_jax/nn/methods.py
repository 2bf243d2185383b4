"""Quantization methods as plain descriptions: width, granularity, and the pure functions they name.

A method holds no arrays. It says which learned parameters a quantizer has, how they start, and
which functions of `uniq_jax.quantizers` they go into; the layers of NNX and Linen own the
parameters. One description can thus serve any number of layers.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from uniq_jax.nn.state import QuantizerParam
from uniq_jax.quantizers import Encoded, Grid
from uniq_jax.quantizers.grid import check_bits

# Up to this width UniQ's initial steps are those of its paper.
PAPER_BITS = 4

Parameters = Mapping[str, jax.Array]
ParameterTypes = Mapping[str, type[QuantizerParam]]


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """What every method has. `kind` is its name in configs and tables.

    Attributes:
      bits: width of a code.
    """

    bits: int
    kind: ClassVar[str]
    parameter_types: ClassVar[ParameterTypes]

    def __post_init__(self):
        # A Python int: one of NumPy or JAX hashes and prints otherwise. N2UQ activations, whose
        # range is narrower, check it themselves.
        object.__setattr__(self, "bits", check_bits(self.bits))

    @property
    @abc.abstractmethod
    def grid(self) -> Grid:
        """The levels that codes stand for."""

    @abc.abstractmethod
    def quantize(self, x: jax.Array, parameters: Parameters) -> jax.Array:
        """The fake-quantized `x`, with the method's gradients."""

    @abc.abstractmethod
    def encode(self, x: jax.Array, parameters: Parameters, dtype: DTypeLike) -> Encoded:
        """The codes of `x` with their scale and offset."""

    def edges(self, parameters: Parameters, scale: jax.Array) -> jax.Array:
        """Where the segments of inputs end, n = 2**bits − 1 of them, from the lowest on.

        Threshold i lies in the middle of segment i. What lies below the first edge or above the
        last is clipped: it gets no gradient. Where levels are as far apart as thresholds, edges and
        levels are the same numbers.

        Args:
          parameters: the learned ones.
          scale: of `encode`; one number, shape ().

        Returns:
          Shape (n + 1,).
        """
        del parameters
        return scale * (jnp.arange(self.grid.max_code + 1) - self.grid.offset)


@dataclasses.dataclass(frozen=True)
class WeightMethod(Method):
    """A method for weights, whose parameters start from the weights themselves."""

    @abc.abstractmethod
    def initial(self, w: jax.Array, channel_axis: int) -> dict[str, jax.Array]:
        """The learned parameters' first values for the weights `w`."""


@dataclasses.dataclass(frozen=True)
class ActivationMethod(Method):
    """A method for activations, whose parameters start from calibration batches."""

    @abc.abstractmethod
    def statistic(self, x: jax.Array) -> jax.Array:
        """One number, shape (), of a batch of activations; over batches the largest counts."""

    @abc.abstractmethod
    def from_statistic(self, statistic: jax.Array) -> dict[str, jax.Array]:
        """The learned parameters' first values for the largest statistic seen."""

    @abc.abstractmethod
    def initial(self, dtype: DTypeLike = jnp.float32) -> dict[str, jax.Array]:
        """Values before any calibration: those for a unit normal (behind a ReLU if unsigned)."""
