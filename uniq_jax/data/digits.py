"""The digits that scikit-learn carries: 1797 grey 8x8 images, no download."""

from typing import Any

import numpy as np

TEST_IMAGES_PER_CLASS = 36
_SPLIT_SEED = 0


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The fixed split of the digits: 36 test images of each class (360), the rest is train.

    Each image draws a 64-bit key from PCG64 with seed 0; in the order of the keys, the first 36
    of a class are test. Raw output of a bit generator never changes between NumPy versions, which
    the shuffling methods of `np.random.Generator` do not promise.

    Args:
        labels: int (N,).

    Returns:
        "train" and "test", each int64 indices in the order of the keys, so that a sub-split such
        as "train[:90%]" is a random one.
    """
    order = np.argsort(np.random.PCG64(_SPLIT_SEED).random_raw(len(labels)), kind="stable")
    rank_in_class = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank_in_class[members] = np.arange(len(members))
    is_test = rank_in_class[order] < TEST_IMAGES_PER_CLASS
    return {"train": order[~is_test], "test": order[is_test]}


def read_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both splits of the digits.

    Returns:
        "train" (1437) and "test" (360), each `(images, labels)`: uint8 (N, 8, 8, 1), the values
        0 .. 16 scaled to 0 .. 255 and rounded, and int32 (N,).
    """
    from sklearn.datasets import load_digits  # a second to import, and few need it

    raw: Any = load_digits()
    images = np.round(raw["images"] * (255 / 16)).astype(np.uint8)[..., None]
    labels = raw["target"].astype(np.int32)
    return {name: (images[ids], labels[ids]) for name, ids in split_indices(labels).items()}
