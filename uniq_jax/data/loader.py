"""Batches of a split in memory: endless, shuffled and resumable for training; in order for eval.

Every random choice is a function of (seed, epoch) or (seed, step) and of nothing else, and is made
for the global batch before a process takes its slice. So a run can resume at any step, and the
examples and their augmentation do not depend on the number of processes or threads.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from uniq_jax.data import augment as augmentation
from uniq_jax.data.image_data import ImageData

Batch = dict[str, np.ndarray]

# Distinct first words of the seed sequences, so that no order shares its stream with a crop.
_ORDER_STREAM, _AUGMENT_STREAM = 0, 1


class TrainIterator:
    """Endless training batches; made by `train_iterator`.

    Yields `{"image": uint8 (b, H, W, C), "label": int32 (b,)}`, fresh arrays with b the batch
    size divided by the number of processes. Use it as a context manager, or call `close`.

    Attributes:
        steps_per_epoch: Number of batches that make an epoch; what is left over is dropped, other
            examples in each epoch.
    """

    def __init__(self, batches: Any, steps_per_epoch: int, identity: dict[str, Any]):
        self._batches = batches
        self._identity = identity
        self.steps_per_epoch = steps_per_epoch

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch that `next` returned, as a dict that JSON can hold."""
        return {"step": self._batches.get_state()["next_index"], **self._identity}

    def set_state(self, state: dict[str, Any]):
        """Go to a state from `get_state`: the batches that follow are the same to the last bit.

        Args:
            state: From an iterator over the same data with the same batch size, seed and
                augmentation; the number of processes may differ.

        Raises:
            ValueError: If the state comes from an iterator with other settings.
        """
        identity = {key: value for key, value in state.items() if key != "step"}
        if identity != self._identity or "step" not in state:
            raise ValueError(
                f"state is of an iterator over {identity}, which must equal {self._identity}"
            )
        self._batches.set_state({"next_index": int(state["step"])})

    def close(self):
        """Stop the prefetching threads; no batch can be taken afterwards."""
        self._batches.close()

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *exception):
        self.close()


def train_iterator(
    data: ImageData,
    *,
    batch_size: int,
    seed: int,
    augment: str = "none",
    pad: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
) -> TrainIterator:
    """Shuffled and augmented batches without end, prefetched by threads.

    Each epoch is a new random order of all examples, cut into whole batches.

    Args:
        data: The split.
        batch_size: Examples in a global batch, all processes together.
        seed: Not negative; decides order and augmentation.
        augment: "none", "crop" (pad with black and crop at random), "flip" (horizontally with
            probability one half) or "crop_flip" (both).
        pad: Pixels of padding on each side for a crop.
        process_index: Which slice of each global batch to yield, 0 .. process_count - 1.
        process_count: Number of slices.
        prefetch: Number of batches made ahead; 0 makes each in the caller's thread.

    Returns:
        The iterator.

    Raises:
        ValueError: On an argument outside what is stated above, or a batch larger than the split.
    """
    _check_batch(batch_size, process_index, process_count)
    if augment not in augmentation.AUGMENTATIONS:
        raise ValueError(f"augment must be one of {augmentation.AUGMENTATIONS}, got {augment!r}")
    for name, value in (("seed", seed), ("pad", pad), ("prefetch", prefetch)):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    if batch_size > len(data):
        raise ValueError(
            f"batch_size must be at most the {len(data)} examples of {data.name!r}, split "
            f"{data.split!r}, got {batch_size}"
        )
    import grain

    steps_per_epoch = len(data) // batch_size
    mine = _process_slice(batch_size, process_index, process_count)

    # Two epochs, because prefetching crosses the border. Grain's own shuffle and batch would visit
    # the examples one by one in Python: a millisecond of each step, all of it under the lock.
    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        return np.random.default_rng((_ORDER_STREAM, seed, epoch)).permutation(len(data))

    def make_batch(step: int) -> Batch:
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        start = step_in_epoch * batch_size
        indices = epoch_order(epoch)[start : start + batch_size][mine]
        images, labels = data.images[indices], data.labels[indices]
        rng = np.random.default_rng((_AUGMENT_STREAM, seed, step))
        if augment in ("crop", "crop_flip"):
            corners = augmentation.draw_crops(rng, batch_size, pad)[mine]
            images = augmentation.crop(images, corners, pad)
        if augment in ("flip", "crop_flip"):
            images = augmentation.flip(images, augmentation.draw_flips(rng, batch_size)[mine])
        return {"image": images, "label": labels}

    options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
    steps = grain.MapDataset.range(sys.maxsize).map(make_batch).to_iter_dataset(options)
    identity = {
        "data": data.name,
        "split": data.split,
        "num_examples": len(data),
        "batch_size": batch_size,
        "seed": seed,
        "augment": augment,
        "pad": pad,
    }
    return TrainIterator(iter(steps), steps_per_epoch, identity)


def eval_batches(
    data: ImageData, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every example exactly once, in order, in batches of one shape.

    Args:
        data: The split; it may be smaller than one batch.
        batch_size: Examples in a global batch, all processes together.
        process_index: Which slice of each global batch to yield, 0 .. process_count - 1.
        process_count: Number of slices. Each process gets the same number of batches.

    Returns:
        An iterator of `{"image": uint8 (b, H, W, C), "label": int32 (b,), "mask": bool (b,)}`, b
        the batch size divided by the number of processes. Where the data end, images and labels
        are 0 and the mask is False. The arrays may be read-only views of the data.

    Raises:
        ValueError: If the batch size is less than 1 or not divisible by the number of processes.
    """
    _check_batch(batch_size, process_index, process_count)
    return _eval_batches(data, batch_size, _process_slice(batch_size, process_index, process_count))


def _eval_batches(data: ImageData, batch_size: int, mine: slice) -> Iterator[Batch]:
    size = mine.stop - mine.start
    for first in range(0, len(data), batch_size):
        rows = slice(first + mine.start, first + mine.stop)
        images, labels = data.images[rows], data.labels[rows]
        missing = size - len(labels)
        if missing:
            images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
            labels = np.pad(labels, (0, missing))
        yield {"image": images, "label": labels, "mask": np.arange(size) < size - missing}


def _process_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _check_batch(batch_size: int, process_index: int, process_count: int):
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            "process_index must be in 0 .. process_count - 1, "
            f"got process_index={process_index}, process_count={process_count}"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be at least 1 and divisible by process_count={process_count}, "
            f"got {batch_size}"
        )
