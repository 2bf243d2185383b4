"""Types of learned quantizer state, by which optimizers, shardings and checkpoints select it."""

from flax import nnx


class QuantizerParam(nnx.Param):
    """Any learned parameter of a quantizer; never decayed, and often given a rate of its own."""


class Step(QuantizerParam):
    """The distance of two levels and of two thresholds: UniQ's Δ, LSQ's s."""


class Threshold(QuantizerParam):
    """Where codes step up: N2UQ's start and intervals."""


class Scale(QuantizerParam):
    """A factor on a quantizer's input or output: N2UQ's β₁ and β₂."""


class Clip(QuantizerParam):
    """The upper bound of a clipped activation: PACT's c."""
