"""Any supported data set by name: into memory, or to be read from disk batch by batch."""

from typing import Any

import numpy as np

from uniq_jax.data import decoding, digits, image_data, image_folder, splits, tfds_source
from uniq_jax.data.encoded_data import EncodedData
from uniq_jax.data.image_data import ImageData

IN_MEMORY = ("auto", "always", "never")
"""What `in_memory` may be."""


def load(
    name: str,
    *,
    split: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
) -> ImageData:
    """Read one split of an image-classification set into memory.

    Args:
        name: "digits", which scikit-learn carries (1437 train and 360 test images of 8x8); any
            image-classification set of TFDS that is prepared in `data_dir` in the array_record
            format, such as "cifar10", "cifar10:3.0.2" or "emnist/letters"; or "image_folder" for
            files `data_dir/SPLIT/CLASS/*.jpg`.
        split: "train" or "test", any other split of the set, or a sub-split in TFDS syntax
            ("train[:90%]", "train[45000:]"). "test" is "validation" for a set with no "test",
            or whose "test" has no labels (ImageNet).
        data_dir: Directory of the prepared sets; by default the environment variable
            TFDS_DATA_DIR, or ~/tensorflow_datasets. Not used for "digits".
        image_size: Scale each image's shorter side to this and crop the centre square. Needed for
            sets whose images differ in size.
        resize_size: Scale the shorter side to this instead, at least `image_size`; 256 for 224 is
            how ImageNet is tested.

    Returns:
        The split, decoded.

    Raises:
        ValueError: On an unknown set or split, on images of varying size without `image_size`, a
            set without an image or label, more than 8 GiB of decoded images, or a broken image.
        FileNotFoundError: If `data_dir` is missing or the set is not prepared in it.
    """
    if name != "digits":
        encoded = load_encoded(
            name, split=split, data_dir=data_dir, image_size=image_size, resize_size=resize_size
        )
        return encoded.into_memory()
    _check_sizes(image_size, resize_size)
    arrays = digits.read_digits()
    sizes = {key: len(labels) for key, (_, labels) in arrays.items()}
    split, parts = splits.resolve_split(split, sizes)
    images = np.concatenate([arrays[key][0][start:stop] for key, start, stop in parts])
    labels = np.concatenate([arrays[key][1][start:stop] for key, start, stop in parts])
    if image_size is not None:
        scaled = [decoding.resize_and_crop(image, image_size, resize_size) for image in images]
        images = np.stack(scaled)
    return ImageData(images, labels, tuple("0123456789"), name, split)


def load_encoded(
    name: str,
    *,
    split: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
) -> EncodedData:
    """Find one split of a set on disk, whose images are decoded when a batch needs them.

    Args:
        name: As that of `load`, but for "digits".
        split: As that of `load`.
        data_dir: As that of `load`.
        image_size: As that of `load`; with random resized crops, also their side.
        resize_size: As that of `load`.

    Returns:
        The split; no image of it was read.

    Raises:
        ValueError: As `load`, but for what only decoding shows; and for "digits".
        FileNotFoundError: As `load`.
    """
    _check_sizes(image_size, resize_size)
    if name == "digits":
        raise ValueError("name='digits' must be read into memory: it is part of scikit-learn")
    sizes = {"image_size": image_size, "resize_size": resize_size}
    if name == image_folder.NAME:
        return image_folder.open_folder(split=split, data_dir=data_dir, **sizes)
    return tfds_source.open_tfds(name, split=split, data_dir=data_dir, **sizes)


def load_as(
    in_memory: str,
    name: str,
    *,
    split: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
) -> ImageData | EncodedData:
    """`load` or `load_encoded`.

    Args:
        in_memory: "always" and "never" say which; "auto" loads what takes at most 8 GiB.
        name: And the other arguments, as those of `load`.
        split: See `load`.
        data_dir: See `load`.
        image_size: See `load`.
        resize_size: See `load`.

    Raises:
        ValueError: As `load`, and on another `in_memory`.
        FileNotFoundError: As `load`.
    """
    if in_memory not in IN_MEMORY:
        raise ValueError(f"in_memory must be one of {IN_MEMORY}, got {in_memory!r}")
    where: dict[str, Any] = {"split": split, "data_dir": data_dir}
    sizes: dict[str, Any] = {"image_size": image_size, "resize_size": resize_size}
    if in_memory == "always" or (in_memory == "auto" and name == "digits"):
        return load(name, **where, **sizes)
    encoded = load_encoded(name, **where, **sizes)
    if in_memory == "auto" and encoded.decoded_bytes <= image_data.MEMORY_LIMIT_BYTES:
        return encoded.into_memory()
    return encoded


def _check_sizes(image_size: int | None, resize_size: int | None):
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 or None, got {image_size}")
    if resize_size is not None and (image_size is None or resize_size < image_size):
        raise ValueError(
            f"resize_size must be at least image_size={image_size} or None, got {resize_size}"
        )
