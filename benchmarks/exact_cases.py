"""The networks that are compared, and how each is quantized; a part of `exact.py`."""

import dataclasses
import itertools
from collections.abc import Iterator

from flax import nnx

from uniq_jax import models, rules
from uniq_jax.nn import UniqActivation, UniqWeight
from uniq_jax.quantization import quantize

NETWORKS = {
    "resnet20": {"name": "resnet20"},
    "mobilenet_v2": {"name": "mobilenet_v2"},
    "uniq_resnet18": {"name": "preact_resnet18"},
    "n2uq_resnet18": {"name": "resnet18", "activation": "biased_prelu"},
}
"""ResNet-18 in the form of each paper."""

_TWICE = {("uniq", "layer"), ("n2uq", "layer")}
_NOWHERE = "(?!)"
_INTEGER_ENDS = [
    rules.Rule(rules.FIRST, UniqWeight(8), UniqActivation(8, signed=True)),
    rules.Rule(f"{rules.LAST}|{rules.SHORTCUT}", UniqWeight(8), UniqActivation(8)),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One network, quantized in one way.

    Attributes:
      network: a key of `NETWORKS`.
      method: a preset of `uniq_jax.rules`.
      weight_bits: of the layers that are not first, last or on shortcuts.
      activation_bits: of the same.
      granularity: of learned weight steps.
      ends: "preset", or "8-bit" for the first, last and shortcut layers too.
    """

    network: str
    method: str
    weight_bits: int
    activation_bits: int
    granularity: str
    ends: str = "preset"

    def __str__(self) -> str:
        widths = f"W{self.weight_bits}A{self.activation_bits}"
        ends = "" if self.ends == "preset" else f" {self.ends} ends"
        return f"{self.network} {self.method} {widths} {self.granularity}{ends}"

    @property
    def has_float_layers(self) -> bool:
        """Whether the preset leaves the first and last layer float."""
        return self.ends == "preset" and (self.method == "n2uq" or self.weight_bits == 1)

    def create(self) -> nnx.Module:
        """The network, with random weights."""
        fields = dataclasses.asdict(self)
        options = NETWORKS[fields.pop("network")]
        if fields.pop("ends") == "preset":
            return models.create(**options, **fields, num_classes=10, rngs=nnx.Rngs(0))
        network = models.create(**options, num_classes=10, rngs=nnx.Rngs(0))
        preset = {"uniq": rules.uniq, "n2uq": rules.n2uq}[self.method]
        low = preset(self.activation_bits, first=None, last=None, shortcut=_NOWHERE)
        return quantize(network, [*_INTEGER_ENDS, *low])


def cases(networks: list[str], methods: list[str], bits: list[int]) -> Iterator[Case]:
    """All cases; N2UQ's thresholds go to 5 bits, and its weights have no granularity.

    Where a preset has float ends, the smallest widths come with ends of 8 bits too.
    """
    for network, width, method in itertools.product(networks, bits, methods):
        activation_bits = min(width, 5) if "n2uq" in method else width
        for granularity in ("layer",) if method == "n2uq" else ("layer", "channel"):
            case = Case(network, method, width, activation_bits, granularity)
            yield case
            if case.has_float_layers and width < 3 and (method, granularity) in _TWICE:
                yield dataclasses.replace(case, ends="8-bit")
