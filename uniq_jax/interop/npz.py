"""Reads .npz files of parameters."""

from pathlib import Path

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
            with np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        # Damaged files raise nearly anything: zlib.error, NotImplementedError, TokenError, …
        except Exception as error:
            raise ValueError(f"{path} is no .npz file of plain arrays: {error}") from error
    is_torch = any("." in name for name in arrays) and not any("/" in name for name in arrays)
    return from_torch_names(arrays) if is_torch else arrays
