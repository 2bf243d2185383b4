"""Reads .npz files of parameters."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from uniq_jax.interop.torch_names import from_torch_names


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays by this package's paths, from a file that uses these or PyTorch's names.

    Pickled objects are refused: nothing in the file is executed.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: if it is no .npz of plain arrays.
    """
    with path.open("rb") as stream:
        try:
            arrays = read_arrays(stream)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    return by_path(arrays)


def read_arrays(stream: BinaryIO) -> dict[str, np.ndarray]:
    """Arrays by their names in an .npz file.

    Raises:
      ValueError: if it is no .npz of plain arrays.
    """
    try:
        with np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    # Damaged files raise nearly anything: zlib.error, NotImplementedError, TokenError, …
    except Exception as error:
        raise ValueError(f"is no .npz file of plain arrays: {error}") from error


def by_path(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by this package's paths, from arrays by these or by PyTorch's names."""
    is_torch = any("." in name for name in arrays) and not any("/" in name for name in arrays)
    return from_torch_names(arrays) if is_torch else dict(arrays)


def write_arrays(stream: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of NumPy's own dtypes.

    Raises:
      ValueError: if a dtype is not NumPy's own: of such, .npz keeps only the size.
    """
    # Not np.savez: it takes names as its keywords, of which two are its own.
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            if array.dtype.isbuiltin == 2:  # of another package
                raise ValueError(f"{name!r} has dtype {array.dtype}, which .npz can't hold")
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
