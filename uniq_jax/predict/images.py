"""Image files, as a network's evaluation would get them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uniq_jax.data import decoding
from uniq_jax.predict.model import Model

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files, and in place of a directory all images below it in the order of their names.

    Names that begin with a dot are left out there, as they are in training.

    Raises:
      FileNotFoundError: if a path does not exist, or a directory has no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"IMAGE (={str(path)!r}) does not exist")
            found.append(path)
            continue
        below = sorted(p for p in path.rglob("*") if _is_image(p.relative_to(path)))
        if not below:
            suffixes = ", ".join(_SUFFIXES)
            raise FileNotFoundError(f"IMAGE (={str(path)!r}) is a directory without {suffixes}")
        found += below
    return found


def _is_image(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in _SUFFIXES and not is_hidden


def read_image(path: Path, model: Model) -> np.ndarray:
    """One image at the size of the network's input, by the steps of the evaluation of training.

    The shorter side is resized, and the square at the centre is taken; grey becomes RGB and the
    reverse.

    Args:
      path: of a PNG, JPEG, BMP or GIF file.
      model: whose input it is for.

    Returns:
      uint8 of the model's image shape.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: if it holds no image, or, where the input is no square, one of another size.
    """
    height, width, channels = model.image_shape
    sizes = {"image_size": height, "resize_size": model.about.resize_size or height}
    try:
        image = decoding.decode_image(
            path.read_bytes(), channels=channels, **(sizes if height == width else {})
        )
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # Pillow's decoders raise of every kind.
        raise ValueError(
            f"IMAGE (={str(path)!r}) must be a PNG, JPEG, BMP or GIF file: {error}"
        ) from error
    if image.shape != model.image_shape:
        raise ValueError(
            f"IMAGE (={str(path)!r}) has {image.shape[1]}x{image.shape[0]} pixels, and must have "
            f"{width}x{height}: the network's input is no square, and images are not resized to it"
        )
    return image
