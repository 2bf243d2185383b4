"""Plain folders of images: `train/class/x.jpg`."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from uniq_jax.data import splits
from uniq_jax.data.encoded_data import EncodedData, Record

NAME = "image_folder"
"""The name of the data set whose images are files."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


@dataclasses.dataclass(frozen=True)
class FileRecords:
    """Images that are files.

    Attributes:
        root: Directory that the paths start from.
        paths: One for each example.
        labels: int32 (N,).
    """

    root: str
    paths: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The examples at these positions."""
        root = pathlib.Path(self.root)
        return [
            Record((root / path).read_bytes(), int(label), path)
            for path, label in ((self.paths[index], self.labels[index]) for index in indices)
        ]


def open_folder(
    *, split: str, data_dir: str | None, image_size: int | None, resize_size: int | None
) -> EncodedData:
    """Find the images below `data_dir/SPLIT/CLASS/`, at any depth.

    Classes are the directories of "train" in the order of their names; where there is no "train",
    those of all splits that hold an image. Another split may lack some of them, and its labels are
    the same. Names that begin with a dot, of directories and of files, are left out. A split's
    examples have a fixed random order, so that a sub-split such as "train[:90%]" shows all classes.
    "val" is another name of "validation".

    Raises:
        ValueError: Without `data_dir` or `image_size`, on an unknown split, on a class that "train"
            does not have, or on the directory of a class without an image, in the split or where
            the classes come from.
        FileNotFoundError: If there is no such directory.
    """
    if data_dir is None or image_size is None:
        missing = "data_dir" if data_dir is None else "image_size"
        raise ValueError(
            f"{missing} must be given for name={NAME!r}: data_dir is the directory that holds "
            "train/CLASS/*.jpg, image_size what all images are scaled and cropped to"
        )
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"data_dir={str(root)!r} is not a directory; expected is one with train/CLASS/*.jpg"
        )
    found = _directories(root)
    if "val" in found and "validation" not in found:
        found["validation"] = found.pop("val")
    if "val" not in found and "validation" in found:
        split = splits.rename(split, "val", "validation")
    classes = {name: list(_directories(path)) for name, path in found.items()}
    files = {name: _images(str(path)) for name, path in found.items()}
    naming = ["train"] if classes.get("train") else [name for name in found if files[name]]
    for name in naming:
        _check_no_class_is_empty(found[name], classes[name], files[name])
    split, parts = splits.resolve_split(split, {key: len(paths) for key, paths in files.items()})
    for name, _, _ in parts:
        _check_no_class_is_empty(found[name], classes[name], files[name])
    class_names = sorted({directory for name in naming for directory in classes[name]})
    label_of = {name: label for label, name in enumerate(class_names)}
    chosen = [
        (f"{found[name].name}/{path}", path.partition("/")[0])
        for name, start, stop in parts
        for path in files[name][start:stop]
    ]
    unknown = sorted({name for _, name in chosen} - label_of.keys())
    if unknown:
        raise ValueError(
            f"split={split!r} of {str(root)!r} has the class {unknown[0]!r}, which must be a "
            f"directory of 'train' too; it has {len(class_names)}"
        )
    labels = np.asarray([label_of[name] for _, name in chosen], np.int32)
    records = FileRecords(str(root), tuple(path for path, _ in chosen), labels)
    shape = (image_size, image_size, 3)
    return EncodedData(records, tuple(class_names), NAME, split, shape, image_size, resize_size)


def _directories(parent: pathlib.Path) -> dict[str, pathlib.Path]:
    """The directories in another one by name, in the order of their names."""
    return {
        path.name: path
        for path in sorted(parent.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }


def _images(directory: str) -> list[str]:
    """All images of a split, relative to it, in an order that only their number decides."""
    paths: list[str] = []
    for folder, below, files in os.walk(directory, followlinks=True):
        # Copies and notes of other programs: .ipynb_checkpoints, ._1.jpg of macOS.
        below[:] = [name for name in below if not name.startswith(".")]
        if folder != directory:
            paths += (
                os.path.relpath(os.path.join(folder, file), directory).replace(os.sep, "/")
                for file in files
                if file.lower().endswith(_SUFFIXES) and not file.startswith(".")
            )
    paths.sort()
    # Raw output of a bit generator never changes between versions of NumPy.
    order = np.argsort(np.random.PCG64(0).random_raw(len(paths)), kind="stable")
    return [paths[index] for index in order]


def _check_no_class_is_empty(directory: pathlib.Path, classes: list[str], files: list[str]) -> None:
    """Raises a ValueError for a class whose images would be missed without a word."""
    empty = sorted(set(classes) - {path.partition("/")[0] for path in files})
    if empty:
        raise ValueError(
            f"{str(directory / empty[0])!r} is the directory of a class, and must have a file "
            f"ending in one of {', '.join(_SUFFIXES)}; it has none"
        )
