"""Quantization methods as plain descriptions: width, granularity, and the pure functions they name.

A method holds no arrays. It says which learned parameters a quantizer has, how they start, and
which functions of `uniq_jax.quantizers` they go into; the layers of NNX and Linen own the
parameters. One description can thus serve any number of layers.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from uniq_jax import quantizers
from uniq_jax.nn.state import Clip, QuantizerParam, Scale, Step, Threshold
from uniq_jax.quantizers import Encoded, Grid

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
        # A grid checks its width; N2UQ activations, whose range is narrower, check it themselves.
        Grid.unsigned(self.bits)

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


Granularity = Literal["layer", "channel"]

# Up to this width UniQ's initial steps are those of its paper.
_TRAINED_BITS = 4


def _unit_step(bits: int, signed: bool = False) -> float:
    return quantizers.optimal_step(bits, "normal" if signed else "rectified_normal")


def _check_granularity(granularity: str) -> None:
    if granularity not in ("layer", "channel"):
        raise ValueError(f"granularity (={granularity!r}) must be 'layer' or 'channel'")


@dataclasses.dataclass(frozen=True)
class UniqWeight(WeightMethod):
    """UniQ's learned step for weights (`quantizers.uniq_weight`).

    It starts from UniQ's constants up to 4 bits, and beyond, where networks are expected to work
    without training, from the least squared error (`quantizers.uniq_weight_fitted_step`).

    Attributes:
      granularity: "layer", one step; or "channel" (UniQ's "kernel-wise"), one for each output.
    """

    granularity: Granularity = "layer"
    kind: ClassVar[str] = "uniq"
    parameter_types: ClassVar[ParameterTypes] = {"step": Step}

    def __post_init__(self):
        super().__post_init__()
        _check_granularity(self.granularity)

    @property
    def grid(self) -> Grid:
        return Grid.symmetric(self.bits)

    def initial(self, w, channel_axis):
        axis = channel_axis if self.granularity == "channel" else None
        if self.bits > _TRAINED_BITS:
            return {
                "step": quantizers.uniq_weight_fitted_step(w, bits=self.bits, channel_axis=axis)
            }
        return {"step": quantizers.uniq_weight_initial_step(w, bits=self.bits, channel_axis=axis)}

    def quantize(self, x, parameters):
        return quantizers.uniq_weight(x, parameters["step"], bits=self.bits)

    def encode(self, x, parameters, dtype):
        return quantizers.uniq_weight_encode(x, parameters["step"], bits=self.bits, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class LsqWeight(WeightMethod):
    """LSQ's learned step for weights (`quantizers.lsq`, signed, with a zero level).

    Attributes:
      granularity: "layer", one step, as in the paper; or "channel", one for each output.
    """

    granularity: Granularity = "layer"
    kind: ClassVar[str] = "lsq"
    parameter_types: ClassVar[ParameterTypes] = {"step": Step}

    def __post_init__(self):
        super().__post_init__()
        _check_granularity(self.granularity)

    @property
    def grid(self) -> Grid:
        return Grid.twos_complement(self.bits)

    def initial(self, w, channel_axis):
        axis = channel_axis if self.granularity == "channel" else None
        return {"step": quantizers.lsq_initial_step(w, bits=self.bits, channel_axis=axis)}

    def quantize(self, x, parameters):
        return quantizers.lsq(x, parameters["step"], bits=self.bits)

    def encode(self, x, parameters, dtype):
        return quantizers.lsq_encode(x, parameters["step"], bits=self.bits, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class N2uqWeight(WeightMethod):
    """N2UQ's entropy-preserving weights (`quantizers.n2uq_weight`): per channel, nothing learned.

    Attributes:
      gradient: "reference" (1/σ, as N2UQ's program) or "clipped" (plain straight-through).
    """

    gradient: Literal["reference", "clipped"] = "reference"
    kind: ClassVar[str] = "n2uq"
    parameter_types: ClassVar[ParameterTypes] = {}

    def __post_init__(self):
        super().__post_init__()
        if self.gradient not in ("reference", "clipped"):
            raise ValueError(f"gradient (={self.gradient!r}) must be 'reference' or 'clipped'")

    @property
    def grid(self) -> Grid:
        return Grid.symmetric(self.bits)

    def initial(self, w, channel_axis):
        del w, channel_axis
        return {}

    def quantize(self, x, parameters):
        del parameters
        return quantizers.n2uq_weight(x, bits=self.bits, gradient=self.gradient)

    def encode(self, x, parameters, dtype):
        del parameters
        return quantizers.n2uq_weight_encode(x, bits=self.bits, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class UniqActivation(ActivationMethod):
    """UniQ's learned step for activations (`quantizers.uniq_activation`); starts as `UniqWeight`.

    Attributes:
      signed: the symmetric grid, for inputs that are not rectified.
    """

    signed: bool = False
    kind: ClassVar[str] = "uniq"
    parameter_types: ClassVar[ParameterTypes] = {"step": Step}

    @property
    def grid(self) -> Grid:
        return Grid.symmetric(self.bits) if self.signed else Grid.unsigned(self.bits)

    def statistic(self, x):
        if self.bits > _TRAINED_BITS:
            return quantizers.uniq_activation_fitted_step(x, bits=self.bits, signed=self.signed)
        return quantizers.uniq_activation_initial_step(x, bits=self.bits, signed=self.signed)

    def from_statistic(self, statistic):
        return {"step": statistic}

    def initial(self, dtype: DTypeLike = jnp.float32):
        return {"step": jnp.asarray(_unit_step(self.bits, self.signed), dtype)}

    def quantize(self, x, parameters):
        return quantizers.uniq_activation(x, parameters["step"], bits=self.bits, signed=self.signed)

    def encode(self, x, parameters, dtype):
        return quantizers.uniq_activation_encode(
            x, parameters["step"], bits=self.bits, signed=self.signed, dtype=dtype
        )


@dataclasses.dataclass(frozen=True)
class LsqActivation(ActivationMethod):
    """LSQ's learned step for activations (`quantizers.lsq`).

    Attributes:
      signed: whether the grid has negative levels.
    """

    signed: bool = False
    kind: ClassVar[str] = "lsq"
    parameter_types: ClassVar[ParameterTypes] = {"step": Step}

    @property
    def grid(self) -> Grid:
        return Grid.twos_complement(self.bits) if self.signed else Grid.unsigned(self.bits)

    def statistic(self, x):
        return quantizers.lsq_initial_step(x, bits=self.bits, signed=self.signed)

    def from_statistic(self, statistic):
        return {"step": statistic}

    def initial(self, dtype: DTypeLike = jnp.float32):
        return {"step": jnp.asarray(_unit_step(self.bits, self.signed), dtype)}

    def quantize(self, x, parameters):
        return quantizers.lsq(x, parameters["step"], bits=self.bits, signed=self.signed)

    def encode(self, x, parameters, dtype):
        return quantizers.lsq_encode(
            x, parameters["step"], bits=self.bits, signed=self.signed, dtype=dtype
        )


@dataclasses.dataclass(frozen=True)
class N2uqActivation(ActivationMethod):
    """N2UQ's learned thresholds (`quantizers.n2uq_activation`), 1 to 5 bits.

    Calibrated, it starts as the uniform quantizer of UniQ's initial step; uncalibrated, as in
    N2UQ's own code (start 0, intervals 2/n, scales 1).
    """

    kind: ClassVar[str] = "n2uq"
    parameter_types: ClassVar[ParameterTypes] = {
        "start": Threshold,
        "intervals": Threshold,
        "input_scale": Scale,
        "output_scale": Scale,
    }

    def __post_init__(self):
        quantizers.n2uq_activation_initial(bits=self.bits)

    @property
    def grid(self) -> Grid:
        return Grid.unsigned(self.bits)

    def statistic(self, x):
        return quantizers.uniq_activation_initial_step(x, bits=self.bits)

    def from_statistic(self, statistic):
        initial = quantizers.n2uq_activation_initial(
            bits=self.bits, step=statistic, dtype=statistic.dtype
        )
        return initial._asdict()

    def initial(self, dtype: DTypeLike = jnp.float32):
        return quantizers.n2uq_activation_initial(bits=self.bits, dtype=dtype)._asdict()

    def quantize(self, x, parameters):
        return quantizers.n2uq_activation(x, **parameters)

    def encode(self, x, parameters, dtype):
        return quantizers.n2uq_activation_encode(x, **parameters, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class PactActivation(ActivationMethod):
    """PACT's learned clip (`quantizers.pact_activation`).

    Attributes:
      gradient: "paper", or "reference" as in N2UQ's program.
    """

    gradient: Literal["paper", "reference"] = "paper"
    kind: ClassVar[str] = "pact"
    parameter_types: ClassVar[ParameterTypes] = {"clip": Clip}

    def __post_init__(self):
        super().__post_init__()
        if self.gradient not in ("paper", "reference"):
            raise ValueError(f"gradient (={self.gradient!r}) must be 'paper' or 'reference'")

    @property
    def grid(self) -> Grid:
        return Grid.unsigned(self.bits)

    def statistic(self, x):
        return quantizers.pact_initial_clip(x, bits=self.bits)

    def from_statistic(self, statistic):
        return {"clip": statistic}

    def initial(self, dtype: DTypeLike = jnp.float32):
        return {"clip": jnp.asarray(_unit_step(self.bits) * self.grid.max_code, dtype)}

    def quantize(self, x, parameters):
        return quantizers.pact_activation(
            x, parameters["clip"], bits=self.bits, gradient=self.gradient
        )

    def encode(self, x, parameters, dtype):
        return quantizers.pact_activation_encode(x, parameters["clip"], bits=self.bits, dtype=dtype)
