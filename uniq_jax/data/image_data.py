"""One split of an image-classification set, decoded and held in memory."""

import dataclasses

import numpy as np

MEMORY_LIMIT_BYTES = 8 * 2**30
"""The most decoded bytes that `load` puts in memory for one split (8 GiB)."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """One split in memory, decoded once.

    The arrays are read-only views: batches may be slices of them, so a write would change the data.

    Attributes:
        images: uint8 (N, H, W, C), C is 1 for grey, 3 for RGB.
        labels: int32 (N,), each in 0 .. num_classes - 1.
        class_names: One name for each label.
        name: The data set's name as given to `load`.
        split: The split that was read, which is "validation" where a set has no usable "test".

    Raises:
        ValueError: On a wrong dtype or shape, or on a label outside the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    split: str

    def __post_init__(self):
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 of shape (N, H, W, C), got {images.dtype} {images.shape}"
            )
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int32 of shape ({len(images)},), one for each image, "
                f"got {labels.dtype} {labels.shape}"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(
                f"labels of {self.name!r}, split {self.split!r}, must be in 0 .. "
                f"{len(self.class_names) - 1} (the classes), got {labels.min()} .. {labels.max()}"
            )
        for field in ("images", "labels"):
            view = getattr(self, field).view()
            view.flags.writeable = False
            object.__setattr__(self, field, view)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes of the set, whether or not this split shows each of them."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels
