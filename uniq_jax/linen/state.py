"""Learned quantizer state among the params of a Linen module, and the product that uses it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from uniq_jax.nn import ActivationMethod, WeightMethod
from uniq_jax.nn.product import product

STATISTICS = "quantizer_statistics"
"""The collection of what calibration sees; `variable_axes` of lifted layers have to list it."""

# Names of the params that hold a quantizer's learned parameters.
WEIGHT_STATE, ACTIVATION_STATE = "weight_quantizer", "activation_quantizer"

_calibrating = contextvars.ContextVar("whether what is traced is watched", default=False)


@contextlib.contextmanager
def calibrating() -> Iterator[None]:
    """Within it no quantizer is active; each notes in STATISTICS how it would start."""
    token = _calibrating.set(True)
    try:
        yield
    finally:
        _calibrating.reset(token)


def quantized_product(
    module: nn.Module,
    inputs: jax.Array,
    kernel: jax.Array,
    weight: WeightMethod | None,
    activation: ActivationMethod | None,
    multiply: Callable[..., jax.Array],
    *,
    exact: bool,
    param_dtype: Any = jnp.float32,
) -> jax.Array:
    """A product of quantized operands, whose learned parameters are params of `module`.

    For layers of your own; `QuantConv` and `QuantDense` call it too.

    Args:
      module: a Linen module, in its compact method. It gets the params "weight_quantizer" and
        "activation_quantizer", as far as there is something to learn.
      inputs: in the dtype of the computation.
      kernel: in its own dtype; outputs along the last axis, and sums over all others.
      weight: the kernel's method, or None.
      activation: the input's method, or None.
      multiply: the bilinear map, such as `jax.lax.dot_general` with its dimensions; takes
        `preferred_element_type`.
      exact: whether to multiply integer levels, where both operands have some.
      param_dtype: of the activation quantizer's parameters, unless narrower than float32.

    Raises:
      ValueError: if the levels' sums could overflow an int32.
    """
    if _calibrating.get():
        if weight is not None:
            _note(module, WEIGHT_STATE, jnp.zeros(()), weight.initial(kernel, -1))
        if activation is not None:
            statistic = activation.statistic(inputs)
            _note(module, ACTIVATION_STATE, statistic, activation.from_statistic(statistic))
        weight = activation = None
    weight_state: Mapping[str, jax.Array] = {}
    activation_state: Mapping[str, jax.Array] = {}
    if weight is not None and weight.parameter_types:
        weight_state = module.param(WEIGHT_STATE, lambda key: weight.initial(kernel, -1))
    if activation is not None:
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        activation_state = module.param(ACTIVATION_STATE, lambda key: activation.initial(dtype))
    return product(
        inputs,
        kernel,
        None if weight is None else (weight, weight_state),
        None if activation is None else (activation, activation_state),
        multiply,
        exact=exact,
    )


def _note(
    module: nn.Module, name: str, statistic: jax.Array, parameters: Mapping[str, jax.Array]
) -> None:
    """Keeps the largest statistic, and the parameters that belong to it.

    Both stay in the scope of the layer, so that transforms treat them as they do its params.
    """
    if not module.is_mutable_collection(STATISTICS):
        raise ValueError(
            f"{'/'.join(module.path)} is lifted without the collection {STATISTICS!r}; list it in "
            "variable_axes (of nn.scan, nn.vmap and the like) beside 'params'"
        )
    noted = {"statistic": statistic, "parameters": dict(parameters)}
    zeros = jax.tree.map(jnp.zeros_like, noted)
    module.sow(STATISTICS, name, noted, reduce_fn=_largest, init_fn=lambda: zeros)


def _largest(old: Any, new: Any) -> Any:
    wins = new["statistic"] >= old["statistic"]
    return {
        "statistic": jnp.maximum(old["statistic"], new["statistic"]),
        "parameters": jax.tree.map(
            lambda a, b: jnp.where(wins, b, a), old["parameters"], new["parameters"]
        ),
    }


def is_quantizer_state(params: Any) -> Any:
    """Which leaves of Linen params are learned by quantizers, as a tree of bools.

    Such a tree is what `optax.masked` takes, and `jax.tree.map` makes labels of it for
    `optax.multi_transform`. Weight decay should leave these leaves alone.

    Args:
      params: a nested mapping, `variables["params"]` for example.

    Example:
      >>> import jax.numpy as jnp
      >>> from uniq_jax.linen import is_quantizer_state
      >>> layer = {"kernel": jnp.ones(3), "weight_quantizer": {"step": jnp.ones(())}}
      >>> is_quantizer_state({"fc": layer})
      {'fc': {'kernel': False, 'weight_quantizer': {'step': True}}}
    """
    names = WEIGHT_STATE, ACTIVATION_STATE
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: any(getattr(entry, "key", None) in names for entry in path), params
    )
