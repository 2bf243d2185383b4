"""Reads PyTorch's checkpoint files, without PyTorch."""

import dataclasses
import functools
import io
import mmap
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

import numpy as np

from uniq_jax.interop.pickles import Inert, load
from uniq_jax.interop.torch_objects import (
    BUILDERS,
    NumpyArray,
    Storage,
    Tensor,
    persistent_object,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The objects of a checkpoint file, which must stay open.

    Attributes:
      root: what was saved: dictionaries, lists, numbers, text, and `Tensor`, `NumpyArray`, `Inert`.
      read_storage: gives the bytes under a storage's key.
      byte_order: of these bytes.
      file_size: in bytes.
    """

    root: Any
    read_storage: Callable[[str], bytes]
    byte_order: Literal["<", ">"]
    file_size: int

    def array(self, value: Any) -> np.ndarray:
        """What `is_tensor` holds for, as a read-only array.

        Raises:
          ValueError: if it can't be an array, or its storage is damaged.
        """
        match value:
            case Tensor(storage=storage):
                data = self.read_storage(storage.key)
                return value.view(data, self.byte_order, self.file_size)
            case NumpyArray(value=np.ndarray() as array):
                return array
            case Inert(name):
                raise ValueError(f"is no dense tensor: it was saved by {name}")
        raise ValueError("is a NumPy array whose elements are no numbers")


def is_tensor(value: Any) -> bool:
    """Whether a checkpoint's object is a tensor, or an array, of any kind."""
    match value:
        case Tensor() | NumpyArray():
            return True
        case Inert(name):
            return name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))
    return False


def read_zip(archive: zipfile.ZipFile, file_size: int) -> Checkpoint:
    """The checkpoint in an archive: the format since PyTorch 1.6.

    Raises:
      ValueError: if there is none in it, or it is damaged.
    """
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickled = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickled) != 1:
        raise ValueError(f"is an archive with {len(pickled)} files named data.pkl, and not one")
    folder = pickled[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise ValueError("is a TorchScript program; save its state_dict() with torch.save")
    # Archives that unpack to more than they are would be dangerous.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError("is an archive with compressed entries; torch.save doesn't compress")
    if sum(entry.file_size for entry in archive.infolist()) > file_size:
        raise ValueError("is a damaged archive: its entries are together larger than the file")

    @functools.cache
    def read(name: str) -> bytes:
        if name not in entries:
            raise ValueError(f"is an archive without the entry {name!r}")
        try:
            return archive.read(name)
        except Exception as error:  # Of damaged archives nearly any.
            raise ValueError(f"is an archive whose entry {name!r} is damaged: {error}") from error

    byte_order = read(f"{folder}byteorder") if f"{folder}byteorder" in entries else b"little"
    return Checkpoint(
        root=load(io.BytesIO(read(pickled[0])), BUILDERS, persistent_object),
        read_storage=lambda key: read(f"{folder}data/{key}"),
        byte_order=">" if byte_order == b"big" else "<",
        file_size=file_size,
    )


def read_legacy(stream: BinaryIO) -> Checkpoint:
    """The checkpoint in a file of the format before PyTorch 1.6.

    The file is: four pickles (a magic number, the format's version, facts of the machine, and the
    object), a fifth with the keys of all storages, and then these: length and elements of each.

    Raises:
      ValueError: if it is none, or is damaged.
    """
    # Unlike the file, it allocates no more than there is when it is told to read too much.
    data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Any:
        found = persistent_object(identity)
        if isinstance(found, Storage):
            first = storages.setdefault(found.key, found)
            if (found.dtype, found.whole_length) != (first.dtype, first.whole_length):
                raise ValueError(f"it has two storages under the key {found.key!r}")
        return found

    magic, protocol, _, root, keys = (load(data, BUILDERS, persistent) for _ in range(5))
    if magic != LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise ValueError("is in a format of PyTorch that is not known here")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("has a damaged pickle: its keys of storages are no list of text")
    places: dict[str, slice] = {}
    position = data.tell()
    for key in keys:
        if key not in storages:
            raise ValueError(f"has a storage {key!r} that no tensor uses")
        end = position + 8 + storages[key].whole_length * storages[key].dtype.itemsize
        if end > len(data):
            raise ValueError(f"is truncated: its storages end at byte {end}, it at {len(data)}")
        (length,) = struct.unpack_from("<q", data, position)
        if length != storages[key].whole_length:
            raise ValueError(f"has a storage {key!r} of {length} elements, not as its tensors say")
        places[key] = slice(position + 8, end)
        position = end

    @functools.cache
    def read(key: str) -> bytes:
        if key not in places:
            raise ValueError(f"has no storage {key!r}, though a tensor uses it")
        return data[places[key]]

    return Checkpoint(root, read, "<", len(data))
