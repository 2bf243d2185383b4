"""The gallery's pictures, drawn where a page says `<figure data-picture="NAME"></figure>`.

A hook of mkdocs. What is drawn is what the package's functions return, and what `jax.grad` makes of
them: no curve is typed in.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from uniq_jax import plots, quantizers
from uniq_jax.quantizers import reference

_PLACE = re.compile(r'<figure data-picture="([^"]*)">\s*</figure>')

# In whose input thresholds fall between two drawn arguments.
_POINTS = 601


def on_post_page(output: str, **_: Any) -> str:
    """Puts the pictures into a finished page, where the search does not read their numbers."""
    return _PLACE.sub(lambda match: f"<figure>{picture(match[1])}</figure>", output)


def picture(name: str) -> str:
    """The picture of this name, an `<svg>` element; an unknown name is a KeyError."""
    return _PICTURES[name]()


def _gradients(function: Callable[..., jax.Array], x: jax.Array, *learned: Any) -> list[jax.Array]:
    """Of each argument, for each x by itself: what it adds to the gradient of a sum."""
    arguments = [jnp.asarray(value, jnp.float32) for value in learned]
    slopes = jax.grad(function, argnums=range(1 + len(arguments)))
    of_each = jax.vmap(slopes, in_axes=(0, *[None] * len(arguments)))
    return list(jax.jit(of_each)(x, *arguments))


def _step(
    quantize: Callable[..., jax.Array], x: jax.Array, variants: dict[str, dict[str, Any]]
) -> str:
    """A quantizer with a learned step of 1, in some variants."""
    value, by_x, by_step = {}, {}, {}
    for name, options in variants.items():

        def function(x: jax.Array, step: jax.Array, options: dict[str, Any] = options) -> jax.Array:
            return quantize(x, step, gradient_scale=False, **options)

        value[name] = function(x, jnp.float32(1))
        by_x[name], by_step[name] = _gradients(function, x, 1)
    name = quantize.__name__
    argument = "w/Δ" if name == "uniq_weight" else "x/Δ"
    panels = [
        plots.Panel("value/Δ", value, faint=x),
        plots.Panel(f"∂value/∂{argument[0]}", by_x),
        plots.Panel("∂value/∂Δ, without g", by_step),
    ]
    return plots.functions(x, panels, argument, f"{name}, forward and backward")


def _uniq_weight() -> str:
    variants = {f"{bits} bit{'s' * (bits > 1)}": {"bits": bits} for bits in (2, 1)}
    return _step(quantizers.uniq_weight, jnp.linspace(-2.5, 2.5, _POINTS), variants)


def _uniq_activation() -> str:
    variants = {f"{bits} bit{'s' * (bits > 1)}": {"bits": bits} for bits in (2, 1)}
    return _step(quantizers.uniq_activation, jnp.linspace(-1, 4.5, _POINTS), variants)


def _lsq() -> str:
    variants = {
        "signed": {"bits": 2, "signed": True},
        "unsigned": {"bits": 2, "signed": False},
    }
    return _step(quantizers.lsq, jnp.linspace(-3, 4.5, _POINTS), variants)


def _n2uq_activation() -> str:
    x = jnp.linspace(-0.5, 3.2, _POINTS)
    start, intervals, scales = 0.2, [1.2, 0.5, 0.8], (1.0, 1.0)
    learned = (start, jnp.asarray(intervals), *scales)
    by_x, by_start, by_interval, by_input_scale, by_output_scale = _gradients(
        quantizers.n2uq_activation, x, *learned
    )
    edges = quantizers.n2uq_activation_edges(*learned[:3])
    surrogate = reference.n2uq_surrogate(*map(jnp.asarray, (x, *learned)))
    thresholds = ((edges[1:] + edges[:-1]) / 2).tolist()
    panels = [
        plots.Panel(
            "value, thresholds, surrogate",
            {"": quantizers.n2uq_activation(x, *learned)},
            faint=surrogate,
            marks=thresholds,
        ),
        plots.Panel("∂value/∂x", {"": by_x}, marks=edges.tolist()),
        plots.Panel(
            "∂value/∂s and ∂value/∂aᵢ",
            {"s": by_start, **{f"a{'₁₂₃'[i]}": by_interval[:, i] for i in range(3)}},
            marks=edges.tolist(),
        ),
        plots.Panel("∂value/∂β₁ and ∂value/∂β₂", {"β₁": by_input_scale, "β₂": by_output_scale}),
    ]
    return plots.functions(x, panels, "x", "n2uq_activation, forward and backward")


def _n2uq_weight() -> str:
    # One channel of these weights: their mean magnitude is 1, which makes σ 3/2.
    w = jnp.linspace(-2, 2, _POINTS)
    value, by_weight = {}, {}
    for gradient in ("reference", "clipped"):

        def function(w: jax.Array, gradient: Any = gradient) -> jax.Array:
            return quantizers.n2uq_weight(w[:, None], bits=2, gradient=gradient)[:, 0]

        value[""] = jax.jit(function)(w)
        # A weight moves its own value only: σ is held constant.
        by_weight[gradient] = jax.jit(jax.grad(lambda w, f=function: f(w).sum()))(w)
    panels = [plots.Panel("value", value, faint=w), plots.Panel("∂value/∂w", by_weight)]
    return plots.functions(w, panels, "w", "n2uq_weight, forward and backward")


def _pact_activation() -> str:
    x = jnp.linspace(-0.5, 2.5, _POINTS)
    value, by_x, by_clip = {}, {}, {}
    for gradient in ("paper", "reference"):

        def function(x: jax.Array, clip: jax.Array, gradient: Any = gradient) -> jax.Array:
            return quantizers.pact_activation(x, clip, bits=2, gradient=gradient)

        value[""] = function(x, jnp.float32(1.5))
        by_x[""], by_clip[gradient] = _gradients(function, x, 1.5)
    panels = [
        plots.Panel("value, c = 1.5", value, faint=x),
        plots.Panel("∂value/∂x", by_x),
        plots.Panel("∂value/∂c", by_clip),
    ]
    return plots.functions(x, panels, "x", "pact_activation, forward and backward")


_PICTURES = {
    "uniq_weight": _uniq_weight,
    "uniq_activation": _uniq_activation,
    "n2uq_activation": _n2uq_activation,
    "n2uq_weight": _n2uq_weight,
    "pact_activation": _pact_activation,
    "lsq": _lsq,
}
