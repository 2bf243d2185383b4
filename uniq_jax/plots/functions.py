"""Functions of one number: what a quantizer makes of its input, and its gradients."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uniq_jax.plots import drawing


class Panel(NamedTuple):
    """Functions of the same argument, drawn over one another.

    Attributes:
      title: what they are.
      lines: values by name, one for each argument. A name that is "" stands in no legend, and
        lines that an earlier panel's legend explains, in the same order, need none.
      faint: values to compare with, drawn thin; None for none.
      marks: arguments to draw an upright line at, such as thresholds.
    """

    title: str
    lines: Mapping[str, Any]
    faint: Any = None
    marks: Sequence[float] = ()


def functions(x: Any, panels: Sequence[Panel], argument: str, label: str) -> str:
    """Draws functions of one number.

    Args:
      x: arguments, in ascending order.
      panels: up to three stand side by side, more in two columns.
      argument: the name of `x`.
      label: what the picture shows, for those who don't see it.

    Returns:
      An `<svg>` element.
    """
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    x = np.asarray(x)

    def paint(axes: Any) -> None:
        explained: set[str] = set()
        for axis, panel in zip(axes.flat, panels):
            for mark in panel.marks:
                axis.axvline(mark, color=drawing.FAINT, linewidth=0.8, linestyle=":")
            if panel.faint is not None:
                faint = drawing.finite(panel.faint)
                axis.plot(x, faint, color=drawing.FAINT, linewidth=0.8)
            for index, (name, y) in enumerate(panel.lines.items()):
                colour = drawing.series_colour(index)
                style = drawing.LINE_STYLES[index % len(drawing.LINE_STYLES)]
                y = drawing.finite(y)
                axis.plot(x, y, style, color=colour, label=drawing.plain(name) or None)
            axis.margins(x=0.02, y=0.1)
            axis.set_title(panel.title)
            if not set(filter(None, panel.lines)) <= explained:
                axis.legend(loc="best", handlelength=1.6)
                explained |= set(panel.lines)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel(argument)

    size_in = (7.4, 0.3 + 2.1 * rows)
    return drawing.draw(paint, label=label, size_in=size_in, rows=rows, columns=columns)
