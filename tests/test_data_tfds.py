"""Prepared TFDS sets, read without TensorFlow or a network: tiny ones made here, and real ones."""

import hashlib
import io
import itertools
import json
import shutil
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from uniq_jax import data
from uniq_jax.data import decoding, encoded_data, image_data, tfds_files


class _NoTensorflow:
    """An import finder that makes `import tensorflow` an error where it is installed too."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError("reached for TensorFlow")


@pytest.fixture(autouse=True)
def no_network_and_no_tensorflow(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError(f"reached for the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(sys, "meta_path", [_NoTensorflow, *sys.meta_path])
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def test_the_guards_can_fail():
    with pytest.raises(AssertionError, match="reached for the network"):
        socket.create_connection(("localhost", 9))
    with pytest.raises(ImportError, match="reached for TensorFlow"):
        import tensorflow  # noqa: F401


def encode(array, kind="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def image(index, height, width, channels=3):
    """A random image that its index decides, the grey ones 2-d as Pillow wants them."""
    shape = (height, width, channels) if channels == 3 else (height, width)
    return np.random.default_rng(index).integers(0, 256, shape, np.uint8)


def split_rows(prefix, count, make):
    return {f"{prefix}{index:03d}": make(index) for index in range(count)}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    """Prepared sets: tiny_png (fixed shape), tiny_grey, tiny_jpeg (varying shapes), tiny_bare."""
    import tensorflow_datasets as tfds

    features = tfds.features
    label = features.ClassLabel(names=["cat", "dog", "eel"])

    def png_row(index):
        # Every fourth image is stored in grey, though the features say RGB.
        return {
            "coarse": index % 2,
            "kind": index % 3,
            "picture": io.BytesIO(encode(image(index, 6, 5, 1 if index % 4 == 0 else 3))),
            "mask": io.BytesIO(b"not an image: only the picture may be decoded"),
        }

    def grey_row(index):
        return {"image": io.BytesIO(encode(image(index, 4, 4))), "label": index % 3}

    def jpeg_row(index):
        pixels = image(index, 20 + 3 * index, 40 - 2 * index)
        return {"image": io.BytesIO(encode(pixels, "jpeg")), "label": index % 3}

    sets = {
        "TinyPng": (
            {
                "coarse": features.ClassLabel(num_classes=2),
                "kind": label,
                "picture": features.Image(shape=(6, 5, 3)),
                "mask": features.Image(shape=(6, 5, 1)),
            },
            ("picture", "kind"),
            {"train": split_rows("train", 20, png_row), "test": split_rows("test", 7, png_row)},
        ),
        "TinyGrey": (
            {"image": features.Image(shape=(4, 4, 1)), "label": label},
            None,
            {"train": split_rows("train", 5, grey_row)},
        ),
        "TinyJpeg": (
            {"image": features.Image(encoding_format="jpeg"), "label": label},
            ("image", "label"),
            {
                "train": split_rows("train", 8, jpeg_row),
                "validation": split_rows("validation", 4, jpeg_row),
                "test": split_rows("test", 3, lambda index: {**jpeg_row(index), "label": -1}),
            },
        ),
        "TinyBare": (
            {"image": features.Image(shape=(4, 4, 1))},
            None,
            {"train": split_rows("train", 2, lambda i: {"image": grey_row(i)["image"]})},
        ),
    }

    root = tmp_path_factory.mktemp("tiny")
    tfds.disable_progress_bar()
    for class_name, (spec, supervised, parts) in sets.items():

        def info(self, spec=spec, supervised=supervised):
            return tfds.core.DatasetInfo(
                builder=self, features=features.FeaturesDict(spec), supervised_keys=supervised
            )

        def split_generators(self, dl_manager, parts=parts):
            return {name: iter(rows.items()) for name, rows in parts.items()}

        members = {
            "VERSION": tfds.core.Version("1.0.0"),
            "_info": info,
            "_split_generators": split_generators,
            "_generate_examples": lambda self: None,
            "__module__": __name__,
        }
        builder = type(class_name, (tfds.core.GeneratorBasedBuilder,), members)
        builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def contents(images, labels):
    """Multiset of (image, label), because TFDS writes examples in an order of its own."""
    return sorted((array.tobytes(), int(label)) for array, label in zip(images, labels))


def test_fixed_shape_png(tiny_dir):
    train = data.load("tiny_png", split="train", data_dir=str(tiny_dir))
    assert train.class_names == ("cat", "dog", "eel")
    assert (len(train), train.image_shape, train.split) == (20, (6, 5, 3), "train")
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
    expected = [
        np.stack([image(i, 6, 5, 1)] * 3, -1) if i % 4 == 0 else image(i, 6, 5) for i in range(20)
    ]
    assert contents(train.images, train.labels) == contents(expected, [i % 3 for i in range(20)])


def test_sub_splits_are_slices_of_the_whole(tiny_dir):
    def read(split):
        return data.load("tiny_png:1.0.0", split=split, data_dir=str(tiny_dir))

    train, test = read("train"), read("test")
    assert (len(train), len(test)) == (20, 7)
    np.testing.assert_array_equal(read("train[:90%]").images, train.images[:18])
    np.testing.assert_array_equal(read("train[18:]").labels, train.labels[18:])
    both = read("test[2:4]+train[:3]")
    np.testing.assert_array_equal(both.images, np.concatenate([test.images[2:4], train.images[:3]]))
    with pytest.raises(ValueError, match=r"'dev' is unknown: this set has \['test', 'train'\]"):
        read("dev")


def test_rgb_files_in_a_grey_set(tiny_dir):
    train = data.load("tiny_grey", split="train", data_dir=str(tiny_dir))
    assert train.image_shape == (4, 4, 1)
    expected = [np.asarray(Image.fromarray(image(i, 4, 4)).convert("L")) for i in range(5)]
    assert contents(train.images, train.labels) == contents(expected, [i % 3 for i in range(5)])


def test_varying_shapes_need_an_image_size(tiny_dir):
    with pytest.raises(ValueError, match=r"image_size must be given for .*'tiny_jpeg'.*differ"):
        data.load("tiny_jpeg", split="train", data_dir=str(tiny_dir))
    train = data.load("tiny_jpeg", split="train", data_dir=str(tiny_dir), image_size=16)
    expected = []
    for index in range(8):
        height, width = 20 + 3 * index, 40 - 2 * index
        scale = 16 / min(height, width)
        size = (max(16, round(width * scale)), max(16, round(height * scale)))
        stored = Image.open(io.BytesIO(encode(image(index, height, width), "jpeg")))
        scaled = np.asarray(stored.resize(size, Image.Resampling.BILINEAR))
        top, left = (size[1] - 16) // 2, (size[0] - 16) // 2
        expected.append(scaled[top : top + 16, left : left + 16])
    assert contents(train.images, train.labels) == contents(expected, [i % 3 for i in range(8)])


def test_test_without_labels_is_validation(tiny_dir):
    def read(split):
        return data.load("tiny_jpeg", split=split, data_dir=str(tiny_dir), image_size=8)

    assert (read("test").split, len(read("test"))) == ("validation", 4)
    assert (read("test[:50%]").split, len(read("test[:50%]"))) == ("validation[:50%]", 2)


def test_no_label_feature(tiny_dir):
    with pytest.raises(ValueError, match=r"'tiny_bare' is no .*of type ClassLabel.*\[\]"):
        data.load("tiny_bare", split="train", data_dir=str(tiny_dir))


def test_too_large_for_memory(tiny_dir, monkeypatch):
    monkeypatch.setattr(image_data, "MEMORY_LIMIT_BYTES", 10 * 6 * 5 * 3)
    assert len(data.load("tiny_png", split="train[:10]", data_dir=str(tiny_dir))) == 10
    message = r"'tiny_png', split='train' would take .* GiB .*\(20, 6, 5, 3\); allowed are .* GiB"
    with pytest.raises(ValueError, match=message):
        data.load("tiny_png", split="train", data_dir=str(tiny_dir))


def test_images_against_their_features(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir / "tiny_png", tmp_path / "tiny_png")
    path = tmp_path / "tiny_png" / "1.0.0" / "features.json"
    text = path.read_text()
    assert text.count('"5"') == 2
    path.write_text(text.replace('"5"', '"7"'))
    with pytest.raises(ValueError, match=r"has shape \(6, 5, 3\), but the set's features say"):
        data.load("tiny_png", split="train", data_dir=str(tmp_path))
    # The mask of tiny_png, which is no image, stands for a broken file.
    path.write_text(text.replace('"picture"', '"other"').replace('"mask"', '"image"'))
    info = path.with_name("dataset_info.json")
    info.write_text(info.read_text().replace('"picture"', '"image"'))
    with pytest.raises(ValueError, match=r"tiny_png', split='train': image 0 .*cannot be decoded"):
        data.load("tiny_png", split="train", data_dir=str(tmp_path))


def test_format_without_random_access(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir / "tiny_png", tmp_path / "tiny_png")
    path = tmp_path / "tiny_png" / "1.0.0" / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="allowed is array_record"):
        data.load("tiny_png", split="train", data_dir=str(tmp_path))


def test_versions_and_configs(tmp_path):
    def prepare(path):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "features.json").touch()

    def find(name):
        return str(tfds_files.find_prepared(name, str(tmp_path)).relative_to(tmp_path))

    for path in ("one/1.9.0", "one/1.10.0", "two/a/1.0.0", "two/b/2.0.0", "three/only/1.0.0"):
        prepare(path)
    (tmp_path / "one" / "1.11.0").mkdir()  # not prepared: without features.json
    assert find("one") == "one/1.10.0"
    assert find("one:1.9.0") == "one/1.9.0"
    assert find("two/b") == "two/b/2.0.0"
    assert find("two/b:2.0.0") == "two/b/2.0.0"
    assert find("three") == "three/only/1.0.0"
    with pytest.raises(ValueError, match=r"name='two' must name one .*\['two/a', 'two/b'\]"):
        find("two")
    with pytest.raises(FileNotFoundError, match=r"versions are \['1.10.0', '1.9.0'\]. To prepare"):
        find("one:2.0.0")
    with pytest.raises(FileNotFoundError, match=r"'two/c' is not prepared .*tfds build two/c "):
        find("two/c")
    with pytest.raises(ValueError, match="name='hub:x/y' must be 'digits' or a TFDS name"):
        find("hub:x/y")


def test_unknown_and_missing(tiny_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'cifra10' is an unknown .*: cifar10.*list_builders"):
        data.load("cifra10", split="train", data_dir=str(tiny_dir))
    with pytest.raises(ValueError, match=r"'tiny_pgn' is an unknown data set; nearest .*tiny_png"):
        data.load("tiny_pgn", split="train", data_dir=str(tiny_dir))
    with pytest.raises(ValueError, match=r"'digit' is an unknown data set; nearest names: digits"):
        data.load("digit", split="train", data_dir=str(tiny_dir))
    with pytest.raises(FileNotFoundError, match=r"'mnist' is not prepared in .*tfds build mnist "):
        data.load("mnist", split="train", data_dir=str(tiny_dir))
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"missing' is not a directory; expected .*mnist/"):
        data.load("mnist", split="train", data_dir=missing)
    monkeypatch.setenv("TFDS_DATA_DIR", missing)
    with pytest.raises(FileNotFoundError, match="missing' is not a directory"):
        data.load("mnist", split="train")
    with pytest.raises(ValueError, match="'cifra10' is an unknown data set"):
        data.load("cifra10", split="train")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_dir))
    assert len(data.load("tiny_png", split="test")) == 7


class _Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_only_on_a_terminal(terminal, monkeypatch):
    stream = _Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with encoded_data._progress("tiny train", 4) as advance:
        advance(4)
    assert ("tiny train" in stream.getvalue()) == terminal


def test_resize_and_crop_keeps_the_centre():
    wide = np.zeros((4, 12, 1), np.uint8)
    wide[:, 4:8] = np.arange(16).reshape(4, 4, 1)
    np.testing.assert_array_equal(decoding.resize_and_crop(wide, 4), wide[:, 4:8])
    assert decoding.resize_and_crop(np.zeros((7, 3, 3), np.uint8), 5).shape == (5, 5, 3)


@pytest.mark.data
def test_real_cifar10(cifar10_dir, shared_dir):
    test = data.load("cifar10", split="test", data_dir=str(cifar10_dir))
    source = np.load(shared_dir / "data" / "cifar10" / "test_a.npz")
    blob, offsets = source["blob"].tobytes(), source["offsets"]
    strips = [
        np.asarray(Image.open(io.BytesIO(blob[start:stop])).convert("RGB"))
        for start, stop in itertools.pairwise(offsets)
    ]
    images = np.concatenate([strip.reshape(-1, 32, 32, 3) for strip in strips])
    assert contents(test.images, test.labels) == contents(images, source["labels"])

    train = data.load("cifar10", split="train", data_dir=str(cifar10_dir))
    np.testing.assert_array_equal(np.bincount(train.labels), np.full(10, 5000))
    assert train.class_names[:3] == ("airplane", "automobile", "bird")
    for known, computed in zip(data.statistics("cifar10"), data.statistics("x", train.images)):
        np.testing.assert_allclose(known, computed, atol=1e-4)


@pytest.mark.data
def test_real_imagenet_images(cifar10_dir):
    test = data.load("imagenet2012", split="test", data_dir=str(cifar10_dir), image_size=64)
    assert (test.split, test.num_classes) == ("validation", 1000)
    assert test.images.shape == (20, 64, 64, 3)
    assert len({hashlib.sha256(array.tobytes()).digest() for array in test.images}) == 20
