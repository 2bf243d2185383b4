"""The command that says what an exported network sees in images."""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uniq_jax.predict.images import find_images, read_image
from uniq_jax.predict.model import Model, Prediction, open_model

_DESCRIPTION = """\
Says what an exported network sees in images: the most probable classes of each.

    python -m uniq_jax.predict MODEL IMAGE...

MODEL is a packed file (.safetensors), or an .onnx file (needs the extra uniq_jax[onnx]). IMAGE is a
PNG, JPEG, BMP or GIF file, or a directory of such. Images are resized, cropped at the centre and
normalized as they were in training's evaluation.
"""

# Each size of a batch is timed for so long, or so often.
_TIMING_S = 1.0
_CALLS = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say; returns the exit status."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if not parsed.images and not parsed.benchmark:
        parser.error("give at least one IMAGE, or --benchmark")
    try:
        model = open_model(parsed.model)
        paths = find_images(parsed.images)
        if paths and not model.about.mean:
            print(
                f"warning: MODEL (={str(parsed.model)!r}) does not say how images are normalized, "
                "and gets pixels from 0 to 255; uniq_jax.freeze(…, about=uniq_jax.deploy.About("
                "mean=…, std=…)) tells it",
                file=sys.stderr,
            )
        # Every size of a batch takes a compilation.
        size = min(parsed.batch_size, len(paths)) or parsed.batch_size
        found = _predict(model, paths, parsed.top, size)
        times = _benchmark(model, size) if parsed.benchmark else {}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if parsed.json:
        print(json.dumps(_plain(model, paths, found, times), indent=2, ensure_ascii=False))
        return 0
    console = Console()
    if model.about.name:
        console.print(Text(model.about.name, style="bold"))
    if paths:
        console.print(_table(paths, found))
    for size, ms in times.items():
        what = "one image at a time" if size == 1 else f"batches of {size}"
        console.print(f"{what}: {ms:.3g} ms per image", highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m uniq_jax.predict",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="the network's file")
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="*", help="file or directory")
    parser.add_argument("--top", type=_positive, default=5, help="classes of each image; 5")
    parser.add_argument(
        "--batch_size", type=_positive, default=32, help="images of one call, at most; 32"
    )
    parser.add_argument("--benchmark", action="store_true", help="also say how long an image takes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 on")
    return int(text)


def _predict(
    model: Model, paths: Sequence[Path], top: int, batch_size: int
) -> list[list[Prediction]]:
    found: list[list[Prediction]] = []
    # A batch at a time, so that any number of images fits in memory.
    for start in range(0, len(paths), batch_size):
        images = [read_image(path, model) for path in paths[start : start + batch_size]]
        logits = model.logits(np.stack(images), batch_size=batch_size)
        found += [model.predictions(row, top) for row in logits]
    return found


def _benchmark(model: Model, batch_size: int) -> dict[int, float]:
    """Milliseconds of an image, by the size of the batch: the median of calls."""
    times = {}
    for size in [model.batch] if model.batch else sorted({1, batch_size}):
        images = model.about.normalize(np.zeros((size, *model.image_shape), np.uint8))
        model.call(images)  # Compiles.
        seconds: list[float] = []
        while len(seconds) < _CALLS and sum(seconds) < _TIMING_S:
            start = time.perf_counter()
            model.call(images)
            seconds.append(time.perf_counter() - start)
        times[size] = 1e3 * statistics.median(seconds) / size
    return times


def _table(paths: Sequence[Path], found: Sequence[Sequence[Prediction]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for path, predictions in zip(paths, found):
        for rank, prediction in enumerate(predictions):
            name = "" if rank else str(path)
            style = "" if rank else "bold"
            share = f"{100 * prediction.probability:.2f}%"
            table.add_row(Text(name), Text(prediction.label, style), Text(share, style))
    return table


def _plain(
    model: Model,
    paths: Sequence[Path],
    found: Sequence[Sequence[Prediction]],
    times: dict[int, float],
) -> dict[str, Any]:
    """What was found, for JSON."""
    images = [
        {"image": str(path), "predictions": [dataclasses.asdict(p) for p in predictions]}
        for path, predictions in zip(paths, found)
    ]
    more = {"ms_per_image": {str(size): ms for size, ms in times.items()}} if times else {}
    return {"model": model.about.name, "images": images, **more}


if __name__ == "__main__":
    sys.exit(main())
