"""Blocks whose forward pass is computed again when their gradients are due, to save memory."""

import functools
from typing import Any

import jax
from flax import nnx

# Products and their inputs cost the time; all else is cheap to compute again.
_PRODUCTS = ("conv_general_dilated", "dot_general")


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in _PRODUCTS


_POLICIES = {
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "convolutions": _is_product,
}


def blocks(model: nnx.Module) -> list[nnx.Module]:
    """A network's residual blocks: the modules in its lists, in their order."""
    stages = [value for value in vars(model).values() if isinstance(value, nnx.List)]
    return [block for stage in stages for block in stage if isinstance(block, nnx.Module)]


def rematerialize(model: nnx.Module, which: str) -> None:
    """Has each block of a network keep less for its backward pass.

    For its gradients a layer keeps its input; a batch norm, an activation and the quantizers of a
    convolution have each one of their own. A block that keeps only what goes into it computes them
    again, one block at a time, when the backward pass gets there: the same operations, and
    gradients that differ by rounding at most.

    Args:
      model: changed in place; build a new one to undo it. Its arrays and their paths stay.
      which: "none"; "blocks", of which each keeps its input alone and computes its forward pass
        twice; or "convolutions", which keep the outputs of convolutions and of matrix products
        too, and compute again the rest: batch norms, activations and quantizers.

    References:
      Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (arXiv:1604.06174).
    """
    if which == "none":
        return
    for block in blocks(model):
        # A module's attributes are its state; a call is looked up in its class.
        object.__setattr__(block, "__class__", _rematerialized(type(block), which))


@functools.cache
def _rematerialized(kind: type[nnx.Module], which: str) -> type[nnx.Module]:
    call: Any = nnx.remat(kind.__call__, policy=_POLICIES[which])
    return type(kind.__name__, (kind,), {"__call__": lambda self, x: call(self, x)})
