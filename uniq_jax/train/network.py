"""A model without its arrays, and its arrays by path."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.nn import QuantizerParam

Arrays = dict[str, jax.Array]


# Compared by identity: as a static argument of `jit` its hash costs nothing.
@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A model without its arrays.

    Attributes:
      graphdef: NNX's.
      variables: type of every variable, by its path.
    """

    graphdef: nnx.GraphDef
    variables: Mapping[tuple[Any, ...], type[nnx.Variable]]

    @classmethod
    def of(cls, model: nnx.Module) -> "Network":
        """That of a model of arrays or ShapeDtypeStructs."""
        graphdef, state = nnx.split(model)
        return cls(graphdef, {path: type(v) for path, v in nnx.to_flat_state(state)})

    def build(self, params: Mapping[str, Any], statistics: Mapping[str, Any]) -> nnx.Module:
        """The model with these arrays."""
        values = {**params, **statistics}
        state = [(path, kind(values[join(path)])) for path, kind in self.variables.items()]
        return nnx.merge(self.graphdef, nnx.from_flat_state(state))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A float network in evaluation mode; a step gets it beside the state, and never changes it.

    Attributes:
      arrays: parameters and statistics, by path.
      network: static.
    """

    arrays: Arrays
    network: Network = dataclasses.field(metadata={"static": True})

    def logits(self, images: jax.Array) -> jax.Array:
        """Of normalized images, (batch, classes)."""
        model: Any = self.network.build(self.arrays, {})
        model.eval()
        logits = model(images)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def quantizer_state(
    variables: Mapping[tuple[Any, ...], type[nnx.Variable]],
) -> dict[str, bool]:
    """For each parameter's path, whether a quantizer learns it."""
    return {
        join(path): issubclass(kind, QuantizerParam)
        for path, kind in variables.items()
        if issubclass(kind, nnx.Param)
    }


def join(path: tuple[Any, ...]) -> str:
    """A variable's path as one string."""
    return "/".join(map(str, path))


def split(model: nnx.Module) -> tuple[Arrays, Arrays]:
    """The model's parameters, and its other variables, by path."""
    params, statistics = {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        kind = params if isinstance(variable, nnx.Param) else statistics
        kind[join(path)] = variable[...]
    return params, statistics
