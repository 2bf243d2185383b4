"""What looks wrong with a quantized layer."""

import math
from collections.abc import Mapping
from typing import Any

# Of fine grids many codes are rarely or never used, and their codes flip all the time.
_COARSE_BITS = 4
_LOW_ENTROPY = 0.5
_MUCH_CLIPPED = {"input": 0.15, "weight": 0.3}
_MANY_FLIPS = 0.01

# What the page says of the marks.
EXPLANATION = (
    f"Marked are, up to {_COARSE_BITS} bits: levels that nothing maps to; codes whose entropy is "
    f"below {_LOW_ENTROPY:.0%} of their width; more than {_MANY_FLIPS:.0%} of the weights' codes "
    "changed by one step. From 2 bits on: more than "
    f"{_MUCH_CLIPPED['weight']:.0%} of the weights beyond the outermost levels, or "
    f"{_MUCH_CLIPPED['input']:.0%} of the inputs (but those below zero, where the lowest level is "
    "zero). And numbers that are not finite."
)


def findings(layer: Mapping[str, Any]) -> list[str]:
    """Says in a few words each what looks wrong.

    Args:
      layer: of `layers.json`.

    Example:
      >>> weight = {"bits": 2, "levels": [-1.5, -0.5, 0.5, 1.5]}
      >>> numbers = {"weight_entropy": 0.4, "weight_dead_levels": 2, "weight_flip_rate": 0.0,
      ...            "weight_clipped_low": 0.0, "weight_clipped_high": 0.0}
      >>> findings({"weight": weight, "numbers": numbers})
      ['weights: 2 dead levels', 'weights: low entropy']
    """
    numbers, found = layer["numbers"], []
    for what in ("weight", "input"):
        if what not in layer:
            continue
        bits = layer[what]["bits"]
        if bits <= _COARSE_BITS:
            dead = numbers[f"{what}_dead_levels"]
            if dead:
                found.append(f"{what}s: {dead} dead {'levels' if dead > 1 else 'level'}")
            if numbers[f"{what}_entropy"] < _LOW_ENTROPY * bits:
                found.append(f"{what}s: low entropy")
        if bits > 1 and clipped_share(layer, what) > _MUCH_CLIPPED[what]:
            found.append(f"{what}s: {clipped_share(layer, what):.0%} clipped")
    if "weight" in layer and layer["weight"]["bits"] <= _COARSE_BITS:
        rate = numbers["weight_flip_rate"]
        if rate > _MANY_FLIPS:
            found.append(f"weights: {rate:.1%} flip in a step")
    broken = [name for name, value in numbers.items() if not math.isfinite(value)]
    if broken:
        found.append(f"not finite: {', '.join(broken)}")
    return found


def clipped_share(layer: Mapping[str, Any], what: str) -> float:
    """The share of a layer's weights or inputs that saturate.

    Inputs below a lowest level of zero don't count: there a quantizer does what a ReLU does.
    """
    low, high = (layer["numbers"][f"{what}_clipped_{side}"] for side in ("low", "high"))
    rectifies = what == "input" and min(layer[what]["levels"]) >= 0
    return high if rectifies else low + high
