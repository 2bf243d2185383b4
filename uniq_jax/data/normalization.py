"""Per-channel mean and standard deviation of the training images, for normalizing inputs."""

import numpy as np

# Over all pixels of the train split, in units where 255 is 1.
_KNOWN: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3053,), (0.3758,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def statistics(name: str, images: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, for `(image / 255 - mean) / std`.

    The usual published constants for the sets named here, whatever `images` holds, so that
    networks trained elsewhere fit; otherwise computed from `images`.

    Args:
        name: A data set's name, as given to `load`; a configuration or version is ignored.
        images: uint8 (N, H, W, C) of the train split, needed for other sets.

    Returns:
        `(mean, std)`, each float32 (C,). A computed `std` is at least 1/255, so that a constant
        channel is no division by zero.

    Raises:
        ValueError: If the set has no constants and `images` is missing, empty or not uint8.

    Example:
        >>> mean, std = statistics("mnist")
        >>> print(mean, std)
        [0.1307] [0.3081]
    """
    constants = _KNOWN.get(name.partition(":")[0].partition("/")[0])
    if constants is not None:
        mean, std = constants
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if images is None:
        raise ValueError(
            f"name={name!r} has no constants (only {sorted(_KNOWN)} have): pass images="
        )
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(
            "images must be uint8 (N, H, W, C) and not empty, "
            f"got {images.dtype} {images.shape} for name={name!r}"
        )
    # Counting the 256 values is exact and needs no copy of the images in floating point.
    values = np.arange(256) / 255
    moments = []
    for channel in range(images.shape[-1]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), 1024):
            block = images[start : start + 1024, ..., channel]
            counts += np.bincount(block.ravel(), minlength=256)
        mean = counts @ values / counts.sum()
        moments.append((mean, np.sqrt(counts @ (values - mean) ** 2 / counts.sum())))
    mean, std = np.asarray(moments).T
    return mean.astype(np.float32), np.maximum(std, 1 / 255).astype(np.float32)
