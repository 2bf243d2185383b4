"""PyTorch state dicts into models and back."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax.interop.schemes import Scheme, schemes
from uniq_jax.nn import QuantizerParam, QuantLayer, calibrate_weights

# The constants that N2UQ's program saves with its parameters, and the only values known here.
_CONSTANTS = {"clip_val": 2.0, "two": 2.0, "one": 1.0, "zero": 0.0, "minusone": -1.0, "eps": 1e-3}

# What a state dict may hold besides, which no forward pass uses: counters of batch norms, and the
# steps that UniQ's program gives to layers it keeps float.
_UNUSED = re.compile(r"(.*\.)?(num_batches_tracked|quan_[wa]\.delta)")

# The attribute of a model that remembers them.
_ORIGIN = "torch_origin"

_FEW = 8


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a state dict, and of every variable of the model.

    Attributes:
      scheme: whose names they are: "torchvision", "pytorchcv", "uniq", "n2uq", "akamaster" or
        "plain".
      loaded: name in the state dict → path in the model.
      missing: path in the model → why it kept its value.
      unexpected: name in the state dict → why it was not used.
    """

    scheme: str
    loaded: Mapping[str, str]
    missing: Mapping[str, str]
    unexpected: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, named as in {self.scheme}"]
        for title, entries in (("missing", self.missing), ("unexpected", self.unexpected)):
            by_reason: dict[str, list[str]] = {}
            for name, reason in entries.items():
                by_reason.setdefault(reason, []).append(name)
            lines += [
                f"{len(names)} {title} ({reason}): {_some(names)}"
                for reason, names in by_reason.items()
            ]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Entry:
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


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A tensor that the model has no use for, kept to be written back."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclasses.dataclass(frozen=True)
class TorchOrigin:
    """Where a model's parameters came from; immutable, so that it is part of the graph definition.

    Attributes:
      scheme: of the names.
      kept: tensors that the model has no use for.
    """

    scheme: str
    kept: tuple[_Kept, ...]


def load_torch_state_dict(
    model: nnx.Module, state_dict: Mapping[str, Any], *, strict: bool = False
) -> LoadReport:
    """Loads a PyTorch state dict into a model.

    Names may be those of torchvision, pytorchcv (its variants "b", where it has the stride of a
    bottleneck on the 1x1 convolution otherwise), UniQ's and N2UQ's programs, or the model's own
    paths with dots; what fits best is taken. Layouts are translated: kernels from (out, in, …) to
    (…, in, out), matrices transposed.

    What a float network lacks keeps its initial value, and weight quantizers then start anew from
    the loaded kernels; call `uniq_jax.calibrate` for the activations'. Parameters keep their dtype,
    but that float64 arrays make them float64 where `jax_enable_x64` is set. Counters and constants
    that the model doesn't use are remembered for `to_torch_state_dict`.

    Args:
      model: changed in place; where an error is raised, not at all.
      state_dict: name → array; may be wrapped as {"state_dict": …}, {"net": …} or {"model": …}, and
        all names may begin with "module.".
      strict: whether a missing or unexpected tensor is an error.

    Returns:
      What was loaded, missing and unexpected, and why.

    Raises:
      TypeError: if a value is not an array of numbers.
      ValueError: if a shape disagrees (the message names both), nothing fits, a constant of N2UQ's
        program has another value than the one that is known, or `strict` is not satisfied.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> from uniq_jax import models
      >>> from uniq_jax.interop import load_torch_state_dict, to_torch_state_dict
      >>> model = models.create("resnet20", num_classes=10, rngs=nnx.Rngs(0))
      >>> state_dict = {"module." + k: v for k, v in to_torch_state_dict(model).items()}
      >>> print(load_torch_state_dict(model, state_dict))
      99 tensors loaded, named as in akamaster
    """
    arrays = _arrays(unwrap(state_dict))
    scheme, entries = _best(model, arrays)
    loaded, kept, unexpected = {}, [], {}
    values: list[tuple[_Entry, np.ndarray]] = []
    for name, value in arrays.items():
        entry = entries.get(name)
        if entry is not None:
            _check_shape(name, value, entry)
            values.append((entry, value))
            loaded[name] = entry.path
        elif _is_kept(name, value):
            kept.append(_Kept(name, value.dtype.str, value.shape, value.tobytes()))
        else:
            unexpected[name] = "the model has nothing of this name"
    if not loaded:
        raise ValueError(
            f"state_dict has no tensor of this {type(model).__name__}: it has "
            f"{_some(list(arrays))}, and the model {_some(list(entries))}"
        )
    found = set(loaded.values())
    missing = {
        entry.path: "learned quantizer state, to be calibrated"
        if isinstance(entry.variable, QuantizerParam)
        else "keeps its initial value"
        for entry in entries.values()
        if entry.path not in found
    }
    report = LoadReport(scheme.name, loaded, missing, unexpected)
    if strict and (missing or unexpected):
        raise ValueError(f"state_dict does not fit strictly:\n{report}")
    for entry, value in values:
        _assign(entry.variable, entry.from_torch(value))
    setattr(model, _ORIGIN, TorchOrigin(scheme.name, tuple(kept)))
    calibrate_weights(model, missing)
    return report


def by_path(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by the model's paths, from arrays named by these or as `load_torch_state_dict` knows.

    Args:
      model: any module; its variables may be of ShapeDtypeStructs.
      arrays: name → array. Names with "/" are paths already; of other names those that the model
        has nothing for stay as they are, but counters and constants are left out.

    Raises:
      ValueError: if a shape disagrees (the message names both).
    """
    if any("/" in name for name in arrays) or not any("." in name for name in arrays):
        return dict(arrays)
    _, entries = _best(model, arrays)
    translated = {}
    for name, value in arrays.items():
        entry = entries.get(name)
        if entry is not None:
            _check_shape(name, value, entry)
            translated[entry.path] = entry.from_torch(value)
        elif not _is_kept(name, value):
            translated[name] = value
    return translated


def to_torch_state_dict(model: nnx.Module, *, names: str | None = None) -> dict[str, np.ndarray]:
    """A model's parameters and running statistics as a PyTorch state dict.

    Args:
      model: any NNX module.
      names: "torchvision", "pytorchcv", "uniq", "n2uq", "akamaster" or "plain", as far as the model
        is known under them. By default the names that its parameters were loaded by, else those of
        its own program.

    Returns:
      Name → array, in PyTorch's layouts, of the parameters' dtype. What `load_torch_state_dict` put
      into the model comes out the same, byte for byte, counters and constants included.

    Raises:
      ValueError: if the model is not known under these names.
    """
    variables = _variables(model)
    known = {scheme.name: scheme for scheme in schemes(model, variables.keys())}
    origin = getattr(model, _ORIGIN, None)
    name = names or (origin.scheme if origin else next(iter(known)))
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"names (={names!r}) must be one of {', '.join(known)}{hint}")
    entries = _entries(model, known[name], variables)
    written = {entry_name: entry.to_torch() for entry_name, entry in entries.items()}
    if origin is not None and origin.scheme == name:
        for kept in origin.kept:
            array = np.frombuffer(kept.data, np.dtype(kept.dtype)).reshape(kept.shape)
            written.setdefault(kept.name, array)
    elif name == "n2uq":
        written |= _clip_constants(model, entries)
    return written


def _clip_constants(model: nnx.Module, entries: Mapping[str, _Entry]) -> dict[str, np.ndarray]:
    """What N2UQ's program counts among its parameters, although nothing trains it."""
    names = {entry.path: name for name, entry in entries.items()}
    constants = {}
    for path, layer in nnx.iter_modules(model):
        if not isinstance(layer, QuantLayer) or layer.weight_quantizer is None:
            continue
        if layer.weight_quantizer.method.kind == "n2uq":
            name = names["/".join(map(str, (*path, "kernel")))].removesuffix("weight") + "clip_val"
            constants[name] = np.full((1,), _CONSTANTS["clip_val"], layer.kernel.dtype)
    return constants


def unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict within {"state_dict": …}, {"net": …} or {"model": …}, without "module."."""
    for key in ("state_dict", "net", "model"):
        inner = state_dict.get(key)
        if isinstance(inner, Mapping):
            return unwrap(inner)
    if state_dict and all(name.startswith("module.") for name in state_dict):
        return {name.removeprefix("module."): value for name, value in state_dict.items()}
    return state_dict


def _arrays(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in state_dict.items():
        array = np.asarray(value)
        if array.dtype.kind in "OUSMm":
            raise TypeError(
                f"state_dict[{name!r}] must be an array of numbers, not {type(value).__name__}"
            )
        arrays[name] = array
    return arrays


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by path; the variables of the model itself, not copies."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param | nnx.BatchStat)
    }


def _entries(
    model: nnx.Module, scheme: Scheme, variables: Mapping[str, nnx.Variable]
) -> dict[str, _Entry]:
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
        entries[name] = _Entry(path, variable, axes, _torch_shape(scheme, name, shape))
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


def _best(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> tuple[Scheme, dict[str, _Entry]]:
    """The scheme under which most tensors are known and fit, the earlier one of two that tie."""
    variables = _variables(model)
    candidates = [
        (scheme, _entries(model, scheme, variables)) for scheme in schemes(model, variables.keys())
    ]

    def count(candidate: tuple[Scheme, dict[str, _Entry]]) -> tuple[int, int]:
        known = candidate[1].keys() & arrays.keys()
        return sum(_fits(arrays[name], candidate[1][name]) for name in known), len(known)

    return max(candidates, key=count)


def _fits(value: np.ndarray, entry: _Entry) -> bool:
    # One number may be a scalar there and a vector of length 1 here.
    return value.shape == entry.shape or value.size == math.prod(entry.shape) == 1


def _check_shape(name: str, value: np.ndarray, entry: _Entry) -> None:
    if not _fits(value, entry):
        raise ValueError(
            f"state_dict[{name!r}] has shape {value.shape}, but the model's {entry.path} needs "
            f"{entry.shape} (in PyTorch's layout)"
        )


def _is_kept(name: str, value: np.ndarray) -> bool:
    if _UNUSED.fullmatch(name):
        return True
    last = name.rsplit(".", 1)[-1]
    if last not in _CONSTANTS:
        return False
    known = np.asarray(_CONSTANTS[last], value.dtype)
    if not np.all(value == known):
        raise ValueError(
            f"state_dict[{name!r}] (={value.tolist()}) must be {_CONSTANTS[last]}, "
            "the constant of N2UQ's program: no other is supported"
        )
    return True


def _assign(variable: nnx.Variable, value: np.ndarray) -> None:
    array = jnp.asarray(value)
    # Only where `jax_enable_x64` is set does an array stay float64.
    variable.set_value(array if array.dtype == jnp.float64 else array.astype(variable.dtype))


def _some(names: list[str]) -> str:
    rest = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {rest} more" if rest > 0 else "")
