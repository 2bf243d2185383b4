"""The layers that the networks are made of, with the constants of both papers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# PyTorch's initialization of residual networks: a normal of variance 2 / fan_out.
_he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def convolution(
    in_features: int,
    features: int,
    size: int,
    stride: int,
    padding: int | None = None,
    **options: Any,
) -> nnx.Conv:
    """A square convolution without bias, padded alike on both sides, by size // 2 if not given."""
    padding = size // 2 if padding is None else padding
    return nnx.Conv(
        in_features,
        features,
        (size, size),
        strides=(stride, stride),
        # Not "SAME", which pads unevenly where the stride is 2, and PyTorch's networks do not.
        padding=((padding, padding),) * 2,
        use_bias=False,
        kernel_init=_he_fan_out,
        **options,
    )


def check_image_size(images: jax.Array, size: int) -> None:
    """Raises a ValueError unless images, (…, height, width, channels), are squares of this size."""
    if images.shape[-3:-1] != (size, size):
        raise ValueError(
            f"images of {'x'.join(map(str, images.shape[-3:-1]))} pixels must be of image_size "
            f"(={size}) squared, which the model was created with"
        )


def batch_norm(features: int, **options: Any) -> nnx.BatchNorm:
    """Batch norm that keeps nine tenths of its running statistics in a step."""
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, **options)


def dense(in_features: int, features: int, **options: Any) -> nnx.Linear:
    """A fully connected layer, with bias unless `use_bias` says otherwise."""
    return nnx.Linear(in_features, features, **options)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of every 3x3 window, two apart, padded alike on both sides."""
    padding = [(0, 0), (1, 1), (1, 1), (0, 0)]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def cifar_stages(
    block: Callable[..., nnx.Module], depth: int, width: int, **options: Any
) -> list[nnx.List]:
    """Three stages of (depth − 2) / 6 blocks; the second and third halve the image."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"depth (={depth}) must be 6n + 2 with n at least 1: 8, 14, 20, 32, 44, 56"
        )
    return _stages(block, [(depth - 2) // 6] * 3, width, width, **options)


_IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def imagenet_stages(block: Any, depth: int, width: int, **options: Any) -> list[nnx.List]:
    """Four stages, as many blocks each as `depth` says; all but the first halve the image."""
    return _stages(block, _IMAGENET_BLOCKS[depth], width, width * block.expansion, **options)


def _stages(
    block: Callable[..., nnx.Module],
    counts: Sequence[int],
    in_features: int,
    features: int,
    **options: Any,
) -> list[nnx.List]:
    """Stages of `counts` blocks; each has twice the channels and half the image of the last."""
    built = []
    for stage, count in enumerate(counts):
        blocks = nnx.List([])
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(block(in_features, features, stride, **options))
            in_features = features
        built.append(blocks)
        features *= 2
    return built
