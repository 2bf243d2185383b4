"""Products of an input's last axes with a kernel's first, by `lax.dot_general`, as of matrices."""

import math

import numpy as np

from uniq_jax.deploy.graph import Node


def is_conv(node: Node) -> bool:
    """Whether a product is a convolution."""
    return "window_strides" in dict(node.attributes)


def summed_axes(node: Node) -> int:
    """How many of the input's last axes, and of the kernel's first, a product sums over."""
    return len(node["dimension_numbers"][0][1])


def flat(node: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a product's input with the axes that are summed over as one."""
    count = summed_axes(node)
    return (*shape[:-count], math.prod(shape[-count:]))


def matrix(node: Node, kernel: np.ndarray) -> np.ndarray:
    """A kernel, one (height, width, in, out) of a convolution too, as (summed over, out)."""
    count = 3 if is_conv(node) else summed_axes(node)
    return kernel.reshape(math.prod(kernel.shape[:count]), -1)


def columns(node: Node, shape: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    """Values that broadcast against a product, as one for each column of its kernel's matrix.

    Args:
      node: the product.
      shape: of its kernel.
      values: with axes of length 1 in front of the kernel's others, if any.
    """
    outputs = shape[3 if is_conv(node) else summed_axes(node) :]
    return np.broadcast_to(values.reshape(values.shape[-len(outputs) :]), outputs).reshape(-1)
