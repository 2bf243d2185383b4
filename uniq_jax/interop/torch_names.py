"""PyTorch's names and layouts, translated."""

from collections.abc import Mapping

import numpy as np


def from_torch_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames and transposes a PyTorch state dict to the paths and layouts of this package.

    "layer1.0.conv1.weight" (out, in, height, width) becomes "layer1/0/conv1/kernel" (height, width,
    in, out), and likewise along one or three axes; a matrix is transposed; a vector called weight
    is a batch norm's "scale". Counters (`num_batches_tracked`) have no counterpart and are dropped.

    Args:
      state_dict: name to array.
    """
    translated = {}
    for name, value in state_dict.items():
        *module, last = name.removeprefix("module.").split(".")
        if last == "num_batches_tracked":
            continue
        if value.ndim >= 2:
            value = value.transpose(*range(2, value.ndim), 1, 0)
        if last == "weight":
            last = "scale" if value.ndim == 1 else "kernel"
        translated["/".join([*module, last.removeprefix("running_")])] = value
    return translated
