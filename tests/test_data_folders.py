"""Folders of images: what is a class, what is left out, and how splits are called."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from uniq_jax import data


def write(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    image = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(image).save(file, "png")
    path.write_bytes(file.getvalue())


@pytest.fixture
def folder(tmp_path):
    """Four images of each of three classes in train, two in val."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for index in range(count):
                write(tmp_path / split / name / f"{index}.png", 10 * label + index)
    return tmp_path


def load(folder, split="train"):
    return data.load_encoded("image_folder", split=split, data_dir=str(folder), image_size=8)


def labels(folder, split="train"):
    """The label of each image by its name."""
    source = load(folder, split)
    return {record.name: record.label for record in source.records.read(range(len(source)))}


# Classes


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".ppm"])
@pytest.mark.parametrize(("split", "read"), [("train", "train"), ("train", "val"), ("val", "val")])
def test_a_class_without_a_readable_file_is_an_error(folder, suffix, split, read):
    for path in (folder / split / "bee").iterdir():
        path.rename(path.with_suffix(suffix))
    where = re.escape(repr(str(folder / split / "bee")))
    allowed = r"\.jpg, \.jpeg, \.png, \.bmp, \.gif"
    with pytest.raises(
        ValueError, match=f"{where} is the directory of a class.*in one of {allowed}"
    ):
        load(folder, read)


def test_a_set_without_any_readable_file_is_an_error(folder):
    for path in (folder / "train").rglob("*.png"):
        path.rename(path.with_suffix(".webp"))
    with pytest.raises(ValueError, match="ant' is the directory of a class"):
        load(folder)


def test_an_unread_split_may_have_empty_directories(folder):
    (folder / "val" / "dog").mkdir()
    assert len(load(folder)) == 12
    with pytest.raises(ValueError, match="dog' is the directory of a class"):
        load(folder, "train+val")


def test_without_train_classes_are_those_of_the_splits_that_hold_images(folder):
    (folder / "train").rename(folder / "validation_too")
    (folder / "notes" / "aardvark").mkdir(parents=True)
    assert load(folder, "val").class_names == ("ant", "bee", "cat")
    (folder / "validation_too" / "aardvark").mkdir()
    with pytest.raises(ValueError, match="aardvark' is the directory of a class"):
        load(folder, "val")


def test_a_split_may_lack_classes_and_keeps_the_labels(folder):
    expected = {name: label for name, label in labels(folder, "val").items() if "/ant/" not in name}
    for path in (folder / "val" / "ant").iterdir():
        path.unlink()
    (folder / "val" / "ant").rmdir()
    assert load(folder, "val").class_names == ("ant", "bee", "cat")
    found = labels(folder, "val")
    assert found == expected
    assert set(found.values()) == {1, 2}


def test_names_that_begin_with_a_dot_are_left_out(folder):
    expected = {split: labels(folder, split) for split in ("train", "val")}
    for hidden in (
        "train/.ipynb_checkpoints/x.png",
        "val/.ipynb_checkpoints/x.png",
        "train/bee/.ipynb_checkpoints/x.png",
        "train/bee/._0.png",
        "val/bee/._0.png",
        ".thumbnails/bee/x.png",
    ):
        write(folder / hidden)
    assert {split: labels(folder, split) for split in ("train", "val")} == expected
    assert load(folder).class_names == ("ant", "bee", "cat")
    for path in (folder / "train" / "bee").glob("?.png"):
        path.unlink()
    with pytest.raises(ValueError, match="bee' is the directory of a class"):
        load(folder)


# Names of splits


@pytest.mark.parametrize(
    ("split", "resolved", "count"),
    [
        ("val", "validation", 6),
        ("val[:50%]", "validation[:50%]", 3),
        ("train+val", "train+validation", 18),
        ("train[:50%]+val", "train[:50%]+validation", 12),
        ("val + train", "validation + train", 18),
        ("val[:2]+val[4:]+test", "validation[:2]+validation[4:]+validation", 10),
        ("interval", "interval", 1),
        ("interval[:1]+val", "interval[:1]+validation", 7),
        ("my-val[:1]", "my-val[:1]", 1),
    ],
)
def test_val_is_validation_wherever_it_stands_alone(folder, split, resolved, count):
    for name in ("interval", "my-val"):
        write(folder / name / "bee" / "0.png")
    source = load(folder, split)
    assert (source.split, len(source)) == (resolved, count)


def test_val_is_validation_where_the_directory_has_the_long_name(folder):
    expected = labels(folder, "validation")
    (folder / "val").rename(folder / "validation")
    for split in ("val", "validation", "test"):
        found = labels(folder, split)
        assert {
            name.replace("validation/", "val/"): label for name, label in found.items()
        } == expected


def test_both_names_are_two_splits_where_both_exist(folder):
    write(folder / "validation" / "bee" / "0.png")
    assert (len(load(folder, "val")), len(load(folder, "validation"))) == (6, 1)
