"""The README's picture: python docs/_hooks/readme_picture.py writes docs/overview.svg.

It is a file of the repository, as pages of hosting sites draw nothing by themselves. It shows
what the package's functions return, and what `jax.grad` makes of them.
"""

import pathlib
import re

import jax
import jax.numpy as jnp

from uniq_jax import plots, quantizers
from uniq_jax.quantizers import reference

FILE = pathlib.Path(__file__).parents[1] / "overview.svg"

# A file has no page around it to say these.
_COLOURS = {
    "currentColor": "#1f2328",
    "var(--faint)": "#8b949e",
    "var(--series-0)": "#1f6fb4",
    "var(--series-1)": "#c8501e",
}
_STEP = 0.9
_START, _INTERVALS, _SCALES = 0.1, (1.2, 0.45, 0.85), (1.0, 1.35)


def picture() -> str:
    """The text of the file."""
    x = jnp.linspace(-0.4, 3.2, 601)
    intervals = jnp.asarray(_INTERVALS)

    def uniq(x: jax.Array) -> jax.Array:
        return quantizers.uniq_activation(x, _STEP, bits=2)

    def n2uq(x: jax.Array) -> jax.Array:
        return quantizers.n2uq_activation(x, _START, intervals, *_SCALES)

    edges = quantizers.n2uq_activation_edges(_START, intervals, _SCALES[0])
    thresholds = (edges[1:] + edges[:-1]) / 2
    numbers = (x, *map(jnp.asarray, (_START, _INTERVALS, *_SCALES)))
    slopes = {
        name: jax.jit(jax.vmap(jax.grad(lambda x, f=function: f(x[None])[0])))(x)
        for name, function in (("UniQ", uniq), ("N2UQ", n2uq))
    }
    panels = [
        plots.Panel(
            "UniQ: one learned step",
            {"": uniq(x)},
            faint=jnp.clip(x, 0, 3 * _STEP),
            marks=[_STEP * (code - 0.5) for code in (1, 2, 3)],
        ),
        plots.Panel(
            "N2UQ: learned thresholds",
            {"": n2uq(x)},
            faint=reference.n2uq_surrogate(*numbers),
            marks=thresholds.tolist(),
        ),
        plots.Panel("their gradients, ∂value/∂x", slopes),
    ]
    label = "Two quantizers of 2 bits: values over their input, thresholds, and gradients"
    return _alone(plots.functions(x, panels, "x", label))


def _alone(element: str) -> str:
    """An element of a page as a file of its own, on white."""
    for name, colour in _COLOURS.items():
        element = element.replace(name, colour)
    if "var(" in element:
        raise ValueError(f"no colour for {re.findall(r'var[(][^)]*[)]', element)}")
    names = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    start, inside = element.split(">", 1)
    start = start.replace("<svg", f"<svg {names}")
    return f'{start}>\n<rect width="100%" height="100%" fill="#fff"/>{inside}\n'


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
