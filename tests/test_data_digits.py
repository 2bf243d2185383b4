"""The embedded digits, split expressions, statistics, and what importing `data` costs."""

import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from uniq_jax import data
from uniq_jax.data import digits, splits


@pytest.mark.parametrize(
    ("split", "count", "checksum"),
    [
        ("train", 1437, "dbab15b4b58f1a0821065d34b5beb976b39f59a60d0ce99fae813581943d086f"),
        ("test", 360, "0eb5114df2741f591e95a410366473a7786c7c225cb624e84d2c1b7a3bac9511"),
    ],
)
def test_digits_split_is_pinned(split, count, checksum):
    loaded = data.load("digits", split=split)
    assert loaded.images.shape == (count, 8, 8, 1)
    assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int32)
    assert (len(loaded), loaded.num_classes, loaded.image_shape) == (count, 10, (8, 8, 1))
    assert (loaded.name, loaded.split) == ("digits", split)
    assert (loaded.images.min(), loaded.images.max()) == (0, 255)
    content = loaded.images.tobytes() + loaded.labels.astype("<i4").tobytes()
    assert hashlib.sha256(content).hexdigest() == checksum


def test_digits_splits_partition_the_set_and_test_is_balanced():
    labels = np.random.default_rng(0).integers(0, 10, 1797)
    parts = digits.split_indices(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1797))
    np.testing.assert_array_equal(np.bincount(labels[parts["test"]]), np.full(10, 36))


def test_digits_sub_splits_are_slices_of_the_whole():
    whole = data.load("digits", split="train")
    head = data.load("digits", split="train[:90%]")
    tail = data.load("digits", split="train[90%:]")
    assert (len(head), len(tail)) == (1293, 144)
    np.testing.assert_array_equal(np.concatenate([head.images, tail.images]), whole.images)
    np.testing.assert_array_equal(np.concatenate([head.labels, tail.labels]), whole.labels)
    mixed = data.load("digits", split="test[-3:] + train[1:3]")
    test = data.load("digits", split="test")
    expected = np.concatenate([test.images[-3:], whole.images[1:3]])
    np.testing.assert_array_equal(mixed.images, expected)


def test_digits_resized():
    assert data.load("digits", split="test[:5]", image_size=28).image_shape == (28, 28, 1)
    with pytest.raises(ValueError, match="image_size must be at least 1 or None, got 0"):
        data.load("digits", split="test", image_size=0)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tset", r"split='tset' is unknown: this set has \['test', 'train'\]"),
        ("validation", "split='validation' is unknown"),
        ("train+dev[:5]", r"split='dev\[:5\]' is unknown"),
        ("train[:5", r"split='train\[:5' is not a valid slice of 'train' with 1437 examples"),
        ("train[1:2:3]", "is not a valid slice"),
        ("train[:99999]", "is not a valid slice of 'train' with 1437 examples"),
        ("train[7:7]", r"selects no example: 'train' has 1437 examples, the slice is \[7:7\]"),
        ("train[9:7]", "selects no example"),
    ],
)
def test_wrong_splits(split, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", split=split)


def test_test_split_means_validation_only_where_there_is_no_test():
    sizes = {"train": 10, "validation": 4}
    assert splits.resolve_split("test", sizes) == ("validation", [("validation", 0, 4)])
    assert splits.resolve_split("train+test[:50%]", sizes) == (
        "train+validation[:50%]",
        [("train", 0, 10), ("validation", 0, 2)],
    )
    assert splits.resolve_split("test", {**sizes, "test": 3}) == ("test", [("test", 0, 3)])
    assert splits.resolve_split("test_a", {**sizes, "test_a": 3}) == ("test_a", [("test_a", 0, 3)])


def test_image_data_refuses_what_does_not_fit():
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 2], np.int32)
    names = ("a", "b")
    with pytest.raises(ValueError, match=r"labels of 'x', .* 0 \.\. 1 .*got 0 \.\. 2"):
        data.ImageData(images, labels, names, "x", "train")
    with pytest.raises(ValueError, match=r"images must be uint8 of shape .*, got float32"):
        data.ImageData(images.astype(np.float32), labels, names, "x", "train")
    with pytest.raises(ValueError, match=r"labels must be int32 of shape \(2,\)"):
        data.ImageData(images, labels[:1], names, "x", "train")
    kept = data.ImageData(images, np.array([0, 1], np.int32), names, "x", "train")
    with pytest.raises(ValueError, match="read-only"):
        kept.images[0] = 1
    images[0] = 1  # the caller's own array stays as it was


def test_statistics_of_digits_match_its_train_split():
    mean, std = data.statistics("digits")
    train = data.load("digits", split="train")
    computed_mean, computed_std = data.statistics("other", train.images)
    np.testing.assert_allclose(mean, computed_mean, atol=5e-5)
    np.testing.assert_allclose(std, computed_std, atol=5e-5)


def test_statistics_computed_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (1500, 3, 2, 3), np.uint8)
    images[..., 1] = 51
    mean, std = data.statistics("other", images)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std[[0, 2]], (images / 255).std((0, 1, 2))[[0, 2]], rtol=1e-6)
    assert std[1] == np.float32(1 / 255)


def test_statistics_of_known_sets_and_errors():
    mean, std = data.statistics("cifar10:3.0.2", np.zeros((1, 32, 32, 3), np.uint8))
    np.testing.assert_array_equal(mean, np.float32([0.4914, 0.4822, 0.4465]))
    np.testing.assert_array_equal(std, np.float32([0.2470, 0.2435, 0.2616]))
    with pytest.raises(ValueError, match=r"name='svhn' has no constants .*'cifar10'.*pass images="):
        data.statistics("svhn")
    with pytest.raises(ValueError, match="images must be uint8"):
        data.statistics("svhn", np.zeros((1, 2, 2, 3)))


# The parent package is replaced, so that this holds whatever else `import uniq_jax` imports.
_IMPORTS = """
import sys, types
parent = types.ModuleType("uniq_jax")
parent.__path__ = [sys.argv[1]]
sys.modules["uniq_jax"] = parent
import uniq_jax.data
{extra}
heavy = {{"grain", "tensorflow_datasets", "sklearn", "PIL", "jax", "rich", "etils"}}
ours = {{name for name in sys.modules if name.startswith("uniq_jax.")}}
outside = {{name for name in ours if not (name + ".").startswith("uniq_jax.data.")}}
print(sorted(heavy & sys.modules.keys()) + sorted(outside))
"""


@pytest.mark.parametrize(
    ("extra", "found"),
    [("", "[]"), ("import PIL; sys.modules['uniq_jax.nn'] = parent", "['PIL', 'uniq_jax.nn']")],
)
def test_import_is_light_and_stays_in_its_room(extra, found):
    package = pathlib.Path(data.__file__).parents[1]
    command = [sys.executable, "-c", _IMPORTS.format(extra=extra), str(package)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == found
