"""Reads .npz files of parameters."""

import zipfile
from pathlib import Path

import numpy as np

from uniq_jax.interop.torch_names import from_torch_names


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays by this package's paths, from a file that uses these or PyTorch's names.

    Pickled objects are refused: nothing in the file is executed.

    Raises:
      ValueError: if the file is no .npz of plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file of plain arrays: {error}") from error
    is_torch = any("." in name for name in arrays) and not any("/" in name for name in arrays)
    return from_torch_names(arrays) if is_torch else arrays
