"""How many photos a core decodes to random resized crops: ours, against Pillow and other ways.

python benchmarks/input.py DIRECTORY   # of JPEGs, at any depth

Ways are timed alternately, in one thread, and make the same crops of the same images.
"""

import argparse
import io
import pathlib
import sys
import time

import cv2
import numpy as np
import simplejpeg
from measure import Result, keep
from PIL import Image

from uniq_jax.data import photos, random_crops

_SIZE = 224
_SECONDS = 15


def ours(encoded: bytes, draws: np.ndarray) -> np.ndarray:
    """What training reads."""
    return photos.decode_random_crop(encoded, draws, image_size=_SIZE, channels=3)


def pillow(encoded: bytes, draws: np.ndarray) -> np.ndarray:
    """As torchvision: the whole image in RGB, cropped, resized."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    crop = random_crops.resized_crop(draws, image.height, image.width)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    return np.asarray(image.crop(box).resize((_SIZE, _SIZE), Image.Resampling.BILINEAR))


def pillow_draft(encoded: bytes, draws: np.ndarray) -> np.ndarray:
    """Pillow, decoding at a reduced size where the crop stays large enough."""
    image = Image.open(io.BytesIO(encoded))
    width, height = image.size
    crop = random_crops.resized_crop(draws, height, width)
    scale = _scale(crop)
    image.draft("RGB", (width // scale, height // scale))
    image = image.convert("RGB")
    x, y = image.width / width, image.height / height
    box = (
        crop.left * x,
        crop.top * y,
        (crop.left + crop.width) * x,
        (crop.top + crop.height) * y,
    )
    return np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR, box=box))


def opencv(encoded: bytes, draws: np.ndarray) -> np.ndarray:
    """OpenCV alone, decoding at a reduced size where the crop stays large enough."""
    height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
    crop = random_crops.resized_crop(draws, height, width)
    flag = {
        1: cv2.IMREAD_COLOR_RGB,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[_scale(crop)]
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    y, x = image.shape[0] / height, image.shape[1] / width
    part = image[
        round(crop.top * y) : round((crop.top + crop.height) * y),
        round(crop.left * x) : round((crop.left + crop.width) * x),
    ]
    return cv2.resize(part, (_SIZE, _SIZE), interpolation=cv2.INTER_LINEAR)


def _scale(crop: random_crops.Crop) -> int:
    shorter = min(crop.height, crop.width)
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or shorter >= scale * _SIZE)


def rates(images: list[bytes]) -> dict[str, np.ndarray]:
    """Images a second of one core, of each way, a number for each round."""
    ways = {"pillow": pillow, "pillow draft": pillow_draft, "opencv": opencv, "ours": ours}
    found: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + _SECONDS
    rng = np.random.default_rng(0)
    while time.perf_counter() < end:
        draws = random_crops.draw_resized_crops(rng, len(images))
        for name, way in ways.items():
            start = time.process_time()
            for encoded, draw in zip(images, draws):
                way(encoded, draw)
            found[name].append(len(images) / (time.process_time() - start))
    return {name: np.asarray(values) for name, values in found.items()}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=pathlib.Path, help="of JPEGs, at any depth")
    parser.add_argument("--results", type=pathlib.Path, help="a JSON file, to keep our figure in")
    arguments = parser.parse_args()
    kinds = (".jpeg", ".jpg")
    paths = sorted(p for p in arguments.directory.rglob("*") if p.suffix.lower() in kinds)
    images = [path.read_bytes() for path in paths]
    if not images:
        sys.exit(f"no .jpg or .jpeg below {arguments.directory}")
    cv2.setNumThreads(1)
    found = rates(images)
    rounds = len(found["pillow"])
    print(f"{len(images)} JPEGs, crops of {_SIZE}, images/s of one core, median of {rounds} rounds")
    for name, values in found.items():
        low, middle, high = np.percentile(values / found["pillow"], (25, 50, 75))
        print(
            f"{name:13} {np.median(values):6.0f}   {middle:.2f} ({low:.2f} .. {high:.2f}) x pillow"
        )
        if name == "ours" and arguments.results is not None:
            detail = f"{len(images)} photos, random resized crops of {_SIZE}: "
            detail += f"{np.median(values):.0f} / {np.median(found['pillow']):.0f} images/s a core"
            spread = float(low), float(high)
            result = Result(
                "input_over_pillow", float(middle), "ratio", 2.0, spread=spread, detail=detail
            )
            keep([result], arguments.results)


if __name__ == "__main__":
    main()
