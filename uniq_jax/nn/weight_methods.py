"""Methods for weights."""

import dataclasses
from typing import ClassVar, Literal

from uniq_jax import quantizers
from uniq_jax.nn.methods import PAPER_BITS, ParameterTypes, WeightMethod
from uniq_jax.nn.state import Step
from uniq_jax.quantizers import Grid

Granularity = Literal["layer", "channel"]


@dataclasses.dataclass(frozen=True)
class _StepWeight(WeightMethod):
    """One learned step, or one for each output channel."""

    granularity: Granularity = "layer"
    parameter_types: ClassVar[ParameterTypes] = {"step": Step}

    def __post_init__(self):
        super().__post_init__()
        if self.granularity not in ("layer", "channel"):
            raise ValueError(f"granularity (={self.granularity!r}) must be 'layer' or 'channel'")

    def _axis(self, channel_axis: int) -> int | None:
        return channel_axis if self.granularity == "channel" else None


@dataclasses.dataclass(frozen=True)
class UniqWeight(_StepWeight):
    """UniQ's learned step for weights (`quantizers.uniq_weight`).

    It starts from UniQ's constants up to 4 bits, and beyond, where networks are expected to work
    without training, from the least squared error (`quantizers.uniq_weight_fitted_step`).

    Attributes:
      granularity: "layer", one step; or "channel" (UniQ's "kernel-wise"), one for each output.
    """

    kind: ClassVar[str] = "uniq"

    @property
    def grid(self) -> Grid:
        return Grid.symmetric(self.bits)

    def initial(self, w, channel_axis):
        axis = self._axis(channel_axis)
        if self.bits > PAPER_BITS:
            return {
                "step": quantizers.uniq_weight_fitted_step(w, bits=self.bits, channel_axis=axis)
            }
        return {"step": quantizers.uniq_weight_initial_step(w, bits=self.bits, channel_axis=axis)}

    def quantize(self, x, parameters):
        return quantizers.uniq_weight(x, parameters["step"], bits=self.bits)

    def encode(self, x, parameters, dtype):
        return quantizers.uniq_weight_encode(x, parameters["step"], bits=self.bits, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class LsqWeight(_StepWeight):
    """LSQ's learned step for weights (`quantizers.lsq`, signed, with a zero level).

    Attributes:
      granularity: "layer", one step, as in the paper; or "channel", one for each output.
    """

    kind: ClassVar[str] = "lsq"

    @property
    def grid(self) -> Grid:
        return Grid.twos_complement(self.bits)

    def initial(self, w, channel_axis):
        axis = self._axis(channel_axis)
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
