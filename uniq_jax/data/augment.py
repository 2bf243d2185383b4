"""Random crops and flips of whole batches, in NumPy on uint8.

Drawing is apart from applying, so that the draws of a global batch can be sliced for a process.
"""

import numpy as np

AUGMENTATIONS = ("none", "crop", "flip", "crop_flip")
"""What `augment` may be: a padded random crop, a random horizontal flip, neither, or both."""

RESIZED_CROP = "random_resized_crop_flip"
"""What it may be too for images that are not in memory: any part, resized, and a random flip."""


def draw_crops(rng: np.random.Generator, batch_size: int, pad: int) -> np.ndarray:
    """Uniform top-left corners (y, x) of crops within images padded by `pad` on each side.

    Returns:
        int64 (batch_size, 2), each in 0 .. 2 * pad.
    """
    return rng.integers(0, 2 * pad + 1, (batch_size, 2))


def draw_flips(rng: np.random.Generator, batch_size: int) -> np.ndarray:
    """Bool (batch_size,), each True with probability one half."""
    return rng.random(batch_size) < 0.5


def crop(images: np.ndarray, corners: np.ndarray, pad: int) -> np.ndarray:
    """Pad each image with `pad` black pixels on each side and crop it to its own size again.

    Args:
        images: uint8 (B, H, W, C).
        corners: int (B, 2), each crop's (y, x) in the padded image; (pad, pad) changes nothing.
        pad: Number of pixels.

    Returns:
        uint8 (B, H, W, C), a new array.
    """
    batch, height, width, channels = images.shape
    padded = np.zeros((batch, height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[:, pad : pad + height, pad : pad + width] = images
    # All crops of all images as one view (b, y, x, h, w, c), from which one indexing step copies
    # the wanted crops: four times as fast as a loop over images.
    crops = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    crops = crops.transpose(0, 1, 2, 4, 5, 3)
    return np.ascontiguousarray(crops[np.arange(batch), corners[:, 0], corners[:, 1]])


def flip(images: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Mirror left and right those images for which `flips` is True.

    Args:
        images: uint8 (B, H, W, C).
        flips: bool (B,).

    Returns:
        uint8 (B, H, W, C), a new array.
    """
    result = images.copy()
    chosen = np.flatnonzero(flips)
    mirrored = np.empty((len(chosen), *images.shape[1:]), np.uint8)
    # NumPy reverses planes more than twice as fast as interleaved channels.
    for channel in range(images.shape[-1]):
        mirrored[..., channel] = images[chosen, :, ::-1, channel]
    result[chosen] = mirrored
    return result
