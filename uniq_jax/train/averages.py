"""What is evaluated in place of the trained arrays: averages over steps, and over batches."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from uniq_jax.train.network import Arrays, join, split
from uniq_jax.train.state import Program


def batch_statistics(
    program: Program, params: Arrays, statistics: Arrays, batch: Mapping[str, jax.Array]
) -> Arrays:
    """The mean and variance that every batch norm has for one batch, by path.

    Args:
      program: static.
      params: as in the state.
      statistics: as in the state; what batch norms keep there does not count.
      batch: "image", as of a step.
    """
    model: Any = program.build(params, statistics)
    model.train()
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0
    model(program.normalize(batch["image"]))
    _, found = split(model)
    kinds = program.network.variables.items()
    return {join(path): found[join(path)] for path, kind in kinds if kind is nnx.BatchStat}


def pooled(statistics: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Mean and variance over all batches together, from those of each.

    `mean = E[mean_b]` and `var = E[var_b] + Var[mean_b]`: exact for batches of one size, while the
    running ones of training lag behind the weights, and leave the second part out.

    Args:
      statistics: of each batch: "PATH/mean" and "PATH/var".

    Returns:
      The same paths, float64.

    Example:
      >>> from uniq_jax.train.averages import pooled
      >>> found = pooled([{"bn/mean": [1.0], "bn/var": [2.0]}, {"bn/mean": [3.0], "bn/var": [4.0]}])
      >>> found["bn/mean"].tolist(), found["bn/var"].tolist()
      ([2.0], [4.0])

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (arXiv:2105.07576), section 3.
    """
    batches = list(statistics)
    stacked = {
        path: np.stack([np.asarray(b[path], np.float64) for b in batches]) for path in batches[0]
    }
    result = {path: values.mean(0) for path, values in stacked.items()}
    for path in result:
        if path.endswith("var"):
            result[path] += stacked[f"{path.removesuffix('var')}mean"].var(0)
    return result
