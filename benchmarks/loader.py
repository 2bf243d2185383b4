"""What a batch costs: made on its own, and waited for behind a step that takes its time.

python benchmarks/loader.py [TFDS_DIR]   # CIFAR-10 from there, else the digits
"""

import sys
import time

import numpy as np

from uniq_jax import data

_STEPS = 200
_STEP_MS = 20


def milliseconds(batches, step_ms: float) -> list[float]:
    """Time that each `next` takes when `step_ms` pass between two."""
    times = []
    for _ in range(_STEPS):
        time.sleep(step_ms / 1000)
        start = time.perf_counter()
        next(batches)
        times.append(1000 * (time.perf_counter() - start))
    return times[_STEPS // 10 :]


def main() -> None:
    """Prints a table."""
    directory = sys.argv[1] if len(sys.argv) > 1 else None
    train = data.load("cifar10" if directory else "digits", split="train", data_dir=directory)
    print(f"{train.name}, batches of 128, median ms (90th percentile) of {_STEPS}")
    for augment in data.AUGMENTATIONS:
        cells = []
        for prefetch, step_ms in ((0, 0), (8, _STEP_MS)):
            options = {"batch_size": 128, "seed": 0, "augment": augment, "prefetch": prefetch}
            with data.train_iterator(train, **options) as batches:
                low, high = np.percentile(milliseconds(batches, step_ms), [50, 90])
            cells.append(f"{low:.2f} ({high:.2f})")
        print(f"{augment:10} made {cells[0]:14} waited for behind a {_STEP_MS} ms step {cells[1]}")


if __name__ == "__main__":
    main()
