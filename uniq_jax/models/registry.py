"""Networks by name."""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from uniq_jax.models.cifar_preact_resnet import CifarPreactResNet
from uniq_jax.models.cifar_resnet import CifarResNet

MODELS: Mapping[str, Callable[..., nnx.Module]] = {
    **{
        f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56)
    },
    **{
        f"preact_resnet{depth}": functools.partial(CifarPreactResNet, depth)
        for depth in (8, 14, 20, 32, 44, 56)
    },
}


def create(name: str, *, num_classes: int, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """Builds a float network by name.

    Args:
      name: a key of `MODELS`.
      num_classes: logits.
      rngs: for the parameters.
      **options: further arguments of the network, `in_features` for example.

    Raises:
      ValueError: if there is no network of that name.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name (={name!r}) must be one of {', '.join(sorted(MODELS))}{hint}")
    return MODELS[name](num_classes=num_classes, rngs=rngs, **options)
