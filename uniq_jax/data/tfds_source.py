"""Prepared TFDS image-classification sets, read without TensorFlow."""

import concurrent.futures
import contextlib
import os
import sys
from typing import Any

import numpy as np

from uniq_jax.data import decoding, image_data, splits, tfds_files
from uniq_jax.data.image_data import ImageData

_CHUNK = 256
# Decoding a small image is mostly Python, which threads only slow down (CIFAR-10: 5 s with one,
# 7 s with eight); a photo is mostly libjpeg, which releases the lock.
_PIXELS_WORTH_THREADS = 96 * 96


def read_tfds(name: str, *, split: str, data_dir: str | None, image_size: int | None) -> ImageData:
    """Read one split of a prepared TFDS set; see `uniq_jax.data.load` for arguments and errors."""
    directory = tfds_files.find_prepared(name, data_dir)
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(directory)
    features: Any = builder.info.features
    image_key = _feature_key(builder.info, tfds.features.Image, "image")
    label_key = _feature_key(builder.info, tfds.features.ClassLabel, "label")
    shape = _image_shape(name, features[image_key], image_size)
    # Each image is decoded here, once and straight to its size; any other image is left alone.
    skip = {
        key: tfds.decode.SkipDecoding()
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }

    def records(spec: str) -> Any:
        try:
            return builder.as_data_source(split=spec, decoders=skip)
        except NotImplementedError as error:
            raise ValueError(
                f"name={name!r} is prepared in {str(directory)!r} in a format without random "
                "access; allowed is array_record: prepare it again, elsewhere, with "
                "file_format='array_record'"
            ) from error

    sizes = {str(key): info.num_examples for key, info in builder.info.splits.items()}
    if (
        {"test", "validation"} <= sizes.keys()
        and sizes["test"]
        and "test" in split
        and records("test[:1]")[0][label_key] < 0
    ):
        del sizes["test"]  # a contest's test split, whose labels are secret
    split, parts = splits.resolve_split(split, sizes)
    count = sum(stop - start for _, start, stop in parts)
    _check_size(name, split, (count, *shape))
    source = records("+".join(f"{key}[{start}:{stop}]" for key, start, stop in parts))

    keys = image_key, label_key
    images, labels = _decode(source, *keys, f"name={name!r}, split={split!r}", shape, image_size)
    return ImageData(images, labels, tuple(features[label_key].names), name, split)


def _decode(
    source: Any,
    image_key: str,
    label_key: str,
    where: str,
    shape: tuple[int, int, int],
    image_size: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a data source; `where` names it in errors and in the progress."""
    count = len(source)
    images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)

    def decode_chunk(start: int) -> int:
        chunk = list(range(start, min(start + _CHUNK, count)))
        for index, record in zip(chunk, source.__getitems__(chunk)):
            try:
                image = decoding.decode_image(
                    record[image_key], channels=shape[-1], image_size=image_size
                )
            except (OSError, SyntaxError) as error:  # Pillow's two ways to say "broken"
                raise ValueError(f"{where}: image {index} cannot be decoded: {error}") from error
            if image.shape != shape:
                raise ValueError(
                    f"{where}: image {index} has shape {image.shape}, but the set's features say "
                    f"{shape}; image_size= makes all images equal"
                )
            images[index], labels[index] = image, record[label_key]
        return len(chunk)

    small = image_size is None and shape[0] * shape[1] <= _PIXELS_WORTH_THREADS
    threads = 1 if small else min(16, os.cpu_count() or 1)
    with (
        _progress(where, count) as advance,
        concurrent.futures.ThreadPoolExecutor(threads) as executor,
    ):
        for done in executor.map(decode_chunk, range(0, count, _CHUNK)):
            advance(done)
    return images, labels


def _feature_key(info: Any, kind: type, usual: str) -> str:
    """The key of the one feature of type `kind`; of several, the supervised or the usual one."""
    keys = [key for key, feature in info.features.items() if isinstance(feature, kind)]
    supervised = [key for key in info.supervised_keys or () if isinstance(key, str)]
    preferred = [key for key in (*supervised, usual) if key in keys]
    if preferred or len(keys) == 1:
        return (preferred or keys)[0]
    raise ValueError(
        f"name={info.name!r} is no image-classification set: it must have one feature of type "
        f"{kind.__name__}, or one called {usual!r} among several, got {keys} of {info.features}"
    )


def _image_shape(name: str, feature: Any, image_size: int | None) -> tuple[int, int, int]:
    height, width, channels = feature.shape if len(feature.shape) == 3 else (None, None, None)
    if channels not in (1, 3) or feature.np_dtype != np.uint8:
        raise ValueError(
            f"name={name!r} must have uint8 images with 1 or 3 channels, "
            f"got shape {feature.shape}, dtype {feature.np_dtype}"
        )
    if image_size is not None:
        return image_size, image_size, channels
    if height is None or width is None:
        raise ValueError(
            f"image_size must be given for name={name!r}, whose images differ in size (its "
            f"features say {feature.shape}): each is then scaled and cropped to that square"
        )
    return height, width, channels


def _check_size(name: str, split: str, shape: tuple[int, ...]):
    size = int(np.prod(shape, dtype=np.int64))
    if size > image_data.MEMORY_LIMIT_BYTES:
        raise ValueError(
            f"name={name!r}, split={split!r} would take {size / 2**30:.1f} GiB in memory as "
            f"uint8 {shape}; allowed are {image_data.MEMORY_LIMIT_BYTES / 2**30:.1f} GiB: take a "
            "sub-split such as 'train[:10%]' or a smaller image_size"
        )


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
