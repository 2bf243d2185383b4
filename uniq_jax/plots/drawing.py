"""How every picture looks, and how it becomes SVG text that a page can hold.

The text of a page and its background change between light and dark; a picture in it should too. So
it is drawn in stand-in colours, which `to_svg` replaces by those of the page's style sheet.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import matplotlib.colors
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stand-in → what the page's style sheet has in its place.
_PAGE_COLOURS = {
    "#010101": "currentColor",
    "#020202": "var(--faint)",
    "#030303": "var(--fill)",
    **{f"#0404{i:02x}": f"var(--series-{i})" for i in range(8)},
}
TEXT, FAINT, FILL, *_SERIES = _PAGE_COLOURS

_MARGIN_IN = {"left": 0.72, "right": 0.12, "bottom": 0.45, "top": 0.28}

# Lines of which there are as many as layers run through these, from the first layer to the last.
_DEPTH_COLOURS = mpl.colormaps["viridis"]

# Runs are told apart by these too, and not by colour alone.
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # Text stays text, in the page's font.
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": TEXT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.4,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.formatter.limits": (-2, 5),
    "axes.formatter.use_mathtext": False,
}


def series_colour(index: int) -> str:
    """The colour of one of several lines; the same again after eight."""
    return _SERIES[index % len(_SERIES)]


def depth_colour(index: int, count: int) -> str:
    """The colour of a layer's line: of medium lightness, to be seen on white and on black."""
    return matplotlib.colors.to_hex(_DEPTH_COLOURS(0.2 + 0.6 * index / max(count - 1, 1)))


def draw(
    paint: Any,
    *,
    label: str,
    size_in: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    share_x: bool = False,
) -> str:
    """Makes a picture.

    Args:
      paint: a function of an array of axes, (rows, columns).
      label: what the picture shows, for those who don't see it. Two pictures of a page have two.
      size_in: width and height, inches of 72 points.
      rows: of axes.
      columns: of axes.
      share_x: whether the axes below one another have one x axis.

    Returns:
      An `<svg>` element. The same data give the same text.
    """
    style: Any = {**_STYLE, "svg.hashsalt": label}
    with mpl.rc_context(style):
        figure = Figure(figsize=size_in)
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, columns, sharex=share_x, squeeze=False)
        # Said, and not found by the layout engine, which takes longer than all the rest.
        width, height = size_in
        inner_height = (height - _MARGIN_IN["top"] - _MARGIN_IN["bottom"]) / rows
        inner_width = (width - _MARGIN_IN["left"] - _MARGIN_IN["right"]) / columns
        figure.subplots_adjust(
            left=_MARGIN_IN["left"] / width,
            right=1 - _MARGIN_IN["right"] / width,
            bottom=_MARGIN_IN["bottom"] / height,
            top=1 - _MARGIN_IN["top"] / height,
            wspace=0.65 / (inner_width - 0.65),
            hspace=(0.35 if share_x else 0.6) / (inner_height - 0.4),
        )
        paint(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _to_element(file.getvalue(), label)


def _to_element(text: str, label: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # In a page these names need no declaration, and pictures must not share ids.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    # The page's font, in the picture's sizes.
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    # A hundredth of a point is small enough, in attributes: what a text says is not touched.
    text = re.sub(
        r' (?:d|x|y|transform|width|height)="[^"]*"',
        lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]),
        text,
    )
    text = re.sub(r"\s*\n\s*", "\n", text)
    for stand_in, colour in _PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2]
    in_pixels = [f"{float(points) * 4 / 3:g}" for points in (width, height)]
    start = '<svg role="img" aria-label="{}" width="{}" height="{}"'.format(
        escape(label), *in_pixels
    )
    pattern = r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>'
    return re.sub(pattern, lambda m: f"{start} {m[1]}>", text, count=1).strip()


def plain(name: str) -> str:
    """A name as Matplotlib shows it unchanged: "$" begins a formula there, "_" hides a label."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def marker(values: Sequence[float]) -> str | None:
    """A dot on each value where they are few: a line of one point is none."""
    return "." if len(values) < 60 else None


def whole_steps(axes: Any) -> None:
    """Lets the x axes of all panels have ticks at whole numbers only."""
    for panel in axes.flat:
        panel.xaxis.get_major_locator().set_params(integer=True)


def finite(values: Sequence[Any]) -> np.ndarray:
    """Numbers to draw: what is missing or infinite leaves a gap."""
    array = np.asarray([np.nan if v is None else v for v in values], np.float64)
    return np.where(np.isfinite(array), array, np.nan)
