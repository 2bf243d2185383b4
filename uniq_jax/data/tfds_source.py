"""Prepared TFDS image-classification sets, read without TensorFlow."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from uniq_jax.data import splits, tfds_files
from uniq_jax.data.encoded_data import EncodedData, Record


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """The examples of a prepared set; opened when they are first read, in each process anew.

    Attributes:
        directory: Of one version of the set.
        spec: Which examples, in TFDS syntax.
        image_key: Feature that holds the image.
        label_key: Feature that holds the label.
        name_key: Feature that holds the name of the image, or None.
    """

    directory: str
    spec: str
    image_key: str
    label_key: str
    name_key: str | None

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(self.directory)
        # Any other image than the one that is asked for is left alone.
        skip = {
            key: tfds.decode.SkipDecoding()
            for key, feature in builder.info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        return builder.as_data_source(split=self.spec, decoders=skip)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay behind when this goes to a worker process.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The examples at these positions."""
        rows = self._source.__getitems__([int(index) for index in indices])
        return [
            Record(row[self.image_key], int(row[self.label_key]), self._name(row, index))
            for row, index in zip(rows, indices)
        ]

    def _name(self, row: Any, index: int) -> str:
        if self.name_key is None:
            return f"record {index} of {self.spec}"
        name = row[self.name_key]
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def open_tfds(
    name: str,
    *,
    split: str,
    data_dir: str | None,
    image_size: int | None,
    resize_size: int | None,
) -> EncodedData:
    """Find one split of a prepared TFDS set; see `uniq_jax.data.load` for arguments and errors."""
    directory = tfds_files.find_prepared(name, data_dir)
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(directory)
    features: Any = builder.info.features
    image_key = _feature_key(builder.info, tfds.features.Image, "image")
    label_key = _feature_key(builder.info, tfds.features.ClassLabel, "label")
    shape = _image_shape(name, features[image_key], image_size)
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    name_key = "file_name" if "file_name" in texts else None

    def records(spec: str) -> TfdsRecords:
        found = TfdsRecords(str(directory), spec, image_key, label_key, name_key)
        try:
            len(found)
        except NotImplementedError as error:
            raise ValueError(
                f"name={name!r} is prepared in {str(directory)!r} in a format without random "
                "access; allowed is array_record: prepare it again, elsewhere, with "
                "file_format='array_record'"
            ) from error
        return found

    sizes = {str(key): info.num_examples for key, info in builder.info.splits.items()}
    if (
        {"test", "validation"} <= sizes.keys()
        and sizes["test"]
        and "test" in split
        and records("test[:1]").read([0])[0].label < 0
    ):
        del sizes["test"]  # a contest's test split, whose labels are secret
    split, parts = splits.resolve_split(split, sizes)
    source = records("+".join(f"{key}[{start}:{stop}]" for key, start, stop in parts))
    class_names = tuple(features[label_key].names)
    return EncodedData(source, class_names, name, split, shape, image_size, resize_size)


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
