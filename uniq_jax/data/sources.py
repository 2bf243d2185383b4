"""`load`: any supported data set by name, into memory."""

import numpy as np

from uniq_jax.data import decoding, digits, splits, tfds_source
from uniq_jax.data.image_data import ImageData


def load(
    name: str, *, split: str, data_dir: str | None = None, image_size: int | None = None
) -> ImageData:
    """Read one split of an image-classification set into memory.

    Args:
        name: "digits", which scikit-learn carries (1437 train and 360 test images of 8x8), or any
            image-classification set of TFDS that is prepared in `data_dir` in the array_record
            format, such as "cifar10", "cifar10:3.0.2" or "emnist/letters".
        split: "train" or "test", any other split of the set, or a sub-split in TFDS syntax
            ("train[:90%]", "train[45000:]"). "test" is "validation" for a set with no "test",
            or whose "test" has no labels (ImageNet).
        data_dir: Directory of the prepared sets; by default the environment variable
            TFDS_DATA_DIR, or ~/tensorflow_datasets. Not used for "digits".
        image_size: Scale each image's shorter side to this and crop the centre square. Needed for
            sets whose images differ in size.

    Returns:
        The split, decoded.

    Raises:
        ValueError: On an unknown set or split, on images of varying size without `image_size`, a
            set without an image or label, or more than 8 GiB of decoded images.
        FileNotFoundError: If `data_dir` is missing or the set is not prepared in it.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 or None, got {image_size}")
    if name != "digits":
        return tfds_source.read_tfds(name, split=split, data_dir=data_dir, image_size=image_size)
    arrays = digits.read_digits()
    sizes = {key: len(labels) for key, (_, labels) in arrays.items()}
    split, parts = splits.resolve_split(split, sizes)
    images = np.concatenate([arrays[key][0][start:stop] for key, start, stop in parts])
    labels = np.concatenate([arrays[key][1][start:stop] for key, start, stop in parts])
    if image_size is not None:
        images = np.stack([decoding.resize_and_crop(image, image_size) for image in images])
    return ImageData(images, labels, tuple("0123456789"), name, split)
