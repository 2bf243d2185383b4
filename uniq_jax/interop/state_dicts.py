"""PyTorch state dicts into models and back."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax.interop.entries import (
    Entry,
    best_entries,
    check_dtypes,
    check_shapes,
    entries_by_name,
    variables_by_path,
)
from uniq_jax.interop.nesting import STATE_DICT_KEYS, find_state_dict, without_module
from uniq_jax.interop.report import LoadReport, some
from uniq_jax.interop.schemes import schemes
from uniq_jax.nn import QuantizerParam, QuantLayer, calibrate_weights

# The constants that N2UQ's program saves with its parameters, and the only values known here.
_CONSTANTS = {"clip_val": 2.0, "two": 2.0, "one": 1.0, "zero": 0.0, "minusone": -1.0, "eps": 1e-3}

# What a state dict may hold besides that no forward pass uses. UniQ's program gives steps to the
# layers that it keeps float, too.
_UNUSED = {
    r"(.*\.)?num_batches_tracked": "counters of batch norms",
    r"(.*\.)?quan_[wa]\.delta": "steps of layers that are float here",
}

# The attribute of a model that remembers them.
_ORIGIN = "torch_origin"


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A tensor that the model has no use for, kept to be written back."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> "_Kept":
        return cls(name, array.dtype.str, array.shape, array.tobytes())


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
    (…, in, out), those of transposed convolutions mirrored too, matrices transposed.

    What a float network lacks keeps its initial value, and weight quantizers then start anew from
    the loaded kernels; call `uniq_jax.calibrate` for the activations'. Parameters keep their dtype,
    but that float64 arrays make them float64 where `jax_enable_x64` is set. Counters and constants
    that the model doesn't use are remembered for `to_torch_state_dict`.

    Args:
      model: changed in place; where an error is raised, not at all.
      state_dict: name → array; may be under the keys that `read_state_dict` knows, as in
        {"state_dict": …}, {"net": …} or {"model": …}, and all names may begin with "module.".
      strict: whether a missing or unexpected tensor is an error.

    Returns:
      What was loaded, missing, unexpected and kept, and why.

    Raises:
      TypeError: if `state_dict` is no mapping, or a value not an array of numbers.
      ValueError: if a shape disagrees (the message names both), an array for a float variable holds
        no floats, nothing is known, a constant of N2UQ's program has another value than the one
        that is known, or `strict` is not satisfied.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> from uniq_jax import models
      >>> from uniq_jax.interop import load_torch_state_dict, to_torch_state_dict
      >>> model = models.create("resnet20", num_classes=10, rngs=nnx.Rngs(0))
      >>> state_dict = {"module." + k: v for k, v in to_torch_state_dict(model).items()}
      >>> print(load_torch_state_dict(model, state_dict))
      97 tensors loaded, named as in akamaster
    """
    arrays = _arrays(state_dict)
    scheme, entries = best_entries(model, arrays)
    check_shapes(arrays, entries)
    check_dtypes(arrays, entries)
    loaded, kept, unexpected = {}, {}, {}
    values: list[tuple[Entry, np.ndarray]] = []
    for name, value in arrays.items():
        entry = entries.get(name)
        if entry is not None:
            values.append((entry, value))
            loaded[name] = entry.path
        elif reason := _reason_to_keep(name, value):
            kept[name] = reason
        else:
            unexpected[name] = "the model has nothing of this name"
    if not loaded:
        raise ValueError(
            f"state_dict has no tensor of this {type(model).__name__}: it has "
            f"{some(list(arrays))}, and the model {some(list(entries))}"
        )
    found = set(loaded.values())
    missing = {
        entry.path: "learned quantizer state, to be calibrated"
        if isinstance(entry.variable, QuantizerParam)
        else "keeps its initial value"
        for entry in entries.values()
        if entry.path not in found
    }
    report = LoadReport(scheme.name, loaded, missing, unexpected, kept)
    if strict and (missing or unexpected):
        raise ValueError(f"state_dict does not fit strictly:\n{report}")
    for entry, value in values:
        _assign(entry.variable, entry.from_torch(value))
    origin = TorchOrigin(scheme.name, tuple(_Kept.of(name, arrays[name]) for name in kept))
    setattr(model, _ORIGIN, origin)
    calibrate_weights(model, missing)
    return report


def by_path(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by the model's paths, from arrays named by these or as `load_torch_state_dict` knows.

    Args:
      model: any module; its variables may be of ShapeDtypeStructs.
      arrays: name → array. Names with "/" are paths already; of other names those that the model
        has nothing for stay as they are, but counters and constants are left out.

    Raises:
      ValueError: if a shape disagrees (the message names both), or an array for a float variable
        holds no floats.
    """
    if any("/" in name for name in arrays) or not any("." in name for name in arrays):
        return dict(arrays)
    _, entries = best_entries(model, arrays)
    check_shapes(arrays, entries)
    check_dtypes(arrays, entries)
    translated = {}
    for name, value in arrays.items():
        entry = entries.get(name)
        if entry is not None:
            translated[entry.path] = entry.from_torch(value)
        elif not _reason_to_keep(name, value):
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
    known = {scheme.name: scheme for scheme in schemes(model, variables_by_path(model).keys())}
    origin = getattr(model, _ORIGIN, None)
    name = names or (origin.scheme if origin else next(iter(known)))
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"names (={names!r}) must be one of {', '.join(known)}{hint}")
    entries = entries_by_name(model, known[name])
    written = {entry_name: entry.to_torch() for entry_name, entry in entries.items()}
    if origin is not None and origin.scheme == name:
        for kept in origin.kept:
            array = np.frombuffer(kept.data, np.dtype(kept.dtype)).reshape(kept.shape)
            written.setdefault(kept.name, array)
    elif name == "n2uq":
        written |= _clip_constants(model, entries)
    return written


def _clip_constants(model: nnx.Module, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
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


def _arrays(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays by name, of whatever was given."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a mapping of names to arrays, not {type(state_dict).__name__}; "
            "uniq_jax.interop.read_state_dict reads one from a file"
        )
    found = find_state_dict(state_dict, lambda value: not isinstance(value, Mapping))
    if not found:
        raise ValueError(
            f"state_dict must hold arrays by name, itself or under one of the keys "
            f"{', '.join(STATE_DICT_KEYS)}; its keys are {some([*map(str, state_dict)]) or 'none'}"
        )
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"state_dict must have names as keys, not {name!r}")
    arrays = {}
    for name, value in without_module(found).items():
        array = np.asarray(value)
        if array.dtype.kind in "OUSMm":
            raise TypeError(
                f"state_dict[{name!r}] must be an array of numbers, not {type(value).__name__}"
            )
        arrays[name] = array
    return arrays


def _reason_to_keep(name: str, value: np.ndarray) -> str:
    """What a tensor is that no forward pass of the model uses; "" if it is none of these."""
    for pattern, reason in _UNUSED.items():
        if re.fullmatch(pattern, name):
            return reason
    last = name.rsplit(".", 1)[-1]
    if last not in _CONSTANTS:
        return ""
    known = np.asarray(_CONSTANTS[last], value.dtype)
    if not np.all(value == known):
        raise ValueError(
            f"state_dict[{name!r}] (={value.tolist()}) must be {_CONSTANTS[last]}, "
            "the constant of N2UQ's program: no other is supported"
        )
    return "constants of N2UQ's program"


def _assign(variable: nnx.Variable, value: np.ndarray) -> None:
    array = jnp.asarray(value)
    # Only where `jax_enable_x64` is set does an array stay float64.
    variable.set_value(array if array.dtype == jnp.float64 else array.astype(variable.dtype))
