"""Gradients of a large batch, cut into microbatches that go through the network one by one.

What does not depend on other examples is as without the cut: the mean of the microbatches' mean
gradients is that of the batch. What does depend on them sees a microbatch, as in a training with
batches of that size:

- A batch norm normalizes by the mean and variance of the microbatch, and moves its running ones
  once for each of them, so `count` times in a step.
- The gradient of a learned activation step is scaled by 1/sqrt(N·n), where N are the elements of
  the microbatch: UniQ's and LSQ's are sqrt(count) times as large as with the whole batch.

Mixup's partners and its share are those of the whole batch. Each microbatch ends with a sum of
gradients over the devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def cut(batch: Any, count: int) -> Any:
    """Cuts each array of a batch into microbatches: the i-th has every count-th example from i on.

    Neighbours go to different microbatches. So each device's part of a batch, a run of neighbours,
    is cut where it lies, and every microbatch is spread over the same devices.

    Args:
      batch: a tree of arrays (batch, ...), the batch a multiple of `count`.
      count: of microbatches.

    Returns:
      The same tree of arrays (count, batch / count, ...).

    Example:
      >>> import jax.numpy as jnp
      >>> from uniq_jax.train.accumulation import cut
      >>> cut(jnp.arange(6), 2).tolist()
      [[0, 2, 4], [1, 3, 5]]
    """
    return jax.tree.map(
        lambda array: array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1), batch
    )


def accumulate(
    gradients: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
    params: Any,
    statistics: Any,
    batch: Any,
    count: int,
) -> tuple[Any, Any, Any]:
    """Mean gradients of microbatches, of which one at a time has its activations in memory.

    Args:
      gradients: of parameters, running statistics and a microbatch; gives a tree of gradients like
        `params`, the next statistics, and a tree of metrics.
      params: floats, the same for every microbatch.
      statistics: before the first microbatch; every later one meets what the one before it left.
      batch: a tree of arrays (batch, ...), the batch a multiple of `count`.
      count: of microbatches; 1 takes the batch as it is.

    Returns:
      The mean gradients, the statistics after the last microbatch, and the mean metrics.
    """
    if count == 1:
        return gradients(params, statistics, batch)

    def one_more(carried: tuple[Any, Any], microbatch: Any) -> tuple[tuple[Any, Any], Any]:
        sums, statistics = carried
        found, statistics, metrics = gradients(params, statistics, microbatch)
        return (jax.tree.map(jnp.add, sums, found), statistics), metrics

    start = jax.tree.map(jnp.zeros_like, params), statistics
    (sums, statistics), metrics = jax.lax.scan(one_more, start, cut(batch, count))
    means = jax.tree.map(lambda total: total / count, sums)
    return means, statistics, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)
