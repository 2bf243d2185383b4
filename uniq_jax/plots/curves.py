"""The curves of one run: loss, accuracy and learning rate."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from uniq_jax.plots import drawing


class Curve(NamedTuple):
    """One number over the steps of a run.

    Attributes:
      steps: of the run, its phases one after another.
      values: as many.
    """

    steps: Sequence[int]
    values: Sequence[float]


class Phase(NamedTuple):
    """A phase of a run, in its curves.

    Attributes:
      name: of the phase.
      start: steps of the run before it.
      curves: by name: "loss", "test_loss", "test_accuracy", "learning_rate"; those there are.
    """

    name: str
    start: int
    curves: dict[str, Curve]


def curves(phases: Sequence[Phase], label: str) -> str:
    """Draws loss, test accuracy and learning rate below one another.

    Args:
      phases: in their order.
      label: what the picture shows, for those who don't see it.

    Returns:
      An `<svg>` element.
    """

    def paint(axes: Any) -> None:
        loss, accuracy, rate = axes[:, 0]
        for index, phase in enumerate(phases):
            colour = drawing.series_colour(index)
            for name, panel, style, scale, what in (
                ("loss", loss, "-", 1, "training"),
                ("test_loss", loss, "--", 1, "test"),
                ("test_accuracy", accuracy, "-", 100, ""),
                ("learning_rate", rate, "-", 1, ""),
            ):
                if name not in phase.curves:
                    continue
                curve = phase.curves[name]
                values = scale * drawing.finite(curve.values)
                marker = drawing.marker(curve.values)
                title = drawing.plain(f"{phase.name} {what}".strip())
                panel.plot(curve.steps, values, style, color=colour, marker=marker, label=title)
        if _spans(loss, 30):
            loss.set_yscale("log")
        for phase in phases[1:]:
            for panel in axes[:, 0]:
                panel.axvline(phase.start, color=drawing.FAINT, linewidth=1)
        loss.set_ylabel("loss")
        accuracy.set_ylabel("test accuracy, %")
        rate.set_ylabel("learning rate")
        rate.set_xlabel("training step of the run")
        drawing.whole_steps(axes)
        for panel in (loss, accuracy):
            if panel.lines:
                panel.legend(loc="best", ncols=2)

    return drawing.draw(paint, label=label, size_in=(8.6, 6.2), rows=3, share_x=True)


def _spans(axes: Any, ratio: float) -> bool:
    """Whether what is drawn is positive and spans so large a ratio."""
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [[]])
    values = values[np.isfinite(values)]
    return values.size > 0 and values.min() > 0 and values.max() / values.min() > ratio
