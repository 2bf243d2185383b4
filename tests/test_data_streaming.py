"""Data that stay on disk: the batches they give, resized crops, broken images, image folders."""

import io
import itertools
import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from uniq_jax import config, data
from uniq_jax.data import image_data
from uniq_jax.train.run import Run

CLASSES = ("ant", "bee", "cat")
RESIZED = {"batch_size": 4, "seed": 1, "augment": data.RESIZED_CROP}


def jpeg(seed, height=40, width=50):
    """A file whose picture is a gradient in a colour of its own, so that crops of it are known."""
    colour = np.random.default_rng(seed).integers(60, 200, 3)
    ramp = np.linspace(-50, 50, width)[None, :, None] + np.zeros((height, 1, 3))
    file = io.BytesIO()
    Image.fromarray((colour + ramp).astype(np.uint8)).save(file, "jpeg", quality=95)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Train: 8 images of each of three classes; val: 5 of each, one below another directory."""
    seeds = itertools.count()
    for split, count in (("train", 8), ("val", 5)):
        for name in CLASSES:
            directory = tmp_path / split / name
            (directory / "deep").mkdir(parents=True)
            for index in range(count):
                place = directory / "deep" if index == 4 else directory
                suffix = ".JPEG" if index % 2 else ".jpg"
                height, width = 40 + 3 * index, 60 - index
                (place / f"{index}{suffix}").write_bytes(jpeg(next(seeds), height, width))
            (directory / "notes.txt").write_text("no image")
    return tmp_path


def load(folder, split="train", size=16, **options):
    return data.load_encoded(
        "image_folder", split=split, data_dir=str(folder), image_size=size, **options
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def run(source, count, **options):
    with data.train_iterator(source, **{**RESIZED, **options}) as batches:
        return take(batches, count)


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


# Folders of images


def test_folder(folder):
    train = load(folder)
    assert (len(train), train.class_names, train.split) == (24, CLASSES, "train")
    assert (train.num_classes, train.image_shape, train.decoded_bytes) == (3, (16, 16, 3), 24 * 768)
    records = train.records.read(range(24))
    for record in records:
        split, name, *_ = record.name.split("/")
        assert (split, CLASSES[record.label]) == ("train", name)
        assert (folder / record.name).read_bytes() == record.encoded
    assert len({record.name for record in records}) == 24
    assert any("/deep/" in record.name for record in records)
    labels = [record.label for record in records]
    assert labels != sorted(labels), "a sub-split must show all classes"


def test_sub_splits_and_names_of_the_validation_split(folder):
    train = load(folder).records.read(range(24))
    half = load(folder, "train[50%:]")
    assert half.records.read(range(12)) == train[12:]
    for split, resolved in (("val", "validation"), ("validation", "validation")):
        assert load(folder, split).split == resolved
    assert (load(folder, "test").split, len(load(folder, "test"))) == ("validation", 15)
    assert len(load(folder, "val[:40%]")) == 6


def test_a_folder_in_memory_is_what_it_is_on_disk(folder):
    source, inside = load(folder), data.load(
        "image_folder", split="train", data_dir=str(folder), image_size=16
    )  # fmt: skip
    for augment in data.AUGMENTATIONS:
        options = {"augment": augment, "pad": 2}
        assert_equal(run(source, 13, **options), run(inside, 13, **options))
    evaluated = [list(data.eval_batches(part, batch_size=7)) for part in (source, inside)]
    assert_equal(*evaluated)
    assert [batch["mask"].sum() for batch in evaluated[0]] == [7, 7, 7, 3]


def test_the_centre_of_a_larger_image(folder):
    """256 for 224 at a seventh of the size."""
    wide, whole = load(folder, size=28, resize_size=32), load(folder, size=32)
    (record, *_) = wide.records.read([0])
    (top, left), image = (2, 2), whole.decode(record)
    np.testing.assert_array_equal(wide.decode(record), image[top:-top, left:-left])


def test_wrong_folders(folder, tmp_path):
    def fails(error, message, name="image_folder", **change):
        options = {"split": "train", "data_dir": str(folder), "image_size": 16, **change}
        with pytest.raises(error, match=message):
            data.load_encoded(name, **options)

    fails(ValueError, "data_dir must be given for name='image_folder'", data_dir=None)
    fails(ValueError, "image_size must be given for name='image_folder'", image_size=None)
    fails(ValueError, "resize_size must be at least image_size=16 or None, got 8", resize_size=8)
    fails(ValueError, r"'dev' is unknown: this set has \['train', 'validation'\]", split="dev")
    missing = str(tmp_path / "missing")
    fails(
        FileNotFoundError, "missing' is not a directory; expected .*train/CLASS", data_dir=missing
    )
    fails(ValueError, "name='digits' must be read into memory", name="digits")
    (folder / "val" / "dog").mkdir()
    (folder / "val" / "dog" / "1.png").write_bytes(b"")
    fails(ValueError, "has the class 'dog', which must be a directory of 'train'", split="test")


# Random resized crops


def test_seed_decides_order_and_crops(folder):
    source = load(folder)
    first = run(source, 13)
    assert_equal(first, run(source, 13, prefetch=0))
    other = run(source, 13, seed=2)
    assert any((a["label"] != b["label"]).any() for a, b in zip(first, other))
    assert first[0]["image"].shape == (4, 16, 16, 3)
    assert first[0]["image"].dtype == np.uint8
    # Each epoch shows each image once, and each time another part of it.
    seen = [[], []]
    for index, batch in enumerate(first[:12]):
        seen[index // 6] += [image.tobytes() for image in batch["image"]]
    assert len(set(seen[0])) == len(set(seen[1])) == 24
    assert not set(seen[0]) & set(seen[1])
    for half in (first[:6], first[6:12]):
        labels = np.concatenate([batch["label"] for batch in half])
        assert np.bincount(labels).tolist() == [8, 8, 8]


def test_half_of_the_crops_are_mirrored(folder):
    """The gradient of every picture rises from left to right."""
    rising = [
        float(image[:, -1].mean()) > float(image[:, 0].mean())
        for batch in run(load(folder), 60)
        for image in batch["image"]
    ]
    assert 0.38 < np.mean(rising) < 0.62  # 240 draws, four standard deviations


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_partition_the_global_batch(folder, process_count):
    source = load(folder)
    parts = [
        run(source, 8, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts)
    ]
    assert_equal(joined, run(source, 8))


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("steps", [0, 1, 9])
def test_resume_is_bit_exact(folder, steps, prefetch):
    with data.train_iterator(load(folder), prefetch=prefetch, **RESIZED) as batches:
        take(batches, steps)
        state = json.loads(json.dumps(batches.get_state()))
        after = take(batches, 8)
        batches.set_state(state)
        assert_equal(take(batches, 8), after)
    with data.train_iterator(load(folder), prefetch=prefetch, **RESIZED) as fresh:
        fresh.set_state(state)
        assert_equal(take(fresh, 8), after)


def test_worker_processes_change_nothing(folder):
    (folder / "train" / "ant" / "1.JPEG").write_bytes(jpeg(0)[:-9])
    source, notes = load(folder), []
    assert len(pickle.dumps(source)) < 10_000
    options = {**RESIZED, "on_broken_image": "skip", "note": notes.append}
    expected = run(source, 14, on_broken_image="skip", note=lambda text: None)
    with data.train_iterator(source, workers=2, **options) as batches:
        assert_equal(take(batches, 8), expected[:8])
        state = batches.get_state()
        take(batches, 2)
        batches.set_state(state)
        assert_equal(take(batches, 6), expected[8:])
        assert list(batches.broken_images) == ["train/ant/1.JPEG"]
    assert len(notes) == 1
    with data.train_iterator(source, workers=1, **options) as fresh:
        fresh.set_state(state)
        assert_equal(take(fresh, 3), expected[8:11])


def test_resized_crops_are_of_images_on_disk(folder):
    inside = load(folder).into_memory()
    message = re.escape("augment='random_resized_crop_flip' needs images on disk")
    with pytest.raises(ValueError, match=message):
        data.train_iterator(inside, **RESIZED)
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        data.train_iterator(load(folder), workers=-1, **RESIZED)
    with pytest.raises(ValueError, match="on_broken_image must be 'error' or 'skip', got 'stop'"):
        data.train_iterator(load(folder), on_broken_image="stop", **RESIZED)


# Broken images


@pytest.fixture
def broken_folder(folder):
    (folder / "train" / "bee" / "2.jpg").write_bytes(jpeg(99)[:-5])
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"\xff\xd8 nothing")
    (folder / "val" / "bee" / "2.jpg").write_bytes(jpeg(99)[:-200])
    return folder


BROKEN = ["train/bee/2.jpg", "train/cat/0.jpg"]


@pytest.mark.parametrize("augment", ["none", data.RESIZED_CROP])
def test_a_broken_image_is_an_error(broken_folder, augment):
    with pytest.raises(
        ValueError, match=r"the image train/\w+/\d.jpg is broken: .*='skip' goes on"
    ):
        run(load(broken_folder), 6, augment=augment)
    with pytest.raises(ValueError, match=r"the image val/bee/2.jpg is broken"):
        list(data.eval_batches(load(broken_folder, "val"), batch_size=4))
    with pytest.raises(ValueError, match=r"image \d+ \(val/bee/2.jpg\) cannot be decoded"):
        load(broken_folder, "val").into_memory()


@pytest.mark.parametrize("prefetch", [0, 4])
def test_the_next_image_takes_the_place_of_a_broken_one(broken_folder, prefetch):
    source, notes = load(broken_folder), []
    options = {**RESIZED, "augment": "none", "prefetch": prefetch, "on_broken_image": "skip"}
    with data.train_iterator(source, note=notes.append, **options) as batches:
        first, second = take(batches, 6), take(batches, 6)
        assert sorted(batches.broken_images) == BROKEN
    assert len(notes) == 2
    assert "is skipped, 2 so far: " in notes[1]
    assert all(any(name in note for note in notes) for name in BROKEN)
    records = source.records.read(range(24))
    names = [record.name for record in records]
    expected = sorted(
        (source.decode(records[index]).tobytes(), records[index].label)
        for index in (
            next(i % 24 for i in range(start, start + 24) if names[i % 24] not in BROKEN)
            for start in range(24)
        )
    )
    for epoch in (first, second):
        found = sorted(
            (image.tobytes(), int(label))
            for batch in epoch
            for image, label in zip(batch["image"], batch["label"])
        )
        assert found == expected


def test_evaluation_leaves_a_broken_image_out(broken_folder):
    source, notes = load(broken_folder, "val"), []
    batches = list(
        data.eval_batches(source, batch_size=4, on_broken_image="skip", note=notes.append)
    )
    masks = np.concatenate([batch["mask"] for batch in batches])
    (position,) = [i for i, r in enumerate(source.records.read(range(15))) if "bee/2" in r.name]
    assert np.flatnonzero(~masks).tolist() == [position, 15]
    assert not batches[position // 4]["image"][position % 4].any()
    assert len(notes) == 1


def test_nothing_but_broken_images_is_an_error(folder):
    for path in (folder / "train").rglob("*.jp*"):
        path.write_bytes(b"")
    for path in (folder / "train").rglob("*.JP*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="100 images in a row are broken, the last one is train/"):
        run(load(folder), 1, on_broken_image="skip")


def test_a_label_outside_the_classes_is_an_error(folder):
    source = load(folder)
    source.records.labels[:] = 3
    with pytest.raises(ValueError, match=r"label of train/.* must be in 0 .. 2, got 3"):
        run(source, 1, on_broken_image="skip")


# Where a run keeps its data


def test_what_fits_is_loaded(folder, monkeypatch):
    def kind(in_memory, name="image_folder"):
        size = {} if name == "digits" else {"data_dir": str(folder), "image_size": 16}
        return type(data.load_as(in_memory, name, split="train", **size))

    assert kind("auto") is kind("always") is kind("auto", "digits") is data.ImageData
    assert kind("never") is data.EncodedData
    monkeypatch.setattr(image_data, "MEMORY_LIMIT_BYTES", 24 * 768 - 1)
    assert kind("auto") is data.EncodedData
    with pytest.raises(ValueError, match=r"'never'\), or take a sub-split"):
        kind("always")
    with pytest.raises(ValueError, match=r"in_memory must be one of .*, got 'some'"):
        kind("some")


def folder_config(folder):
    value = config.base()
    value.data.update(
        name="image_folder",
        data_dir=str(folder),
        image_size=16,
        batch_size=8,
        eval_batch_size=8,
        augment=data.RESIZED_CROP,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    value.phases = ("float",)
    value.float = config.phase("float")
    return value


def test_a_run_reads_from_disk(folder):
    value = folder_config(folder)
    run_ = Run(config.run_spec(value))
    assert isinstance(run_.train_data, data.EncodedData)
    assert isinstance(run_.test_data, data.ImageData)
    assert run_.steps_per_epoch == 3
    with run_.train_batches() as batches:
        assert next(batches)["image"].shape == (8, 16, 16, 3)
    value.data.mean = value.data.std = ()
    with pytest.raises(ValueError, match=r"config.data.mean and config.data.std must be given"):
        Run(config.run_spec(value))


def test_a_run_names_a_broken_image_once(broken_folder):
    value, notes = folder_config(broken_folder), []
    value.data.update(on_broken_image="skip", in_memory="never")
    run_ = Run(config.run_spec(value), notes.append)
    for _ in range(2):
        with run_.train_batches() as batches:
            take(batches, 3)
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_size": 8}, r"config.data.resize_size \(=8\) must be 0, or at least .*\(=16\)"),
        ({"workers": -1}, r"config.data.workers \(=-1\) must be at least 0"),
        ({"image_size": 0}, r"config.data.image_size \(=0\) must be above 0 with .*='random_res"),
        ({"in_memory": "always"}, r"config.data.in_memory \(='always'\) must be 'auto' or 'never'"),
        ({"in_memory": "yes"}, r"config.data.in_memory \(='yes'\) must be one of 'auto', 'always'"),
        ({"on_broken_image": "stop"}, r"config.data.on_broken_image \(='stop'\) must be one of"),
    ],
)
def test_wrong_config(folder, change, message):
    value = folder_config(folder)
    value.data.update(change)
    with pytest.raises(config.ConfigError, match=message):
        config.run_spec(value)


# The real thing


@pytest.mark.data
def test_real_imagenet(cifar10_dir):
    train, test = (
        data.load_encoded(
            "imagenet2012", split=split, data_dir=str(cifar10_dir), image_size=56, resize_size=64
        )
        for split in ("train", "test")
    )
    assert (len(train), train.num_classes, test.split) == (80, 1000, "validation")
    names = [record.name for record in train.records.read(range(80))]
    assert len(set(names)) == 80
    assert all(name.endswith(".JPEG") for name in names)
    batches = run(train, 20, seed=0)
    labels = np.concatenate([batch["label"] for batch in batches])
    assert sorted(labels) == sorted(record.label for record in train.records.read(range(80)))
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) == 80
    assert_equal(
        list(data.eval_batches(test, batch_size=8)),
        list(data.eval_batches(test.into_memory(), batch_size=8)),
    )
    assert_equal(run(pickle.loads(pickle.dumps(train)), 3, seed=0), batches[:3])
