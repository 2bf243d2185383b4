"""Files that are written as a whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Files of the same names in a directory of their own, which take the place of `paths` in the
    end, the last one last; an exception leaves `paths` as they are.

    Args:
      *paths: in one directory.

    Raises:
      FileNotFoundError: if that directory is not there.

    Example:
      >>> folder = Path(tempfile.mkdtemp())
      >>> with written(folder / "a.txt") as (file,):
      ...     _ = file.write_text("all of it")
      >>> [path.name for path in folder.iterdir()]
      ['a.txt']
    """
    if not paths[0].parent.is_dir():
        raise FileNotFoundError(f"{paths[0]} cannot be written: {paths[0].parent} is no directory")
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=paths[0].parent))
    try:
        files = tuple(folder / path.name for path in paths)
        yield files
        for file, path in zip(files, paths):
            os.replace(file, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
