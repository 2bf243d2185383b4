"""Images of more than 8 bits, and images that are too large, wherever they are read."""

import io

import numpy as np
import pytest
from PIL import Image

from uniq_jax import data, deploy
from uniq_jax.data import decoding, photos, random_crops
from uniq_jax.predict import read_image
from uniq_jax.predict.model import Model


def encode(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


# All values of 16 bits, in 256 rows of one upper byte each.
RAMP = np.arange(2**16, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_keeps_its_upper_byte(channels):
    found = decoding.decode_image(encode(RAMP), channels=channels)
    expected = np.broadcast_to(np.arange(256)[:, None, None], (256, 256, channels))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_the_grey_of_8_everywhere(channels, tmp_path):
    """In training's crops, scaled for evaluation, and in predictions."""
    files = [encode(image) for image in (RAMP, (RAMP >> 8).astype(np.uint8))]
    for draws in random_crops.draw_resized_crops(np.random.default_rng(0), 3):
        crops = [
            photos.decode_random_crop(file, draws, image_size=32, channels=channels)
            for file in files
        ]
        np.testing.assert_array_equal(*crops)
    options = {"channels": channels, "image_size": 28, "resize_size": 32}
    np.testing.assert_array_equal(*(decoding.decode_image(file, **options) for file in files))
    model = Model(deploy.About(resize_size=32), (28, 28, channels), None, lambda images: images)
    for name, file in zip("ab", files):
        (tmp_path / f"{name}.png").write_bytes(file)
    found = [read_image(tmp_path / f"{name}.png", model) for name in "ab"]
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(found[0], decoding.decode_image(files[0], **options))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_32_bits_are_refused(mode, monkeypatch):
    """No release of Pillow that is allowed reads one from these formats; another may."""
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: Image.new(mode, (4, 4)))
    with pytest.raises(ValueError, match=f"at most 16 bits a channel, got '{mode}', of 32 bits"):
        decoding.decode_image(b"", channels=3)


@pytest.fixture(params=["png", "jpeg"])
def folder(tmp_path, monkeypatch, request):
    """Three small images, and one of more than twice the pixels that Pillow takes.

    The two ways of decoding take one kind of file each.
    """
    kind = request.param
    (tmp_path / "train" / "ant").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(3):
        image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (tmp_path / "train" / "ant" / f"{index}.{kind}").write_bytes(encode(image, kind))
    large = encode(np.zeros((64, 64, 3), np.uint8), kind)
    (tmp_path / "train" / "ant" / f"large.{kind}").write_bytes(large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    return tmp_path


@pytest.mark.parametrize("augment", ["none", data.RESIZED_CROP])
def test_an_image_that_pillow_finds_too_large_is_a_broken_one(folder, augment):
    source = data.load_encoded("image_folder", split="train", data_dir=str(folder), image_size=8)
    options = {"batch_size": 4, "seed": 0, "augment": augment}
    with (
        pytest.raises(ValueError, match=r"the image train/ant/large\.\w+ is broken: .*exceeds"),
        data.train_iterator(source, **options) as batches,
    ):
        next(batches)
    with pytest.raises(ValueError, match=r"\(train/ant/large\.\w+\) cannot be decoded"):
        source.into_memory()
    notes = []
    with data.train_iterator(
        source, on_broken_image="skip", note=notes.append, **options
    ) as batches:
        next(batches)
        (name,) = batches.broken_images
        assert name.startswith("train/ant/large.")
    (batch,) = data.eval_batches(source, batch_size=4, on_broken_image="skip", note=notes.append)
    assert batch["mask"].sum() == 3
    assert len(notes) == 2
