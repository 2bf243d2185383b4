"""A model's variables as PyTorch has them: names, order of axes, shapes."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from uniq_jax.interop.report import some
from uniq_jax.interop.schemes import Scheme, schemes


@dataclasses.dataclass(frozen=True)
class Entry:
    """A variable under its PyTorch name. `axes` permute ours to PyTorch's, then comes `shape`."""

    path: str
    variable: nnx.Variable
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def to_torch(self) -> np.ndarray:
        return np.asarray(self.variable[...]).transpose(self.axes).reshape(self.shape)

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        permuted = [self.variable.shape[axis] for axis in self.axes]
        return value.reshape(permuted).transpose(np.argsort(self.axes))


def variables_by_path(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by path; the variables of the model itself, not copies."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param | nnx.BatchStat)
    }


def entries_by_name(scheme: Scheme, variables: Mapping[str, nnx.Variable]) -> dict[str, Entry]:
    """The variables under their names of this scheme."""
    entries = {}
    for path, variable in variables.items():
        *parents, last = path.split("/")
        if last in ("kernel", "scale", "embedding"):
            last = "weight"
        elif isinstance(variable, nnx.BatchStat):
            last = f"running_{last}"
        name = scheme.rename(".".join([*parents, last]))
        axes = tuple(range(variable.ndim))
        if variable.ndim >= 2 and path.endswith(("/kernel", "weight_quantizer/step")):
            axes = (*axes[:-3:-1], *axes[:-2])
        shape = tuple(variable.shape[axis] for axis in axes)
        entries[name] = Entry(path, variable, axes, _torch_shape(scheme, name, shape))
    return entries


def _torch_shape(scheme: Scheme, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape where it is more than a permutation of ours."""
    if re.search(r"\bbias\d\d\.bias$", name):
        return (1, *shape, 1, 1)
    if shape == () and re.search(r"\.(start|scale1|scale2|clip_val)$", name):
        return (1,)
    if name in scheme.convolutions:
        return (*shape, 1, 1)
    return shape


def best_entries(
    model: nnx.Module, arrays: Mapping[str, np.ndarray]
) -> tuple[Scheme, dict[str, Entry]]:
    """The scheme under which most tensors are known and fit, the earlier one of two that tie."""
    variables = variables_by_path(model)
    candidates = [
        (scheme, entries_by_name(scheme, variables)) for scheme in schemes(model, variables.keys())
    ]

    def count(candidate: tuple[Scheme, dict[str, Entry]]) -> tuple[int, int]:
        known = candidate[1].keys() & arrays.keys()
        return sum(_fits(arrays[name], candidate[1][name]) for name in known), len(known)

    return max(candidates, key=count)


def _fits(value: np.ndarray, entry: Entry) -> bool:
    # One number may be a scalar there and a vector of length 1 here.
    return value.shape == entry.shape or value.size == math.prod(entry.shape) == 1


def check_shapes(arrays: Mapping[str, np.ndarray], entries: Mapping[str, Entry]) -> None:
    """Raises a ValueError that names every array whose shape is not that of its variable."""
    wrong = [n for n, array in arrays.items() if n in entries and not _fits(array, entries[n])]
    if not wrong:
        return
    name, *others = wrong
    entry = entries[name]
    more = f"; of {len(others)} more they disagree too: {some(others)}" if others else ""
    raise ValueError(
        f"state_dict[{name!r}] has shape {arrays[name].shape}, but the model's {entry.path} needs "
        f"{entry.shape} (in PyTorch's layout){more}. Create the model with the state dict's sizes "
        "(num_classes, in_features, granularity, …), or take out what shall start anew"
    )
