"""Methods for activations."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from uniq_jax import quantizers
from uniq_jax.nn.methods import PAPER_BITS, ActivationMethod, ParameterTypes
from uniq_jax.nn.state import Clip, Scale, Step, Threshold
from uniq_jax.quantizers import Grid


def _unit_step(bits: int, signed: bool = False) -> float:
    return quantizers.optimal_step(bits, "normal" if signed else "rectified_normal")


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
        if self.bits > PAPER_BITS:
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

    def edges(self, parameters, scale):
        del scale
        return quantizers.n2uq_activation_edges(
            parameters["start"], parameters["intervals"], parameters["input_scale"]
        )


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
