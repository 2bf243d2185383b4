"""The layers that the networks are made of, with the constants of both papers."""

from collections.abc import Callable
from typing import Any

from flax import nnx

# PyTorch's initialization of residual networks: a normal of variance 2 / fan_out.
_he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def convolution(
    in_features: int, features: int, size: int, stride: int, **options: Any
) -> nnx.Conv:
    """A square convolution without bias, padded alike on both sides by size // 2."""
    return nnx.Conv(
        in_features,
        features,
        (size, size),
        strides=(stride, stride),
        # Not "SAME", which pads unevenly where the stride is 2, and PyTorch's networks do not.
        padding=[(size // 2, size // 2)] * 2,
        use_bias=False,
        kernel_init=_he_fan_out,
        **options,
    )


def batch_norm(features: int, **options: Any) -> nnx.BatchNorm:
    """Batch norm that keeps nine tenths of its running statistics in a step."""
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, **options)


def dense(in_features: int, features: int, **options: Any) -> nnx.Linear:
    """A fully connected layer with bias."""
    return nnx.Linear(in_features, features, **options)


def stages(
    block: Callable[..., nnx.Module], depth: int, width: int, **options: Any
) -> list[nnx.List]:
    """Three stages of (depth − 2) / 6 blocks; the second and third halve the image."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"depth (={depth}) must be 6n + 2 with n at least 1: 8, 14, 20, 32, 44, 56"
        )
    built, in_features = [], width
    for stage in range(3):
        features, blocks = width * 2**stage, nnx.List([])
        for i in range((depth - 2) // 6):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(block(in_features, features, stride, **options))
            in_features = features
        built.append(blocks)
    return built
