"""Random resized crops by torchvision's rule, and their decoding against Pillow's."""

import io
import math
import random

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from uniq_jax.data import photos, random_crops


def reference_crop(rng, height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop.get_params of torchvision, in its own words: (top, left, height, width)."""
    area = height * width
    for _ in range(10):
        target_area = area * rng.uniform(*scale)
        aspect_ratio = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, round(width / min(ratio))
    elif in_ratio > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def shares(crops, height, width):
    """Area, aspect, and where in the free room it lies, of each crop."""
    top, left, h, w = np.asarray(crops, float).T
    rest_y, rest_x = np.maximum(height - h, 1), np.maximum(width - w, 1)
    return {
        "area": h * w / (height * width),
        "aspect": w / h,
        "top": top / rest_y,
        "left": left / rest_x,
    }


def our_crops(count, height, width):
    draws = random_crops.draw_resized_crops(np.random.default_rng(0), count)
    return [random_crops.resized_crop(draw, height, width) for draw in draws]


SIZES = [(375, 500), (500, 375), (400, 400), (300, 1100), (1600, 300), (20, 30)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crops_are_distributed_as_torchvisions(height, width):
    rng = random.Random(1)
    expected = shares([reference_crop(rng, height, width) for _ in range(5000)], height, width)
    crops = our_crops(5000, height, width)
    for name, values in shares(crops, height, width).items():
        assert stats.ks_2samp(values, expected[name]).pvalue > 1e-3, name
    for top, left, h, w in crops:
        assert top >= 0
        assert left >= 0
        assert 0 < h <= height - top
        assert 0 < w <= width - left


@pytest.mark.parametrize("change", [{"scale": (0.15, 1.0)}, {"ratio": (0.7, 4 / 3)}])
def test_another_rule_would_be_noticed(change):
    rng = random.Random(1)
    other = shares([reference_crop(rng, 375, 500, **change) for _ in range(5000)], 375, 500)
    ours = shares(our_crops(5000, 375, 500), 375, 500)
    assert min(stats.ks_2samp(ours[name], other[name]).pvalue for name in ours) < 1e-3


@pytest.mark.parametrize(
    ("height", "width"), [(100, 1000), (1000, 100), (100, 101), (1, 1), (1, 9)]
)
def test_tries_that_do_not_fit_fall_back_to_the_centre(height, width):
    draws = np.full((random_crops.TRIES, 4), 0.999)
    draws[:, 1] = 0.999 if width < 1.2 * height else 0.5
    expected = reference_crop(_Fixed(draws[0]), height, width)
    found = random_crops.resized_crop(draws, height, width)
    assert found == expected
    if (height, width) in ((100, 1000), (1000, 100)):
        assert found[2:] == ((100, 133) if width > height else (133, 100))


class _Fixed:
    """Draws of one try, again and again, as `random.Random` gives them."""

    def __init__(self, draws):
        self.draws, self.calls = draws.tolist(), 0

    def uniform(self, low, high):
        self.calls += 1
        return low + (high - low) * self.draws[(self.calls - 1) % 2]

    def randint(self, low, high):
        return int(low + self.draws[2] * (high + 1 - low))


# Decoding


def picture(height, width):
    """A smooth picture in colour, which JPEG hardly changes."""
    y, x = np.mgrid[:height, :width] / np.asarray([height, width])[:, None, None]
    waves = [np.sin(9 * y + 1) + np.cos(7 * x), np.sin(12 * x + 5 * y), np.cos(8 * y - 10 * x)]
    return np.stack([(127 + 60 * wave).astype(np.uint8) for wave in waves], -1)


def encode(array, kind="jpeg", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, kind, **options)
    return file.getvalue()


JPEGS = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 2},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
}


def expected_crop(encoded, draws, size, mode="RGB"):
    """The whole image decoded by Pillow, cropped, resized with its exact filter."""
    image = Image.open(io.BytesIO(encoded)).convert(mode)
    top, left, h, w = random_crops.resized_crop(draws, image.height, image.width)
    box = (left, top, left + w, top + h)
    resized = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(size, size, -1)


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize(("height", "width"), [(375, 500), (601, 433), (61, 47), (1203, 1307)])
def test_decoded_crops_are_those_of_pillow(kind, height, width):
    encoded = encode(picture(height, width), quality=95, **JPEGS[kind])
    for draws in random_crops.draw_resized_crops(np.random.default_rng(3), 6):
        found = photos.decode_random_crop(encoded, draws, image_size=112, channels=3)
        assert (found.shape, found.dtype) == ((112, 112, 3), np.uint8)
        difference = np.abs(found.astype(int) - expected_crop(encoded, draws, 112))

        assert difference.mean() < 3, (difference.mean(), difference.max())
        assert difference.max() < 20, (difference.mean(), difference.max())


def test_a_shifted_crop_would_be_noticed():
    encoded = encode(picture(375, 500), quality=95)
    (draws,) = random_crops.draw_resized_crops(np.random.default_rng(3), 1)
    found = photos.decode_random_crop(encoded, draws, image_size=112, channels=3)
    expected = expected_crop(encoded, draws, 112).astype(int)
    assert np.abs(found[:-2] - expected[2:]).mean() > 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "gif"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_other_formats_and_channels(kind, mode, channels):
    encoded = encode(picture(90, 120), kind, mode)
    (draws,) = random_crops.draw_resized_crops(np.random.default_rng(4), 1)
    found = photos.decode_random_crop(encoded, draws, image_size=32, channels=channels)
    expected = expected_crop(encoded, draws, 32, "L" if channels == 1 else "RGB")
    assert found.shape == expected.shape == (32, 32, channels)
    assert np.abs(found.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_mirrored(kind, channels):
    encoded = encode(picture(90, 120), kind)
    for draws in random_crops.draw_resized_crops(np.random.default_rng(4), 3):
        options = {"image_size": 32, "channels": channels}
        plain = photos.decode_random_crop(encoded, draws, **options)
        mirrored = photos.decode_random_crop(encoded, draws, is_mirrored=True, **options)
        np.testing.assert_array_equal(mirrored, plain[:, ::-1])
        assert not np.array_equal(mirrored, plain)


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("size", [16, 50, 224])
def test_rows_that_are_left_out_change_nothing(kind, size, monkeypatch):
    encoded = encode(picture(517, 405), **JPEGS[kind])
    draws = random_crops.draw_resized_crops(np.random.default_rng(5), 20)

    def decode():
        return [photos.decode_random_crop(encoded, d, image_size=size, channels=3) for d in draws]

    shortened = decode()
    monkeypatch.setattr(photos, "_BASELINE", ())  # every file is decoded to its end
    for found, expected in zip(shortened, decode()):
        np.testing.assert_array_equal(found, expected)


def test_the_orientation_tag_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    draws = random_crops.draw_resized_crops(np.random.default_rng(6), 5)
    for draw in draws:
        plain, turned = (
            photos.decode_random_crop(
                encode(picture(200, 300), **options), draw, image_size=32, channels=3
            )
            for options in ({}, {"exif": exif})
        )
        np.testing.assert_array_equal(plain, turned)


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_file_that_is_cut_short_is_an_error(kind, share):
    whole = encode(picture(200, 300), **JPEGS[kind])
    for draws in random_crops.draw_resized_crops(np.random.default_rng(7), 4):
        photos.decode_random_crop(whole, draws, image_size=32, channels=3)
        with pytest.raises((ValueError, OSError, SyntaxError)):
            photos.decode_random_crop(
                whole[: int(share * len(whole))], draws, image_size=32, channels=3
            )


def test_a_thumbnail_is_no_end_of_a_file_that_is_cut_short():
    thumbnail = encode(picture(20, 30))
    whole = encode(picture(200, 300), exif=b"Exif\0\0" + thumbnail)
    assert whole.find(b"\xff\xd9") < whole.rfind(b"\xff\xd9")
    for draws in random_crops.draw_resized_crops(np.random.default_rng(8), 4):
        with pytest.raises(ValueError, match="cut short"):
            photos.decode_random_crop(whole[:-100], draws, image_size=32, channels=3)


@pytest.mark.parametrize(
    "encoded", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"no image", b"\0" * 99]
)
def test_what_is_no_image_is_an_error(encoded):
    draws = np.full((random_crops.TRIES, 4), 0.5)
    with pytest.raises((ValueError, OSError, SyntaxError)):
        photos.decode_random_crop(encoded, draws, image_size=32, channels=3)


@pytest.mark.data
def test_real_photos(shared_dir):
    """In grey and colour, of 75x56 to 2400x1600 pixels: as Pillow, to a few levels."""
    paths = sorted((shared_dir / "data" / "imagenet_fullres").glob("*.JPEG"))
    assert len(paths) == 100
    draws = random_crops.draw_resized_crops(np.random.default_rng(9), 100)
    means = []
    for path, draw in zip(paths, draws):
        encoded = path.read_bytes()
        found = photos.decode_random_crop(encoded, draw, image_size=224, channels=3)
        means.append(np.abs(found.astype(int) - expected_crop(encoded, draw, 224)).mean())
    assert np.mean(means) < 3
    assert np.max(means) < 10
