"""Pictures of several runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from uniq_jax.plots import drawing
from uniq_jax.plots.curves import Curve

_MARKERS = "os^DvPX*"


class Point(NamedTuple):
    """What a network costs and what it reaches.

    Attributes:
      name: of the run.
      packed_bytes: of the network.
      accuracy: in 0 .. 1.
    """

    name: str
    packed_bytes: int
    accuracy: float


def overlay(runs: Sequence[tuple[str, Sequence[tuple[str, Curve]]]], label: str) -> str:
    """Draws the same curves of several runs over one another.

    Args:
      runs: for each, its name, and its curves with their titles; a title's curves share axes.
      label: what the picture shows, for those who don't see it.

    Returns:
      An `<svg>` element.
    """
    titles = list(dict.fromkeys(title for _, curves in runs for title, _ in curves))

    def paint(axes: Any) -> None:
        for index, (name, curves) in enumerate(runs):
            for title, curve in curves:
                panel = axes[titles.index(title), 0]
                panel.plot(
                    curve.steps,
                    drawing.finite(curve.values),
                    color=drawing.series_colour(index),
                    linestyle=drawing.LINE_STYLES[index % len(drawing.LINE_STYLES)],
                    marker=drawing.marker(curve.values),
                    label=drawing.plain(name),
                )
        for title, panel in zip(titles, axes[:, 0]):
            panel.set_title(title)
        axes[0, 0].legend(loc="best")
        axes[-1, 0].set_xlabel("training step of the run")
        drawing.whole_steps(axes)

    size_in = (8.6, 0.7 + 2.2 * len(titles))
    return drawing.draw(paint, label=label, size_in=size_in, rows=max(len(titles), 1), share_x=True)


def accuracy_against_size(points: Sequence[Point], label: str) -> str:
    """Draws a mark for each network: its packed size, and its accuracy.

    Args:
      points: one for each run.
      label: what the picture shows, for those who don't see it.

    Returns:
      An `<svg>` element.
    """

    def paint(axes: Any) -> None:
        panel = axes[0, 0]
        for index, point in enumerate(points):
            x, y = point.packed_bytes / 1e3, 100 * point.accuracy
            panel.plot(
                [x],
                [y],
                _MARKERS[index % len(_MARKERS)],
                color=drawing.series_colour(index),
                markersize=7,
                label=drawing.plain(point.name),
            )
        panel.set_xlabel("packed size, KB")
        panel.set_ylabel("test accuracy, %")
        panel.margins(0.1)
        # In a frame: its marks are no networks.
        frame = {"frameon": True, "facecolor": "none", "edgecolor": drawing.FAINT}
        panel.legend(loc="best", title="runs", **frame)

    return drawing.draw(paint, label=label, size_in=(8.6, 3.6))
