"""Batches of a split: endless, shuffled and resumable for training; in order for evaluation.

Every random choice is a function of (seed, epoch) or (seed, step) and of nothing else, and is made
for the global batch before a process takes its slice. So a run can resume at any step, and the
examples and their augmentation do not depend on the number of processes, workers or threads.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

from uniq_jax.data import augment as augmentation
from uniq_jax.data import workers as worker_processes
from uniq_jax.data.batches import Batch, EvalBatches, Made, TrainBatches
from uniq_jax.data.encoded_data import EncodedData
from uniq_jax.data.image_data import ImageData

Note = Callable[[str], None]

_note: Note = logging.getLogger(__name__).warning


class TrainIterator:
    """Endless training batches; made by `train_iterator`.

    Yields `{"image": uint8 (b, H, W, C), "label": int32 (b,)}`, fresh arrays with b the batch
    size divided by the number of processes. Use it as a context manager, or call `close`.

    Attributes:
        steps_per_epoch: Number of batches that make an epoch; what is left over is dropped, other
            examples in each epoch.
        broken_images: Name and error of each broken image that was met and replaced.
    """

    def __init__(
        self,
        start: Callable[[int], Any],
        steps_per_epoch: int,
        identity: dict[str, Any],
        note: Note,
    ):
        self._start = start
        self._step = 0
        self._made = start(0)
        self._identity = identity
        self._note = note
        self.steps_per_epoch = steps_per_epoch
        self.broken_images: dict[str, str] = {}

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        made: Made = next(self._made)
        self._step += 1
        _report(made, self.broken_images, self._note)
        return made.batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch that `next` returned, as a dict that JSON can hold."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, Any]):
        """Go to a state from `get_state`: the batches that follow are the same to the last bit.

        Args:
            state: From an iterator over the same data with the same batch size, seed and
                augmentation; the number of processes, and of workers, may differ.

        Raises:
            ValueError: If the state comes from an iterator with other settings.
        """
        identity = {key: value for key, value in state.items() if key != "step"}
        if identity != self._identity or "step" not in state:
            raise ValueError(
                f"state is of an iterator over {identity}, which must equal {self._identity}"
            )
        self._made.close()
        self._step = int(state["step"])
        self._made = self._start(self._step)

    def close(self):
        """Stop the prefetching threads and workers; no batch can be taken afterwards."""
        self._made.close()

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *exception):
        self.close()


def train_iterator(
    data: ImageData | EncodedData,
    *,
    batch_size: int,
    seed: int,
    augment: str = "none",
    pad: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
    workers: int = 0,
    on_broken_image: Literal["error", "skip"] = "error",
    note: Note = _note,
) -> TrainIterator:
    """Shuffled and augmented batches without end, prefetched by threads or processes.

    Each epoch is a new random order of all examples, cut into whole batches.

    Args:
        data: The split.
        batch_size: Examples in a global batch, all processes together.
        seed: Not negative; decides order and augmentation.
        augment: "none", "crop" (pad with black and crop at random), "flip" (horizontally with
            probability one half) or "crop_flip" (both). For data on disk, with `image_size`, also
            "random_resized_crop_flip": see `random_crops.resized_crop`.
        pad: Pixels of padding on each side for a crop.
        process_index: Which slice of each global batch to yield, 0 .. process_count - 1.
        process_count: Number of slices.
        prefetch: Number of batches made ahead; 0 makes each in the caller's thread.
        workers: Processes that make the batches of data on disk, two ahead each, and hand them over
            in shared memory; 0 for threads of this process, which decode in parallel too. Each
            imports the main module anew: a script needs its `if __name__ == "__main__"`. Not used
            for data in memory.
        on_broken_image: "error", or "skip": the next image of the data set takes its place.
        note: Called once for each broken image that is skipped.

    Returns:
        The iterator. Where an image is broken and "error" is set, `next` raises a ValueError.

    Raises:
        ValueError: On an argument outside what is stated above, or a batch larger than the split.
    """
    _check_batch(batch_size, process_index, process_count)
    _check_workers(workers, on_broken_image)
    _check_augment(data, augment)
    for name, value in (("seed", seed), ("pad", pad), ("prefetch", prefetch)):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    if batch_size > len(data):
        raise ValueError(
            f"batch_size must be at most the {len(data)} examples of {data.name!r}, split "
            f"{data.split!r}, got {batch_size}"
        )
    make = TrainBatches(
        data=data,
        batch_size=batch_size,
        seed=seed,
        augment=augment,
        pad=pad,
        mine=_process_slice(batch_size, process_index, process_count),
        skips_broken=on_broken_image == "skip",
    )
    identity = {
        "data": data.name,
        "split": data.split,
        "num_examples": len(data),
        "batch_size": batch_size,
        "seed": seed,
        "augment": augment,
        "pad": pad,
    }

    def start(step: int) -> Any:
        return _made_ahead(make, range(step, sys.maxsize), prefetch, workers)

    return TrainIterator(start, make.steps_per_epoch, identity, note)


def eval_batches(
    data: ImageData | EncodedData,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
    workers: int = 0,
    on_broken_image: Literal["error", "skip"] = "error",
    note: Note = _note,
) -> Iterator[Batch]:
    """Every example exactly once, in order, in batches of one shape.

    Args:
        data: The split; it may be smaller than one batch.
        batch_size: Examples in a global batch, all processes together.
        process_index: Which slice of each global batch to yield, 0 .. process_count - 1.
        process_count: Number of slices. Each process gets the same number of batches.
        prefetch: Number of batches of data on disk made ahead.
        workers: Processes that make the batches of data on disk; 0 for threads of this process.
        on_broken_image: "error", or "skip": it is left out by a mask of False.
        note: Called once for each broken image that is left out.

    Returns:
        An iterator of `{"image": uint8 (b, H, W, C), "label": int32 (b,), "mask": bool (b,)}`, b
        the batch size divided by the number of processes. Where the data end, images and labels
        are 0 and the mask is False. The arrays may be read-only views of the data.

    Raises:
        ValueError: If the batch size is less than 1 or not divisible by the number of processes.
    """
    _check_batch(batch_size, process_index, process_count)
    _check_workers(workers, on_broken_image)
    mine = _process_slice(batch_size, process_index, process_count)
    make = EvalBatches(data, batch_size, mine, skips_broken=on_broken_image == "skip")
    return _eval_batches(make, prefetch, workers, note)


def _eval_batches(make: EvalBatches, prefetch: int, workers: int, note: Note) -> Iterator[Batch]:
    if isinstance(make.data, ImageData):
        for step in range(len(make)):
            yield make(step).batch
        return
    broken: dict[str, str] = {}
    with contextlib.closing(_made_ahead(make, range(len(make)), prefetch, workers)) as batches:
        for made in batches:
            _report(made, broken, note)
            yield made.batch


def _made_ahead(make: TrainBatches | EvalBatches, steps: range, prefetch: int, workers: int) -> Any:
    """Grain's iterator over what `make` makes of each step, in order."""
    import grain

    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make)
    if isinstance(make.data, ImageData):
        # One batch is quickly made, most of it under the lock.
        return iter(dataset.to_iter_dataset(_threads(min(prefetch, 4), prefetch)))
    if not workers:
        threads = min(prefetch, os.cpu_count() or 1)
        return iter(dataset.to_iter_dataset(_threads(threads, prefetch)))
    from absl import flags

    # Grain reads a flag of its own here, which is an error in programs without flags.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iter(
        dataset.to_iter_dataset(_threads(0, 0)).mp_prefetch(options, worker_processes.start)
    )


def _threads(count: int, prefetch: int) -> Any:
    import grain

    return grain.ReadOptions(num_threads=count, prefetch_buffer_size=prefetch)


def _report(made: Made, broken: dict[str, str], note: Note):
    for name, error in made.broken:
        if name not in broken:
            broken[name] = error
            note(f"broken image {name} is skipped, {len(broken)} so far: {error}")


def _check_workers(workers: int, on_broken_image: str):
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if on_broken_image not in ("error", "skip"):
        raise ValueError(f"on_broken_image must be 'error' or 'skip', got {on_broken_image!r}")


def _check_augment(data: ImageData | EncodedData, augment: str):
    allowed = augmentation.AUGMENTATIONS
    if isinstance(data, EncodedData) and data.image_size is not None:
        allowed = (*allowed, augmentation.RESIZED_CROP)
    elif augment == augmentation.RESIZED_CROP:
        raise ValueError(
            f"augment={augment!r} needs images on disk (in_memory='never') and an image_size; "
            f"otherwise it must be one of {allowed}"
        )
    if augment not in allowed:
        raise ValueError(f"augment must be one of {allowed}, got {augment!r}")


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
