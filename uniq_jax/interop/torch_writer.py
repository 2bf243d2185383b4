"""Writes PyTorch's checkpoint files, without PyTorch."""

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from uniq_jax.interop.torch_objects import STORAGE_DTYPES

# torch.load can map files into memory, where storages must begin as elements do.
_ALIGNMENT = 64
_HEADER_SIZE = 30  # of an entry of a zip archive, before its name and its extra field
# PyTorch has no storage class of their own for its newer dtypes: bytes, and a dtype beside them.
_UNTYPED = "torch.storage.UntypedStorage"
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != _UNTYPED}
_ORDERED_DICT = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE


def write_arrays(stream: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, which must be little-endian and in C order, as the state dict they are.

    The format is that of PyTorch since 1.6. The same arrays give the same bytes.
    """
    with zipfile.ZipFile(stream, "w") as archive:

        def add(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")  # Of 1980: no time makes files differ.
            padding = -(stream.tell() + _HEADER_SIZE + len(entry.filename) + 4) % _ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(entry, data)

        add("data.pkl", b"".join(_pickled(arrays)))
        add("byteorder", b"little")
        for i, array in enumerate(arrays.values()):
            add(f"data/{i}", array.tobytes())
        add("version", b"3\n")


def _pickled(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """What `torch.save` pickles, without its memo."""
    yield pickle.PROTO + b"\x02" + _ORDERED_DICT + pickle.MARK
    for i, (name, array) in enumerate(arrays.items()):
        yield _text(name)
        storage = _STORAGE_NAMES.get(array.dtype.name, _UNTYPED)
        is_typed = storage != _UNTYPED
        yield _global(f"torch._utils._rebuild_tensor_v{2 if is_typed else 3}")
        yield pickle.MARK
        yield pickle.MARK + _text("storage") + _global(storage) + _text(str(i)) + _text("cpu")
        yield _integer(array.size if is_typed else array.nbytes) + pickle.TUPLE + pickle.BINPERSID
        yield _integer(0)
        yield _integers(array.shape)
        yield _integers(tuple(stride // array.itemsize for stride in array.strides))
        yield pickle.NEWFALSE + _ORDERED_DICT
        if not is_typed:
            yield _global(f"torch.{array.dtype.name}")
        yield pickle.TUPLE + pickle.REDUCE
    yield pickle.SETITEMS + pickle.STOP


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _global(name: str) -> bytes:
    module, _, name = name.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _integer(number: int) -> bytes:
    if number < 2**31:
        return pickle.BININT + struct.pack("<i", number)
    data = pickle.encode_long(number)
    return pickle.LONG1 + bytes([len(data)]) + data


def _integers(numbers: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, numbers)) + pickle.TUPLE
