"""Reads and writes .npz files of arrays."""

import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np


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
