"""A model's variables as PyTorch has them: names, order of axes, shapes."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax.interop.report import some
from uniq_jax.interop.schemes import Scheme, schemes


@dataclasses.dataclass(frozen=True)
class Entry:
    """A variable under its PyTorch name.

    `mirrored` axes of ours are turned round, `axes` permute ours to PyTorch's, then comes `shape`.
    """

    path: str
    variable: nnx.Variable
    mirrored: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def to_torch(self) -> np.ndarray:
        array = np.flip(np.asarray(self.variable[...]), self.mirrored)
        return array.transpose(self.axes).reshape(self.shape)

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        permuted = [self.variable.shape[axis] for axis in self.axes]
        return np.flip(value.reshape(permuted).transpose(np.argsort(self.axes)), self.mirrored)


def variables_by_path(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by path; the variables of the model itself, not copies."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param | nnx.BatchStat)
    }


def entries_by_name(model: nnx.Module, scheme: Scheme) -> dict[str, Entry]:
    """The variables of a model under their names of this scheme."""
    variables = variables_by_path(model)
    names = {path: _torch_name(scheme, path, variables[path]) for path in variables}
    how_often = collections.Counter(names.values())
    transposed = {
        "/".join(map(str, (*path, "kernel")))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
    }
    entries = {}
    for path, variable in variables.items():
        # Two of one module that would both be a weight keep their own names.
        name = names[path] if how_often[names[path]] == 1 else path.replace("/", ".")
        axes, mirrored = tuple(range(variable.ndim)), ()
        if path in transposed:
            # JAX slides the kernel over the output; PyTorch, from each input, its mirror image.
            axes, mirrored = (*axes[-2:], *axes[:-2]), axes[:-2]
        elif variable.ndim >= 2 and f"/{path}".endswith(("/kernel", "/weight_quantizer/step")):
            axes = (*axes[:-3:-1], *axes[:-2])
        shape = _torch_shape(scheme, name, tuple(variable.shape[axis] for axis in axes))
        entries[name] = Entry(path, variable, mirrored, axes, shape)
    return entries


def _torch_name(scheme: Scheme, path: str, variable: nnx.Variable) -> str:
    *parents, last = path.split("/")
    if last in ("kernel", "scale", "embedding"):
        last = "weight"
    elif isinstance(variable, nnx.BatchStat):
        last = f"running_{last}"
    return scheme.rename(".".join([*parents, last]))


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
    known = schemes(model, variables_by_path(model).keys())
    candidates = [(scheme, entries_by_name(model, scheme)) for scheme in known]

    def count(candidate: tuple[Scheme, dict[str, Entry]]) -> tuple[int, int]:
        known = candidate[1].keys() & arrays.keys()
        return sum(_fits(arrays[name], candidate[1][name]) for name in known), len(known)

    return max(candidates, key=count)


def _fits(value: np.ndarray, entry: Entry) -> bool:
    # One number may be a scalar there and a vector of length 1 here.
    return value.shape == entry.shape or value.size == math.prod(entry.shape) == 1


def check_dtypes(arrays: Mapping[str, np.ndarray], entries: Mapping[str, Entry]) -> None:
    """Raises a ValueError that names an array whose numbers are of another kind than its variable.

    Complex numbers would lose a part, and integers in a float's place are codes of its numbers.
    """
    for name, array in arrays.items():
        entry = entries.get(name)
        if entry is None or not jnp.issubdtype(entry.variable.dtype, jnp.floating):
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raw = "; NumPy's own files make that of bfloat16" if array.dtype.kind == "V" else ""
            raise ValueError(
                f"state_dict[{name!r}] has dtype {array.dtype}, but the model's {entry.path} needs "
                f"floating-point numbers{raw}"
            )


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
