"""Encoded images to uint8 arrays, with Pillow."""

import io

import numpy as np

_MODES = {1: "L", 3: "RGB"}


def decode_image(
    encoded: bytes, *, channels: int, image_size: int | None = None, resize_size: int | None = None
) -> np.ndarray:
    """Decode one PNG, JPEG, BMP or GIF image.

    A grey image becomes RGB and the reverse, as `channels` says. Of 16 bits a channel the upper 8
    are taken. The orientation tag of a photo is not applied: TFDS and the reference training codes
    read the pixels as stored.

    Args:
        encoded: The bytes of the file.
        channels: 1 or 3.
        image_size: Where given, see `resize_and_crop`.
        resize_size: Where given with `image_size`, see there.

    Returns:
        uint8 (H, W, channels).

    Raises:
        ValueError, OSError, SyntaxError: If the image is broken, of 32 bits a pixel in one channel,
            or larger than Pillow takes.
    """
    from PIL import Image, UnidentifiedImageError

    # Naming the formats keeps Pillow from trying dozens, a tenth of the time for a small image.
    try:
        opened = Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG", "BMP", "GIF"))
    except UnidentifiedImageError as error:  # whose own text names an address in memory
        raise ValueError("it is no PNG, JPEG, BMP or GIF image") from error
    except Image.DecompressionBombError as error:  # which derives from Exception alone
        raise ValueError(str(error)) from error
    with opened as image:
        image = _to_mode(image, _MODES[channels])
        if image_size is not None:
            image = _resize_and_crop(image, image_size, resize_size or image_size)
        array = np.asarray(image)
    return array[..., None] if channels == 1 else array


def _to_mode(image, mode):
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError(
            f"its mode must be one of at most 16 bits a channel, got {image.mode!r}, of 32 bits"
        )
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255; of colours with 16 bits it takes the upper byte too.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def encode_png(image: np.ndarray) -> bytes:
    """The bytes of a PNG file, from which `decode_image` makes the same image.

    Args:
        image: uint8 (H, W, C), C 1 or 3.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def resize_and_crop(
    image: np.ndarray, image_size: int, resize_size: int | None = None
) -> np.ndarray:
    """Scale the shorter side (bilinear, antialiased), then crop the centre square.

    Args:
        image: uint8 (H, W, C), C 1 or 3.
        image_size: Side of the result, at least 1.
        resize_size: What the shorter side is scaled to, at least `image_size`, which it is by
            default.

    Returns:
        uint8 (image_size, image_size, C).
    """
    from PIL import Image

    channels = image.shape[-1]
    result = _resize_and_crop(
        Image.fromarray(image[..., 0] if channels == 1 else image),
        image_size,
        resize_size or image_size,
    )
    return np.asarray(result).reshape(image_size, image_size, channels)


def _resize_and_crop(image, image_size, resize_size):
    from PIL import Image

    width, height = image.size
    shorter = min(width, height)
    size = tuple(max(resize_size, round(side * resize_size / shorter)) for side in (width, height))
    if size != (width, height):
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
