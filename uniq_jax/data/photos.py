"""The crop of a photo at the size of a network's input, decoding little more than the crop needs.

JPEGs in grey or colour, nearly all of ImageNet, take the fast path: the decoder (libjpeg-turbo, by
simplejpeg) scales by 1/2, 1/4 or 1/8 where the crop stays at least as large as the target, stops
below the crop, and OpenCV resizes the rest. Anything else is left to Pillow.
"""

import numpy as np

from uniq_jax.data import decoding, random_crops

_START = b"\xff\xd8"
_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_BASELINE = (0xC0, 0xC1)
# A multiple of every scale, so that rows that are left out change none of the others.
_BLOCK_ROWS = 8


def decode_random_crop(
    encoded: bytes,
    draws: np.ndarray,
    *,
    image_size: int,
    channels: int,
    is_mirrored: bool = False,
) -> np.ndarray:
    """Decode the crop of an image that its draws mean, resized to a square.

    The resizing is bilinear: the decoder averages pixels down to less than twice `image_size`, from
    there nothing is averaged. The crop's edges are rounded to pixels of the scaled image.
    `decoding.decode_image`, for tests, has Pillow's exact filter.

    Args:
        encoded: The bytes of a JPEG, PNG, BMP or GIF file. An orientation tag is not applied.
        draws: float64 (TRIES, 4), see `random_crops.draw_resized_crops`.
        image_size: Side of the result, at least 1.
        channels: 1 or 3; a grey image becomes RGB and the reverse.
        is_mirrored: Whether left and right change places.

    Returns:
        uint8 (image_size, image_size, channels).

    Raises:
        ValueError: If the image is broken or cut short. Damaged data in the middle of a file are
            noticed only where the crop has the whole of it decoded.
    """
    size = _plain_jpeg_size(encoded)
    if size is None:
        result = _decode_with_pillow(encoded, draws, image_size, channels)
    else:
        crop = random_crops.resized_crop(draws, *size)
        result = _decode_jpeg(encoded, crop, *size, image_size, channels)
    if is_mirrored:
        import cv2  # ten times as fast as NumPy where channels are interleaved

        result = cv2.flip(result, 1).reshape(result.shape)
    return result


def _plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG in grey or colour; None for what Pillow is to read, or refuse."""
    if encoded[:2] != _START:
        return None
    import simplejpeg
    from PIL import Image

    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:  # broken, or in a way of subsampling that only Pillow knows
        return None
    limit = Image.MAX_IMAGE_PIXELS
    # From twice as many on Pillow takes a file for an attack on memory.
    size = int(height), int(width)
    if colour in ("CMYK", "YCCK") or (limit is not None and size[0] * size[1] > 2 * limit):
        return None
    return size


def _decode_jpeg(
    encoded: bytes,
    crop: random_crops.Crop,
    height: int,
    width: int,
    image_size: int,
    channels: int,
) -> np.ndarray:
    import cv2
    import simplejpeg

    start, kind = _frame_header(encoded)
    # Within the picture's data no two bytes look like the end, so that this finds the real one.
    if encoded.rfind(_END) < start:
        raise ValueError("the JPEG is cut short: its end is missing")
    # A crop of 448 rows for 224: half as many are decoded, at a fourth of the cost.
    scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(crop[2:]) >= s * image_size)
    bottom = -(-(crop.top + crop.height) // _BLOCK_ROWS) * _BLOCK_ROWS
    is_whole = kind not in _BASELINE or bottom >= height
    rows, file = height, encoded
    if not is_whole:
        # The decoder believes the header, and ends after as many rows.
        rows, file = bottom, bytearray(encoded)
        file[start + 5 : start + 7] = rows.to_bytes(2, "big")
    least = {} if scale == 1 else {"min_height": -(-rows // scale), "min_width": -(-width // scale)}
    image = simplejpeg.decode_jpeg(
        file,
        "RGB" if channels == 3 else "GRAY",
        fastdct=True,
        fastupsample=True,
        strict=is_whole,
        **least,
    )
    top, left, below, right = (
        round(edge / scale)
        for edge in (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)
    )
    part = image[top:below, left:right]
    size = (image_size, image_size)
    return cv2.resize(part, size, interpolation=cv2.INTER_LINEAR).reshape(*size, channels)


def _frame_header(encoded: bytes) -> tuple[int, int]:
    """Where the frame header of a JPEG starts, which holds its height, and its kind of coding."""
    position = 2
    while position + 4 <= len(encoded):
        if encoded[position] != 0xFF:
            break
        kind = encoded[position + 1]
        if kind == 0xFF:  # padding
            position += 1
            continue
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return position, kind
        if kind == _START_OF_SCAN:
            break
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    raise ValueError("the JPEG has no frame header")


def _decode_with_pillow(
    encoded: bytes, draws: np.ndarray, image_size: int, channels: int
) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(np.squeeze(decoding.decode_image(encoded, channels=channels)))
    top, left, height, width = random_crops.resized_crop(draws, image.height, image.width)
    size = (image_size, image_size)
    box = (left, top, left + width, top + height)
    resized = image.resize(size, Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).reshape(*size, channels)
