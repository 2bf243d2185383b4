"""One split of an image-classification set whose images stay encoded until a batch needs them."""

import concurrent.futures
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from uniq_jax.data import decoding, image_data
from uniq_jax.data.image_data import ImageData

_CHUNK = 256
# Decoding a small image is mostly Python, which threads only slow down (CIFAR-10: 5 s with one,
# 7 s with eight); a photo is mostly libjpeg, which releases the lock.
_PIXELS_WORTH_THREADS = 96 * 96

BROKEN = (OSError, SyntaxError, ValueError)
"""What the decoders raise on a broken image."""


class Record(NamedTuple):
    """One example as it is stored.

    Attributes:
        encoded: The bytes of an image file.
        label: Its class.
        name: What the image is called, for messages.
    """

    encoded: bytes
    label: int
    name: str


class Records(Protocol):
    """Random access to stored examples. It can be pickled, for worker processes."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The examples at these positions."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedData:
    """One split, of which only the place on disk is held.

    Attributes:
        records: The examples.
        class_names: One name for each label.
        name: The data set's name as given to `load`.
        split: The split that is read, which is "validation" where a set has no usable "test".
        image_shape: Height, width and channels of every decoded image.
        image_size: What images are cropped to, None where they are taken as they are.
        resize_size: What the shorter side is scaled to before the centre crop.
    """

    records: Records
    class_names: tuple[str, ...]
    name: str
    split: str
    image_shape: tuple[int, int, int]
    image_size: int | None
    resize_size: int | None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_classes(self) -> int:
        """Number of classes of the set, whether or not this split shows each of them."""
        return len(self.class_names)

    @property
    def decoded_bytes(self) -> int:
        """What the decoded split takes in memory."""
        return len(self) * int(np.prod(self.image_shape, dtype=np.int64))

    @property
    def where(self) -> str:
        """Set and split, for messages."""
        return f"name={self.name!r}, split={self.split!r}"

    def checked_label(self, record: Record) -> int:
        """The label of a record.

        Raises:
            ValueError: If it is outside the classes.
        """
        if not 0 <= record.label < self.num_classes:
            raise ValueError(
                f"{self.where}: the label of {record.name} must be in 0 .. {self.num_classes - 1}, "
                f"got {record.label}"
            )
        return record.label

    def decode(self, record: Record) -> np.ndarray:
        """The image of a record, scaled and cropped at the centre where there is an image_size.

        Returns:
            uint8 of shape `image_shape`.

        Raises:
            OSError, SyntaxError, ValueError: If the image is broken, or of another shape.
        """
        image = decoding.decode_image(
            record.encoded,
            channels=self.image_shape[-1],
            image_size=self.image_size,
            resize_size=self.resize_size,
        )
        if image.shape != self.image_shape:
            raise ValueError(
                f"has shape {image.shape}, but the set's features say {self.image_shape}; "
                "image_size= makes all images equal"
            )
        return image

    def into_memory(self) -> ImageData:
        """Decode all examples.

        Raises:
            ValueError: If they take more than 8 GiB, or an image is broken.
        """
        if self.decoded_bytes > image_data.MEMORY_LIMIT_BYTES:
            raise ValueError(
                f"{self.where} would take {self.decoded_bytes / 2**30:.1f} GiB in memory as uint8 "
                f"{(len(self), *self.image_shape)}; allowed are "
                f"{image_data.MEMORY_LIMIT_BYTES / 2**30:.1f} GiB: read it from disk instead "
                "(in_memory='never'), or take a sub-split such as 'train[:10%]'"
            )
        count = len(self)
        images = np.empty((count, *self.image_shape), np.uint8)
        labels = np.empty(count, np.int32)

        def decode_chunk(start: int) -> int:
            chunk = range(start, min(start + _CHUNK, count))
            for index, record in zip(chunk, self.records.read(chunk)):
                try:
                    images[index] = self.decode(record)
                except BROKEN as error:
                    raise ValueError(
                        f"{self.where}: image {index} ({record.name}) cannot be decoded: {error}; "
                        "what stays on disk (in_memory='never') can go on without it"
                    ) from error
                labels[index] = record.label
            return len(chunk)

        height, width, _ = self.image_shape
        small = self.image_size is None and height * width <= _PIXELS_WORTH_THREADS
        threads = 1 if small else min(16, os.cpu_count() or 1)
        with (
            _progress(self.where, count) as advance,
            concurrent.futures.ThreadPoolExecutor(threads) as executor,
        ):
            for done in executor.map(decode_chunk, range(0, count, _CHUNK)):
                advance(done)
        return ImageData(images, labels, self.class_names, self.name, self.split)


@contextlib.contextmanager
def _progress(description: str, total: int):
    """A function to call with each number of images done; shows a bar on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    import rich.console
    import rich.progress

    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)
