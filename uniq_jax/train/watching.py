"""A training step that tells where its numbers stopped being finite."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from uniq_jax.train.network import Arrays, Network, Teacher, join
from uniq_jax.train.run import Run
from uniq_jax.train.state import Program, TrainState

# Attributes of a watched module: its path, and the worst that went in and that came out.
_PATH, _INPUT, _OUTPUT = "watched_path", "watched_input", "watched_output"

# What `worst` finds.
_FINITE, _INF, _NAN = range(3)
_NAMES = {_INF: "inf", _NAN: "nan"}


class _Worst(nnx.Variable):
    """The worst number seen, int32 (); no parameter, so a step returns it with the statistics."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Where numbers stopped being finite.

    Attributes:
      layer: its path; "" for none in particular.
      what: a clause about it.
    """

    layer: str
    what: str


def worst(tree: Any) -> jax.Array:
    """The worst number in all arrays of floats: 0 finite, 1 infinite, 2 nan; int32 ()."""
    found = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            here = jnp.where(jnp.any(jnp.isinf(leaf)), _INF, _FINITE)
            found = jnp.maximum(found, jnp.where(jnp.any(jnp.isnan(leaf)), _NAN, here))
    return found


@jax.jit
def is_finite(tree: Any) -> jax.Array:
    """Whether all arrays of floats are finite everywhere, bool ()."""
    return worst(tree) == _FINITE


@jax.jit
def _worst_of_each(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: worst(array) for path, array in arrays.items()}


def examine(
    run: Run,
    program: Program,
    model: nnx.Module,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    teacher: Teacher | None,
) -> Finding | None:
    """Finds what is not finite first in the step that follows a state.

    The step itself is run, with modules that look at what they take and give, and an optimizer that
    looks at the gradients.

    Args:
      run: whose step it is.
      program: of the phase.
      model: the phase's network, of ShapeDtypeStructs; changed.
      state: before the step; given up.
      batch: of the step.
      teacher: of the phase, or None.

    Returns:
      The first of these that is not finite, or None: a layer's variable, input or output, in the
      order of the forward pass; the loss; a layer's gradient, in the order of the backward pass;
      what the update makes of a layer.
    """
    callables = [module for _, module in nnx.iter_modules(model) if callable(module)]
    for path, module in nnx.iter_modules(model):
        if callable(module):
            setattr(module, _PATH, join(path))
            for name in (_INPUT, _OUTPUT):
                setattr(module, name, _Worst(jax.ShapeDtypeStruct((), jnp.int32)))
    none = jax.device_put(np.int32(_FINITE), state.step.sharding)
    network = Network.of(model)
    seen = [join(path) for path, kind in network.variables.items() if kind is _Worst]
    kept = jax.tree.map(jnp.copy, (state.step, state.statistics))
    zeros = jax.tree.map(jnp.copy, dict.fromkeys((*seen, *state.params), none))
    watched = TrainState(
        step=state.step,
        params=state.params,
        statistics={**state.statistics, **{path: zeros[path] for path in seen}},
        opt_state={path: zeros[path] for path in state.params},
    )
    found = _worst_of_each({**state.params, **state.statistics})
    variables = {path: int(value) for path, value in jax.device_get(found).items()}
    watching = dataclasses.replace(program, network=network, optimizer=_look(), ema_decay=0.0)
    with _hooked({type(module) for module in callables}) as events:
        step_fn = run.train_step(watching, watched)
        after, metrics = step_fn(watched, batch, teacher)
    flags = {path: int(after.statistics[path]) for path in seen}
    forward = _in_forward(list(dict.fromkeys(events)), variables, flags)
    if forward is not None:
        return forward
    if not np.isfinite(metrics["loss"]):
        return Finding("", f"no layer, but the loss itself is {float(metrics['loss'])}")
    gradients = {path: int(value) for path, value in after.opt_state.items()}
    layers = list(dict.fromkeys(name for name, what in events if what == _OUTPUT))
    backward = _in_backward(layers, gradients)
    if backward is not None:
        return backward
    step, statistics = kept
    state = dataclasses.replace(state, step=step, params=after.params, statistics=statistics)
    state, _ = run.train_step(program, state)(state, batch, teacher)
    return _in_update(layers, state)


def _look() -> optax.GradientTransformation:
    """Changes nothing; its state is the worst number in each gradient."""

    def update(grads: Arrays, state: Any, params: Any = None) -> tuple[Arrays, Arrays]:
        del state, params
        return jax.tree.map(jnp.zeros_like, grads), {p: worst(g) for p, g in grads.items()}

    return optax.GradientTransformation(lambda params: (), update)  # type: ignore[arg-type]


@contextlib.contextmanager
def _hooked(classes: Iterable[type]) -> Iterator[list[tuple[str, str]]]:
    """Lets watched modules of these classes note what they see; yields the order of events.

    The classes are changed, as Python looks calls up there; modules that are not watched (those of
    a teacher) only pass through.
    """
    events: list[tuple[str, str]] = []
    active: list[str] = []

    def watch(module: Any, name: str, values: Any) -> None:
        events.append((getattr(module, _PATH), name))
        variable = getattr(module, name)
        variable[...] = jnp.maximum(variable[...], worst(values))

    def hook(call: Any) -> Any:
        @functools.wraps(call)
        def hooked(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = getattr(module, _PATH, None)
            # A method that calls that of its base class, which is hooked too, is one call.
            if path is None or path in active[-1:]:
                return call(module, *args, **kwargs)
            watch(module, _INPUT, (args, kwargs))
            active.append(path)
            try:
                result = call(module, *args, **kwargs)
            finally:
                active.pop()
            watch(module, _OUTPUT, result)
            return result

        return hooked

    own = {cls: vars(cls).get("__call__") for cls in classes}
    hooks = {cls: hook(cls.__call__) for cls in classes}
    try:
        for cls, hooked in hooks.items():
            setattr(cls, "__call__", hooked)  # noqa: B010 (a type checker would object)
        yield events
    finally:
        for cls, call in own.items():
            if call is None:
                delattr(cls, "__call__")
            else:
                setattr(cls, "__call__", call)  # noqa: B010


def _in_forward(
    events: list[tuple[str, str]], variables: Mapping[str, int], flags: Mapping[str, int]
) -> Finding | None:
    layers = [name for name, what in events if what == _INPUT]
    bad: dict[str, list[str]] = {}
    for path, kind in variables.items():
        if kind:
            owner = _owner(path, layers)
            rest = path.removeprefix(owner).strip("/")
            bad.setdefault(owner, []).append(f"its {rest} holds {_NAMES[kind]}")
    for name, what in events:
        if what == _INPUT and name in bad:
            return Finding(name, "; ".join(bad[name]))
        kind = flags[f"{name}/{what}".strip("/")]
        if kind:
            noun = "input" if what == _INPUT else "output"
            return Finding(name, f"its {noun} holds {_NAMES[kind]}")
    return None


def _in_backward(layers: list[str], gradients: Mapping[str, int]) -> Finding | None:
    """Of `layers` in the order in which they gave their output."""
    bad = {path: kind for path, kind in gradients.items() if kind}
    if not bad:
        return None
    owners = {path: _owner(path, layers) for path in bad}
    last = max(owners.values(), key=lambda owner: layers.index(owner) if owner in layers else -1)
    first = next(path for path, owner in owners.items() if owner == last)
    rest = first.removeprefix(last).strip("/")
    return Finding(
        last, f"its output is finite, but the gradient of its {rest} holds {_NAMES[bad[first]]}"
    )


def _in_update(layers: list[str], state: TrainState) -> Finding | None:
    found = jax.device_get(_worst_of_each({**state.params, **state.statistics}))
    bad = {path: int(kind) for path, kind in found.items() if kind}
    owners = {path: _owner(path, layers) for path in bad}
    for layer in (*layers, ""):
        for path, kind in bad.items():
            if owners[path] == layer:
                rest = path.removeprefix(layer).strip("/")
                return Finding(
                    layer,
                    f"its gradients are finite, but the step's update makes its "
                    f"{rest} {_NAMES[kind]}",
                )
    if not is_finite(state):
        return Finding("", "no layer, but the optimizer's state is not finite")
    return None


def _owner(path: str, layers: Iterable[str]) -> str:
    """The innermost layer that a variable belongs to."""
    holders = [layer for layer in layers if not layer or path.startswith(f"{layer}/")]
    return max(holders, key=len, default="")
