"""Which layer gets which quantizers: ordered rules over paths, and the papers' presets."""

import dataclasses
import re
from typing import Literal

from uniq_jax.nn import (
    ActivationMethod,
    LsqActivation,
    LsqWeight,
    N2uqActivation,
    N2uqWeight,
    UniqActivation,
    UniqWeight,
    WeightMethod,
)

# Where networks, ours and others', keep the layers that the papers treat apart.
FIRST = r"conv1|conv_init|conv_stem|stem|stem/conv"
LAST = r"fc|linear|head|classifier|output"
SHORTCUT = r".*(downsample|shortcut|identity_conv|conv_proj).*"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the layers whose path matches.

    Attributes:
      path: a regular expression that the whole path must match; paths look like "layer1/0/conv1".
      weight: a method for the kernel, or None to keep it float.
      activation: a method for the input, or None to keep it float.
      optional: whether the rule may match nothing; otherwise that is an error.
    """

    path: str
    weight: WeightMethod | None = None
    activation: ActivationMethod | None = None
    optional: bool = False

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"path (={self.path!r}) is no regular expression: {error}") from None

    def matches(self, path: str) -> bool:
        """Whether the whole of `path` matches."""
        return re.fullmatch(self.path, path) is not None


def uniq(
    bits: int | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    granularity: Literal["layer", "channel"] = "layer",
    first: str = FIRST,
    last: str = LAST,
    shortcut: str = SHORTCUT,
) -> list[Rule]:
    """UniQ's treatment of a network.

    At two bits and more the first and last layer have 8 bits (the first one's input on the signed
    grid) and shortcut convolutions the low width; at one bit (of weights or activations) first,
    last and shortcut layers stay float.

    Args:
      bits: width of weights and activations, unless given apart.
      weight_bits: 1 to 8.
      activation_bits: 1 to 8.
      granularity: "layer" for one weight step a layer, "channel" for one an output channel.
      first: regular expression of the first layer's path.
      last: regular expression of the last layer's path.
      shortcut: regular expression of the shortcut convolutions' paths.
    """
    weight_bits, activation_bits = _widths(bits, weight_bits, activation_bits)
    weight = UniqWeight(weight_bits, granularity)
    body = Rule(".*", weight, UniqActivation(activation_bits))
    if min(weight_bits, activation_bits) == 1:
        return [Rule(first), Rule(last), Rule(shortcut, optional=True), body]
    return [
        Rule(first, UniqWeight(8, granularity), UniqActivation(8, signed=True)),
        Rule(last, UniqWeight(8, granularity), UniqActivation(8)),
        body,
    ]


def n2uq(
    bits: int | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    quantize_shortcut: bool = True,
    first: str = FIRST,
    last: str = LAST,
    shortcut: str = SHORTCUT,
) -> list[Rule]:
    """N2UQ's treatment of a network: the first and last layer float, all others low-bit.

    Args:
      bits: width of weights and activations, unless given apart.
      weight_bits: 1 to 8.
      activation_bits: 1 to 5.
      quantize_shortcut: whether shortcut convolutions are quantized too (at one bit they never
        are).
      first: regular expression of the first layer's path.
      last: regular expression of the last layer's path.
      shortcut: regular expression of the shortcut convolutions' paths.
    """
    weight_bits, activation_bits = _widths(bits, weight_bits, activation_bits)
    rules = [Rule(first), Rule(last)]
    if not quantize_shortcut or min(weight_bits, activation_bits) == 1:
        rules.append(Rule(shortcut, optional=True))
    return [*rules, Rule(".*", N2uqWeight(weight_bits), N2uqActivation(activation_bits))]


def lsq(
    bits: int | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    first: str = FIRST,
    last: str = LAST,
) -> list[Rule]:
    """LSQ's treatment of a network: 8 bits for the first and last layer, low-bit all others.

    Args:
      bits: width of weights and activations, unless given apart.
      weight_bits: 1 to 8.
      activation_bits: 1 to 8.
      first: regular expression of the first layer's path.
      last: regular expression of the last layer's path.
    """
    weight_bits, activation_bits = _widths(bits, weight_bits, activation_bits)
    return [
        Rule(first, LsqWeight(8), LsqActivation(8, signed=True)),
        Rule(last, LsqWeight(8), LsqActivation(8)),
        Rule(".*", LsqWeight(weight_bits), LsqActivation(activation_bits)),
    ]


def _widths(bits: int | None, weight_bits: int | None, activation_bits: int | None):
    if bits is None and (weight_bits is None or activation_bits is None):
        raise ValueError(
            "bits, or both weight_bits and activation_bits, must be given; "
            f"got bits={bits}, weight_bits={weight_bits}, activation_bits={activation_bits}"
        )
    widths = (
        weight_bits if weight_bits is not None else bits,
        activation_bits if activation_bits is not None else bits,
    )
    assert widths[0] is not None
    assert widths[1] is not None
    return widths[0], widths[1]


def uniq_n2uq(
    bits: int | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    granularity: Literal["layer", "channel"] = "layer",
    first: str = FIRST,
    last: str = LAST,
    shortcut: str = SHORTCUT,
) -> list[Rule]:
    """UniQ's treatment and weights, with N2UQ's learned thresholds for low-bit activations.

    Args:
      bits: width of weights and activations, unless given apart.
      weight_bits: 1 to 8.
      activation_bits: 1 to 5.
      granularity: as in `uniq`.
      first: regular expression of the first layer's path.
      last: regular expression of the last layer's path.
      shortcut: regular expression of the shortcut convolutions' paths.
    """
    weight_bits, activation_bits = _widths(bits, weight_bits, activation_bits)
    *ends, body = uniq(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        granularity=granularity,
        first=first,
        last=last,
        shortcut=shortcut,
    )
    return [*ends, dataclasses.replace(body, activation=N2uqActivation(activation_bits))]
