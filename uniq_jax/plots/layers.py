"""Pictures of quantized layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uniq_jax.plots import drawing

# More lines than this hide the histogram; their range is drawn in their place.
_MOST_LINES = 32

# A bin this much higher than the next one (the zeros behind a ReLU) is cut off, and says its share.
_SPIKE = 2.0


def histograms(layer: Mapping[str, Any], label: str) -> str:
    """Draws what a layer gets, with its thresholds, and its weights, with their levels.

    What is not finite is left out, and a note says so.

    Args:
      layer: of `layers.json`.
      label: what the picture shows, for those who don't see it.

    Returns:
      An `<svg>` element.
    """
    panels = [name for name in ("input", "weight") if name in layer]

    def paint(axes: Any) -> None:
        for panel, name in zip(axes[0], panels):
            part = layer[name]
            lines = part["thresholds" if name == "input" else "levels"]
            title = "input" if name == "input" else "weight ÷ step"
            _histogram(panel, part["histogram"], lines, part["levels"], title)
            kind = "thresholds" if name == "input" else "levels"
            shown = f"{len(lines)} {kind}" if len(lines) > 1 else f"1 {kind[:-1]}"
            panel.set_title(
                f"{part['bits']} bits, {part['method']}: {shown}".replace("1 bits", "1 bit")
            )

    return drawing.draw(paint, label=label, size_in=(6.2, 2.0), columns=max(len(panels), 1))


def _histogram(
    panel: Any,
    histogram: Mapping[str, Any],
    lines: Sequence[float],
    levels: Sequence[float],
    name: str,
) -> None:
    has_edges = math.isfinite(histogram["low"]) and math.isfinite(histogram["high"])
    is_finite = has_edges and all(map(math.isfinite, (*lines, *levels)))
    lines, levels = ([x for x in values if math.isfinite(x)] for values in (lines, levels))
    if has_edges:
        name += _bars(panel, histogram, levels)
    if not is_finite:
        panel.text(0.98, 0.95, "not finite", transform=panel.transAxes, ha="right", va="top")
    colour = drawing.series_colour(1)
    if len(lines) <= _MOST_LINES:
        for x in lines:
            panel.axvline(x, color=colour, linewidth=1)
    else:
        panel.axvspan(min(lines), max(lines), color=colour, alpha=0.15, linewidth=0)
    panel.set_xlabel(name)
    panel.set_ylabel("% per bin")
    panel.grid(False)


def _bars(panel: Any, histogram: Mapping[str, Any], levels: Sequence[float]) -> str:
    """Draws the bins; what is to be said of one that is cut off, or nothing."""
    counts = np.asarray(histogram["counts"], np.float64)
    edges = np.linspace(histogram["low"], histogram["high"], counts.size + 1)
    shares = 100 * counts / max(counts.sum(), 1)
    used = np.flatnonzero(counts)
    if used.size:
        low = min([edges[used[0]], *levels])
        high = max([edges[used[-1] + 1], *levels])
        room = 0.02 * (high - low)
        panel.set_xlim(low - room, high + room)
    panel.stairs(shares, edges, fill=True, color=drawing.FILL, linewidth=0)
    ordered = np.sort(shares)
    top, note = ordered[-1] * 1.05, ""
    if ordered[-1] > _SPIKE * ordered[-2] > 0:
        top = ordered[-2] * 1.6
        spike = int(np.argmax(shares))
        low, high = edges[spike : spike + 2]
        where = 0 if low <= 0 <= high else (low + high) / 2
        note = f" ({shares[spike]:.0f}% in the bin at {where:.2g})"
    panel.set_ylim(0, top or 1)
    return note


def over_training(
    layers: Mapping[str, Mapping[str, Sequence[Any]]],
    steps: Sequence[int],
    panels: Sequence[tuple[str, Sequence[str]]],
    label: str,
) -> str:
    """Draws numbers of all layers over the steps of a phase, a line for each layer.

    Args:
      layers: by path, from the first to the last; their numbers by name, one for each step.
      steps: of the phase, at which layers were measured.
      panels: for each its title, and names, of which a layer's first is drawn.
      label: what the picture shows, for those who don't see it.

    Returns:
      An `<svg>` element.
    """

    def paint(axes: Any) -> None:
        for panel, (title, names) in zip(axes.flat, panels):
            for index, numbers in enumerate(layers.values()):
                for name in [name for name in names if name in numbers][:1]:
                    colour = drawing.depth_colour(index, len(layers))
                    marker = "." if len(steps) == 1 else None
                    values = drawing.finite(numbers[name])
                    panel.plot(steps, values, color=colour, linewidth=1, marker=marker)
            panel.set_title(title)
            if "weight_flip_rate" in names:
                # Coarse grids flip a hundred times less than fine ones; and many not at all.
                panel.set_yscale("symlog", linthresh=1e-3)
                panel.set_ylim(0, 1)
        for panel in list(axes.flat)[len(panels) :]:
            panel.set_visible(False)
        for panel in axes[-1]:
            panel.set_xlabel("training step of the phase")
        drawing.whole_steps(axes)

    rows = (len(panels) + 1) // 2
    return drawing.draw(
        paint, label=label, size_in=(8.6, 0.7 + 1.7 * rows), rows=rows, columns=2, share_x=True
    )
