"""Random resized crops: which part of a photo an example shows, by torchvision's rule."""

import math
from typing import NamedTuple

import numpy as np

TRIES = 10
_AREA = (0.08, 1.0)
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))


class Crop(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_resized_crops(rng: np.random.Generator, batch_size: int) -> np.ndarray:
    """What `resized_crop` needs for each example, drawn before the sizes of the images are known.

    Returns:
        float64 (batch_size, TRIES, 4), uniform in [0, 1): area, aspect, top and left of each try.
    """
    return rng.random((batch_size, TRIES, 4))


def resized_crop(draws: np.ndarray, height: int, width: int) -> Crop:
    """The crop that one example's draws mean for an image of this size.

    As torchvision's RandomResizedCrop: a share of the area, uniform in 0.08 .. 1, and an aspect
    (width by height), uniform in its logarithm in 3/4 .. 4/3; where ten tries do not fit, the
    largest centre crop whose aspect lies within these bounds.

    Args:
        draws: float64 (TRIES, 4), see `draw_resized_crops`.
        height: Of the image, at least 1.
        width: Of the image, at least 1.

    Returns:
        A crop within the image.
    """
    (least, most), (low, high) = _AREA, _LOG_ASPECT
    for area_draw, aspect_draw, top_draw, left_draw in draws.tolist():
        area = height * width * (least + (most - least) * area_draw)
        aspect = math.exp(low + (high - low) * aspect_draw)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width)
    lowest, highest = math.exp(low), math.exp(high)
    crop_width = min(width, max(1, round(height * highest)))
    crop_height = min(height, max(1, round(width / lowest)))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)
