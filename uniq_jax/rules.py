"""Which layer gets which quantizers: ordered rules over paths, and the papers' presets.

The presets know some usual names of first, last and shortcut layers. Where a model has others, they
are arguments; an end that no path matches is an error of `uniq_jax.quantize`, which lists paths.

    rules.uniq(bits=2)                                               ends named as in torchvision
    rules.uniq(bits=2, last="Dense_0")                               Flax's ImageNet ResNet
    rules.uniq(bits=2, first=None, signed=".*", signed_last=True)    a transformer on tokens
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal

from uniq_jax.nn import (
    ActivationMethod,
    LsqActivation,
    LsqWeight,
    N2uqActivation,
    N2uqWeight,
    PactActivation,
    UniqActivation,
    UniqWeight,
    WeightMethod,
)

FIRST = r"conv1|conv_init|conv_stem|stem|stem/conv|patch_embed|patch_embed/proj|embedding"
"""Where networks, ours and others', have their first layer, which the papers treat apart."""

LAST = r"fc|linear|head|classifier|output"
"""Where they have their last layer."""

SHORTCUT = r".*(downsample|shortcut|identity_conv|conv_proj).*"
"""Where they have convolutions on shortcuts."""


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
        except (re.error, TypeError) as error:
            raise ValueError(f"path (={self.path!r}) is no regular expression: {error}") from None

    def matches(self, path: str) -> bool:
        """Whether the whole of `path` matches."""
        return re.fullmatch(self.path, path) is not None


class Decisions:
    """Which of some rules decides about each layer: the first one that matches its path.

    Args:
      rules: in order.

    Raises:
      TypeError: if `rules` is no sequence of `Rule`.
    """

    def __init__(self, rules: Sequence[Rule]):
        if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
            raise TypeError(
                f"rules (={rules!r}) must be a list of Rule, such as uniq_jax.rules.uniq(bits=2)"
            )
        self.rules = tuple(rules)
        self._paths: dict[str, int | None] = {}

    def about(self, path: str) -> Rule | None:
        """The rule that decides about the layer at `path`, if any asks to quantize it."""
        decisive = next((i for i, rule in enumerate(self.rules) if rule.matches(path)), None)
        self._paths[path] = decisive
        if decisive is None:
            return None
        rule = self.rules[decisive]
        return None if rule.weight is None and rule.activation is None else rule

    def check(self) -> None:
        """Raises a ValueError if a rule that is not optional has decided about no layer."""
        used = set(self._paths.values())
        for i, rule in enumerate(self.rules):
            if i not in used and not rule.optional:
                raise ValueError(
                    f"the rule for path={rule.path!r} decides about no layer; the paths are: "
                    f"{', '.join(self._paths)}"
                )


def uniq(
    bits: int | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    granularity: Literal["layer", "channel"] = "layer",
    quantize_shortcut: bool = True,
    signed: str | None = None,
    signed_last: bool = False,
    first: str | None = FIRST,
    last: str | None = LAST,
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
      quantize_shortcut: whether shortcut convolutions are quantized too (at one bit they never
        are).
      signed: regular expression of the paths of layers whose inputs are not rectified, the linear
        bottlenecks of MobileNet-V2 for example, or ".*" for a transformer: they get the signed
        grid. Elsewhere but in the first layer, negative inputs become 0.
      signed_last: whether the last layer's input is not rectified.
      first: regular expression of the first layer's path, or None to treat none apart.
      last: regular expression of the last layer's path, or None likewise.
      shortcut: regular expression of the shortcut convolutions' paths.

    Returns:
      Rules for `uniq_jax.quantize`, in order.

    Raises:
      ValueError: if a width is missing or out of range, or `granularity` is unknown.
    """
    weight_bits, activation_bits = _widths(bits, weight_bits, activation_bits)

    def layer(path: str, widths: tuple[int, int], is_signed: bool = False) -> Rule:
        return Rule(path, UniqWeight(widths[0], granularity), UniqActivation(widths[1], is_signed))

    def end(path: str, is_signed: bool) -> Rule:
        is_float = min(weight_bits, activation_bits) == 1
        return Rule(path) if is_float else layer(path, (8, 8), is_signed)

    return [
        *_ends(end, first, last, signed_last),
        *_shortcut(shortcut, quantize_shortcut, weight_bits, activation_bits),
        *_body(layer, weight_bits, activation_bits, signed),
    ]


def n2uq(
    bits: int | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    quantize_shortcut: bool = True,
    pact: str | None = None,
    first: str | None = FIRST,
    last: str | None = LAST,
    shortcut: str = SHORTCUT,
) -> list[Rule]:
    """N2UQ's treatment of a network: the first and last layer float, all others low-bit.

    Its activations have no negative levels: inputs below the first learned threshold become 0.

    Args:
      bits: width of weights and activations, unless given apart.
      weight_bits: 1 to 8.
      activation_bits: 1 to 5.
      quantize_shortcut: whether shortcut convolutions are quantized too (at one bit they never
        are).
      pact: regular expression of the paths of layers whose input PACT quantizes, with the
        gradients of N2UQ's program: the last convolution of its MobileNet-V2.
      first: regular expression of the first layer's path, or None to treat none apart.
      last: regular expression of the last layer's path, or None likewise.
      shortcut: regular expression of the shortcut convolutions' paths.

    Returns:
      Rules for `uniq_jax.quantize`, in order.

    Raises:
      ValueError: if a width is missing or out of range.
    """
    weight_bits, activation_bits = _widths(bits, weight_bits, activation_bits)
    weight = N2uqWeight(weight_bits)
    rules = [
        *_ends(lambda path, _: Rule(path), first, last),
        *_shortcut(shortcut, quantize_shortcut, weight_bits, activation_bits),
    ]
    if pact is not None:
        rules.append(Rule(pact, weight, PactActivation(activation_bits, gradient="reference")))
    return [*rules, Rule(".*", weight, N2uqActivation(activation_bits))]


def uniq_n2uq(
    bits: int | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    granularity: Literal["layer", "channel"] = "layer",
    quantize_shortcut: bool = True,
    signed_last: bool = False,
    first: str | None = FIRST,
    last: str | None = LAST,
    shortcut: str = SHORTCUT,
) -> list[Rule]:
    """UniQ's treatment and weights, with N2UQ's learned thresholds for low-bit activations.

    Args:
      bits: width of weights and activations, unless given apart.
      weight_bits: 1 to 8.
      activation_bits: 1 to 5.
      granularity: as in `uniq`.
      quantize_shortcut: as in `uniq`.
      signed_last: as in `uniq`.
      first: regular expression of the first layer's path, or None to treat none apart.
      last: regular expression of the last layer's path, or None likewise.
      shortcut: regular expression of the shortcut convolutions' paths.

    Returns:
      Rules for `uniq_jax.quantize`, in order.

    Raises:
      ValueError: if a width is missing or out of range, or `granularity` is unknown.
    """
    weight_bits, activation_bits = _widths(bits, weight_bits, activation_bits)
    *others, body = uniq(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        granularity=granularity,
        quantize_shortcut=quantize_shortcut,
        signed_last=signed_last,
        first=first,
        last=last,
        shortcut=shortcut,
    )
    return [*others, dataclasses.replace(body, activation=N2uqActivation(activation_bits))]


def lsq(
    bits: int | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    granularity: Literal["layer", "channel"] = "layer",
    quantize_shortcut: bool = True,
    signed: str | None = None,
    signed_last: bool = False,
    first: str | None = FIRST,
    last: str | None = LAST,
    shortcut: str = SHORTCUT,
) -> list[Rule]:
    """LSQ's treatment of a network: 8 bits for the first and last layer, low-bit all others.

    Args:
      bits: width of weights and activations, unless given apart.
      weight_bits: 1 to 8.
      activation_bits: 1 to 8.
      granularity: "layer", as in the paper, or "channel", of weight steps.
      quantize_shortcut: whether shortcut convolutions are quantized too.
      signed: as in `uniq`.
      signed_last: as in `uniq`.
      first: regular expression of the first layer's path, or None to treat none apart.
      last: regular expression of the last layer's path, or None likewise.
      shortcut: regular expression of the shortcut convolutions' paths.

    Returns:
      Rules for `uniq_jax.quantize`, in order.

    Raises:
      ValueError: if a width is missing or out of range, or `granularity` is unknown.
    """
    weight_bits, activation_bits = _widths(bits, weight_bits, activation_bits)

    def layer(path: str, widths: tuple[int, int], is_signed: bool = False) -> Rule:
        return Rule(path, LsqWeight(widths[0], granularity), LsqActivation(widths[1], is_signed))

    return [
        *_ends(lambda path, is_signed: layer(path, (8, 8), is_signed), first, last, signed_last),
        *([] if quantize_shortcut else [Rule(shortcut, optional=True)]),
        *_body(layer, weight_bits, activation_bits, signed),
    ]


def _widths(
    bits: int | None, weight_bits: int | None, activation_bits: int | None
) -> tuple[int, int]:
    weights = bits if weight_bits is None else weight_bits
    activations = bits if activation_bits is None else activation_bits
    if weights is None or activations is None:
        raise ValueError(
            "bits, or both weight_bits and activation_bits, must be given; "
            f"got bits={bits}, weight_bits={weight_bits}, activation_bits={activation_bits}"
        )
    return weights, activations


def _ends(
    end: Callable[[str, bool], Rule],
    first: str | None,
    last: str | None,
    signed_last: bool = False,
) -> list[Rule]:
    paths = (first, True), (last, signed_last)
    return [end(path, is_signed) for path, is_signed in paths if path is not None]


def _shortcut(path: str, is_quantized: bool, weight_bits: int, activation_bits: int) -> list[Rule]:
    if is_quantized and min(weight_bits, activation_bits) > 1:
        return []
    return [Rule(path, optional=True)]


def _body(
    layer: Callable[..., Rule], weight_bits: int, activation_bits: int, signed: str | None
) -> list[Rule]:
    widths = weight_bits, activation_bits
    if signed is None:
        return [layer(".*", widths)]
    # Where every input is signed, nothing is left for the last rule.
    return [layer(signed, widths, True), dataclasses.replace(layer(".*", widths), optional=True)]
