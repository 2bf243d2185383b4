"""State dicts from files of any format, and back into files."""

import os
import reprlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from uniq_jax.interop import npz, safetensors_file, torch_file, torch_writer
from uniq_jax.interop.dtypes import DTYPES
from uniq_jax.interop.nesting import find_state_dict, without_module
from uniq_jax.interop.pickles import Inert
from uniq_jax.interop.torch_file import Checkpoint

_LEGACY_MAGIC_BYTES = torch_file.LEGACY_MAGIC.to_bytes(10, "little")
_FORMATS = "PyTorch's (.pth, .pt, .pth.tar), .safetensors or .npz"
_show = reprlib.Repr()
_show.maxlist, _show.maxstring = 20, 80


def read_state_dict(path: str | Path, *, key: str | None = None) -> dict[str, np.ndarray]:
    """Names and arrays of a network's state dict, in the order of the file.

    The format is seen from the content, not from the file's name: PyTorch's (before or since 1.6),
    .safetensors (which keeps no order: sorted by name), or .npz without pickles. Nothing in a file
    is executed, PyTorch is not needed, and a damaged file is a ValueError.

    A PyTorch checkpoint may hold more than a state dict. Of its dictionaries with tensors, that one
    is taken which is under the first of these keys, nested or not: "net", "state_dict",
    "model_state_dict", "model", "network", "module", "ema", "model_ema", "ema_state_dict",
    "state_dict_ema"; else the outermost; else the only one, under whatever key. What is no tensor
    in it is left out. "module." (of DataParallel) is removed if every name begins with it.

    Arrays from PyTorch's files share memory where the tensors did, and are read-only.

    Args:
      path: of the file.
      key: of the outermost dictionary: take what is under this one.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: if it is in no known format, is damaged, or has no tensor; or if there is nothing
        under `key`, or it is unclear which of several dictionaries to take.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "network.pth"
      >>> write_state_dict(path, {"fc.weight": np.ones((2, 3), np.float32)})
      >>> {name: array.shape for name, array in read_state_dict(path).items()}
      {'fc.weight': (2, 3)}
    """
    with open(path, "rb") as stream:
        try:
            arrays = _read(stream, key)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    if not arrays:
        raise ValueError(f"{path} has no tensor")
    return without_module(arrays)


def write_state_dict(path: str | Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict, whole or not at all: a file that was there stays until the end.

    Args:
      path: of the file. Its suffix decides on the format: .pth, .pt or .pth.tar for PyTorch's,
        which `torch.load(path, weights_only=True)` reads; .safetensors; or .npz.
      state_dict: name to array.

    Raises:
      OSError: if the file cannot be written.
      ValueError: if the suffix is another, there is no array, or the format can't hold one's dtype.
    """
    path = Path(path)
    write = next((w for suffix, w in _WRITERS.items() if path.name.endswith(suffix)), None)
    if write is None:
        raise ValueError(f"path (={str(path)!r}) must end in one of {', '.join(_WRITERS)}")
    if not state_dict:
        raise ValueError(f"state_dict (={state_dict}) must have an array")
    # Little-endian and in C order; np.ascontiguousarray would give scalars an axis.
    arrays = {name: np.asarray(value, order="C") for name, value in state_dict.items()}
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise ValueError(f"{name!r} has dtype {array.dtype}, which must be one of {allowed}")
        arrays[name] = array.astype(array.dtype.newbyteorder("<"), copy=False)
    # In the same directory, as os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_WRITERS: dict[str, Callable[[BinaryIO, Mapping[str, np.ndarray]], None]] = {
    ".pth": torch_writer.write_arrays,
    ".pt": torch_writer.write_arrays,
    ".pth.tar": torch_writer.write_arrays,
    ".safetensors": safetensors_file.write_arrays,
    ".npz": npz.write_arrays,
}


def _read(stream: BinaryIO, key: str | None) -> dict[str, np.ndarray]:
    file_size = os.fstat(stream.fileno()).st_size
    head = stream.read(512)
    stream.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        try:
            archive = zipfile.ZipFile(stream)
        except Exception as error:  # Of damaged archives nearly any.
            raise ValueError(f"is a damaged or truncated zip archive: {error}") from error
        if not any(name.endswith(".npy") for name in archive.namelist()):
            return _state_dict(torch_file.read_zip(archive, file_size), key)
        stream.seek(0)
        return _flat(npz.read_arrays(stream), key)
    if _LEGACY_MAGIC_BYTES in head[:32]:
        return _state_dict(torch_file.read_legacy(stream), key)
    if head[8:9] == b"{":
        return _flat(safetensors_file.read_arrays(stream), key)
    if head[257:262] == b"ustar":
        raise ValueError(
            "is in the tar format of early PyTorch; load it with PyTorch and save it again"
        )
    begins = f"begins with {head[:16]}" if head else "is empty"
    raise ValueError(f"{begins}; a state dict must be in one of the formats {_FORMATS}")


def _flat(arrays: dict[str, np.ndarray], key: str | None) -> dict[str, np.ndarray]:
    if key is not None:
        raise ValueError(f"has no dictionaries: key (={key!r}) must be None")
    return arrays


def _state_dict(checkpoint: Checkpoint, key: str | None) -> dict[str, np.ndarray]:
    root = checkpoint.root
    if not isinstance(root, dict):
        kind = root.name if isinstance(root, Inert) else type(root).__name__
        raise ValueError(f"has an object of type {kind} and no state dict; save its state_dict()")
    if key is not None and not isinstance(root.get(key), dict):
        keys = [name for name, value in root.items() if isinstance(value, dict)]
        raise ValueError(f"has no dictionary under key (={key!r}); it has {_show.repr(keys)}")
    found = find_state_dict(root if key is None else root[key], torch_file.is_tensor)
    if found is None:
        inner = {name: value for name, value in root.items() if _has_tensors(value)}
        if len(inner) > 1:
            raise ValueError(f"has several state dicts; key must be one of {_show.repr([*inner])}")
        found = next(iter(inner.values()), {})
    arrays = {}
    for name, value in found.items():
        if torch_file.is_tensor(value):
            try:
                arrays[name] = checkpoint.array(value)
            except ValueError as error:
                raise ValueError(f"has a tensor {_show.repr(name)} that {error}") from error
    return arrays


def _has_tensors(tree: Any) -> bool:
    return isinstance(tree, dict) and any(map(torch_file.is_tensor, tree.values()))
