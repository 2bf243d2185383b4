"""How one batch is made, as objects that can go to a worker process."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uniq_jax.data import augment as augmentation
from uniq_jax.data import photos, random_crops
from uniq_jax.data.encoded_data import BROKEN, EncodedData, Record
from uniq_jax.data.image_data import ImageData

Batch = dict[str, np.ndarray]

# The draws of a resized crop, and whether it is mirrored.
_View = tuple[np.ndarray, np.bool_]

# Distinct first words of the seed sequences, so that no order shares its stream with a crop.
_ORDER_STREAM, _AUGMENT_STREAM = 0, 1

# A broken image here and there is no reason to stop; so many in a row are.
_MOST_BROKEN_IN_A_ROW = 100


class Made(NamedTuple):
    """A batch, and the name and error of each broken image that it does not show."""

    batch: Batch
    broken: list[tuple[str, str]]


# Two epochs, because prefetching crosses the border. Grain's own shuffle and batch would visit the
# examples one by one in Python: a millisecond of each step, all of it under the lock.
@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((_ORDER_STREAM, seed, epoch)).permutation(count)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches:
    """Makes the training batch of any step; see `loader.train_iterator`.

    Attributes:
        data: The split.
        batch_size: Examples in a global batch.
        seed: Decides order and augmentation.
        augment: What is done to images.
        pad: Pixels of padding for a crop.
        mine: Which rows of the global batch are made.
        skips_broken: Whether the next good image takes a broken one's place; else it is an error.
    """

    data: ImageData | EncodedData
    batch_size: int
    seed: int
    augment: str
    pad: int
    mine: slice
    skips_broken: bool

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches."""
        return len(self.data) // self.batch_size

    def __call__(self, step: int) -> Made:
        """The batch of a step, which counts on over the epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.batch_size
        order = _epoch_order(self.seed, epoch, len(self.data))
        indices = order[start : start + self.batch_size][self.mine]
        rng = np.random.default_rng((_AUGMENT_STREAM, self.seed, step))
        # What is drawn is drawn for all processes, before the slice.
        views = None
        if self.augment == augmentation.RESIZED_CROP:
            draws = random_crops.draw_resized_crops(rng, self.batch_size)[self.mine]
            views = list(zip(draws, augmentation.draw_flips(rng, self.batch_size)[self.mine]))
        broken: list[tuple[str, str]] = []
        if isinstance(self.data, ImageData):
            images, labels = self.data.images[indices], self.data.labels[indices]
        else:
            images, labels = self._decode(self.data, indices, views, broken)
        if self.augment in ("crop", "crop_flip"):
            corners = augmentation.draw_crops(rng, self.batch_size, self.pad)[self.mine]
            images = augmentation.crop(images, corners, self.pad)
        if self.augment in ("flip", "crop_flip"):
            flips = augmentation.draw_flips(rng, self.batch_size)[self.mine]
            images = augmentation.flip(images, flips)
        return Made({"image": images, "label": labels}, broken)

    def _decode(
        self,
        data: EncodedData,
        indices: np.ndarray,
        views: Sequence[_View] | None,
        broken: list[tuple[str, str]],
    ) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(indices), *data.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for row, record in enumerate(data.records.read(indices.tolist())):
            failures = 0
            while True:
                labels[row] = data.checked_label(record)
                try:
                    images[row] = _image(data, record, None if views is None else views[row])
                    break
                except BROKEN as error:
                    _note_broken(data, record, error, broken, skips=self.skips_broken)
                    failures += 1
                    if failures == _MOST_BROKEN_IN_A_ROW:
                        raise ValueError(
                            f"{data.where}: {failures} images in a row are broken, the last one is "
                            f"{record.name}: {error}"
                        ) from error
                (record,) = data.records.read([int(indices[row] + failures) % len(data)])
        return images, labels


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches:
    """Makes the evaluation batch of any step; see `loader.eval_batches`.

    Attributes:
        data: The split.
        batch_size: Examples in a global batch.
        mine: Which rows of the global batch are made.
        skips_broken: Whether a broken image is masked; else it is an error.
    """

    data: ImageData | EncodedData
    batch_size: int
    mine: slice
    skips_broken: bool

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __call__(self, step: int) -> Made:
        """The batch of a step."""
        first, size = step * self.batch_size, self.mine.stop - self.mine.start
        rows = range(len(self.data))[first + self.mine.start : first + self.mine.stop]
        broken: list[tuple[str, str]] = []
        mask = np.arange(size) < len(rows)
        if isinstance(self.data, ImageData):
            chosen = slice(rows.start, rows.stop)
            images, labels = self.data.images[chosen], self.data.labels[chosen]
            missing = size - len(rows)
            if missing:
                images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
                labels = np.pad(labels, (0, missing))
        else:
            images = np.zeros((size, *self.data.image_shape), np.uint8)
            labels = np.zeros(size, np.int32)
            for row, record in enumerate(self.data.records.read(rows)):
                label = self.data.checked_label(record)
                try:
                    images[row], labels[row] = self.data.decode(record), label
                except BROKEN as error:
                    _note_broken(self.data, record, error, broken, skips=self.skips_broken)
                    mask[row] = False
        return Made({"image": images, "label": labels, "mask": mask}, broken)


def _image(data: EncodedData, record: Record, view: _View | None) -> np.ndarray:
    if view is None:
        return data.decode(record)
    size, _, channels = data.image_shape
    draws, is_mirrored = view
    return photos.decode_random_crop(
        record.encoded, draws, image_size=size, channels=channels, is_mirrored=bool(is_mirrored)
    )


def _note_broken(
    data: EncodedData,
    record: Record,
    error: Exception,
    broken: list[tuple[str, str]],
    *,
    skips: bool,
):
    if not skips:
        raise ValueError(
            f"{data.where}: the image {record.name} is broken: {error}; on_broken_image='skip' "
            "goes on without it"
        ) from error
    broken.append((record.name, str(error)))
