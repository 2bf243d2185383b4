"""Initial quantizer parameters of a Linen model, from its weights and from data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import copy, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from uniq_jax.linen.state import STATISTICS, calibrating
from uniq_jax.nn.calibrate import check_batches


def calibrate(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    apply: Callable[[Any, Any], Any] | None = None,
) -> Mapping[str, Any]:
    """Sets every quantizer's parameters from the model's weights and from what flows through it.

    The results are those of `uniq_jax.calibrate`: weight quantizers start anew from the present
    weights; activation quantizers take, over the batches, the largest statistic of their input,
    measured in the float network. A quantizer that nothing reaches keeps its parameters.

    Args:
      model: a Linen module that holds quantized layers. Where it lifts some (`nn.scan`, `nn.vmap`),
        `variable_axes` must list `uniq_jax.linen.STATISTICS` beside "params", at the same axis.
      variables: of the quantized model, or those of the float model, to which the parameters of
        the quantizers that are reached will be added.
      batches: inputs, at least one; all of one shape compile once.
      apply: how to run the bound model on a batch, by default `model(batch)`; in evaluation mode:
        `lambda model, batch: model(batch, train=False)` for example. Nothing but statistics is
        mutable meanwhile.

    Returns:
      A copy of `variables` with other quantizer parameters.

    Raises:
      TypeError: if `batches` is an array, and no iterable of them.
      ValueError: if the model has no quantized layer, or `batches` is empty, or an activation is
        nan or infinite, or a lifted layer's statistics have nowhere to go.
    """
    check_batches(batches)
    run = nn.apply(apply or _call, model, mutable=[STATISTICS])

    def observe(variables, seen, batch):
        with calibrating():
            return run({**variables, STATISTICS: seen}, batch)[1].get(STATISTICS, {})

    compiled = jax.jit(observe)
    seen: Any = None
    for batch in batches:
        if seen is None:
            # All there will be, so that the second batch doesn't compile again.
            shapes = jax.eval_shape(observe, variables, {}, batch)
            seen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        seen = compiled(variables, seen, batch)
    if seen is None:
        raise ValueError("batches is empty, but calibration needs at least one")
    if not seen:
        raise ValueError("model has no quantized layer; build it of QuantConv and QuantDense")
    params = flatten_dict(unfreeze(variables["params"]))
    params |= _parameters(flatten_dict(unfreeze(seen)), params)
    return copy(variables, {"params": unflatten_dict(params)})  # type: ignore


def _call(model: Any, batch: Any) -> Any:
    return model(batch)


def _parameters(seen: dict[Any, Any], params: dict[Any, Any]) -> dict[Any, jax.Array]:
    """The quantizers' parameters, by path, with the dtypes of those that there are in `params`."""
    found = {}
    for path, value in seen.items():
        if path[-1] == "statistic":
            if not jnp.all(jnp.isfinite(value)):
                where = "/".join(path[:-1])
                raise ValueError(f"batches take nan or infinite activations to {where}")
            continue
        *owner, _, name = path
        path = (*owner, name)
        old = params.get(path, value)
        if value.shape != old.shape:
            raise ValueError(
                f"{'/'.join(path)} has statistics of shape {value.shape}, but params of shape "
                f"{old.shape}; {STATISTICS!r} must be lifted as 'params' are"
            )
        found[path] = value.astype(old.dtype)
    return found
