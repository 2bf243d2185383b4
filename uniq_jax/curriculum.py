"""Training at one width after another, from wide to narrow.

Zhuang et al., "Towards Effective Low-bitwidth Convolutional Neural Networks", CVPR 2018
(arXiv:1711.00205), there called progressive quantization. What a phase takes over from the one
before is `uniq_jax.train.handover`'s part. How epochs are shared out is this project's choice.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

from uniq_jax.spec import ConfigError

# A ConfigDict, whose keys no type checker knows.
Config = Any


def add(
    config: Config,
    text: str,
    method: str,
    epochs: float,
    phase: Callable[[int, int, float], Config],
) -> None:
    """Adds the phases of a curriculum, behind those that the config has.

    The last one has half of the epochs, and the others share the other half evenly. Those that
    change the width of another get 100 calibration batches where `phase` gives them none.

    Args:
      config: changed in place.
      text: "8-4-2" for example, see `uniq_jax.recipes.arguments`.
      method: of all phases.
      epochs: of all phases together.
      phase: makes one of weight bits, activation bits and epochs.
    """
    widths = widths_of(text, method)
    for i, (weight_bits, activation_bits) in enumerate(widths):
        if len(widths) == 1:
            share = 1.0
        else:
            share = 0.5 if i == len(widths) - 1 else 0.5 / (len(widths) - 1)
        section = phase(weight_bits, activation_bits, share * epochs)
        if i > 0 and section.calibration_batches == 0:
            section.calibration_batches = 100
        name = f"w{weight_bits}a{activation_bits}"
        config[name] = section
        config.phases = (*config.phases, name)


def widths_of(text: str, method: str) -> list[tuple[int, int]]:
    """Weight and activation bits of each phase.

    Args:
      text: as in `add`.
      method: of all phases.

    Raises:
      ConfigError: if a width is none, or not below the one before, or not one of the method's.

    Example:
      >>> widths_of("w8a5-4-2", "n2uq")
      [(8, 5), (4, 4), (2, 2)]
    """

    def require(condition: bool, rule: str) -> None:
        if not condition:
            raise ConfigError(f"config argument curriculum (={text!r}) must {rule}")

    widths: list[tuple[int, int]] = []
    for item in text.split("-"):
        match = re.fullmatch(r"([1-8])|w([1-8])a([1-8])", item)
        require(match is not None, "be widths from 1 to 8 with - between, as in 8-4-2 or w8a5-4-2")
        assert match is not None
        both, weights, activations = match.groups()
        widths.append((int(both or weights), int(both or activations)))
    require(
        method not in ("n2uq", "uniq_n2uq") or all(a <= 5 for _, a in widths),
        f"have at most 5 bits of activations for method {method!r}, as in w8a5-4-2",
    )
    pairs = itertools.pairwise(widths)
    require(
        all(new != old and new[0] <= old[0] and new[1] <= old[1] for old, new in pairs),
        "go down from width to width",
    )
    return widths
