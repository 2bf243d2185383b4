"""Products of a graph's nodes: of floats, and of codes in integer arithmetic.

Operands of the latter are int8 (`uniq_jax.deploy.integers.Form`) with int32 sums. With an input
`a = f·a' + g` and a kernel `b = h·b' + k`, both of int8 a' and b', the sum of products is

    fh·Σa'b' + fk·Σa' + gh·Σb' + gk·Σ1,

where only 8-bit grids have shifts g and k.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from uniq_jax.deploy import integers, popcount
from uniq_jax.deploy.graph import Node

_MATRICES = (((1,), (0,)), ((), ()))

# XLA:CPU's int8 convolution takes several times as long as a matrix product of windows where the
# input has few channels, a tenth more where images are small, and 50 times as long where they are
# smaller than windows. Elsewhere it is the faster one.
_FEW_CHANNELS = 16
_FEW_PIXELS = 14 * 14


def multiply(node: Node, x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """The bilinear map of a node that has the attributes of a convolution or a dot product.

    Products of floats are of float32 on every device: GPUs and TPUs would round the factors to ten
    or to seven bits, and that changes codes and classes.
    """
    precision = lax.Precision.HIGHEST if jnp.issubdtype(x.dtype, jnp.floating) else None
    if not _is_convolution(node):
        return lax.dot_general(
            x, kernel, node["dimension_numbers"], precision, preferred_element_type=dtype
        )
    return lax.conv_general_dilated(
        x,
        kernel,
        node["window_strides"],
        node["padding"],
        node["lhs_dilation"],
        node["rhs_dilation"],
        _numbers(node),
        node["feature_group_count"],
        node["batch_group_count"],
        precision=precision,
        preferred_element_type=dtype,
    )


def integer_product(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product of levels, int32, from their int8 operands.

    Args:
      node: with the attributes `activation` and `weight`, each (bits, offset) of a grid.
      x: int8, whose first axis is the batch; what is padded is the level 0.
      kernel: int8.
    """
    first, second = (integers.form(*node[name]) for name in ("activation", "weight"))
    is_plain = _is_convolution(node) and _is_plain(node)
    if node["activation"] == (1, 0.0) and node["weight"] == (1, 0.5):
        if is_plain and node["feature_group_count"] == 1:
            geometry = node["window_strides"], node["padding"], node["rhs_dilation"]
            return popcount.convolve(x, kernel, *geometry)
        if _is_of_matrices(node, kernel):
            return popcount.multiply(x, kernel)
    ones_shape = (1, *x.shape[1:])
    if first.zero and is_plain:
        # The operand of level 0 is padded, instead of a 0: the shift is the same everywhere then,
        # and an image as large as one window tells what it comes to.
        spans = _spans(node, kernel)
        x = lax.pad(x, jnp.int8(first.zero), _pad_config(node))
        node = _replaced(node, padding=((0, 0), (0, 0)))
        ones_shape = (1, *spans, x.shape[-1])
    total = first.factor * second.factor * _product(node, x, kernel)
    if second.shift:
        total = total + first.factor * second.shift * _sums_of_inputs(node, x, kernel)
    if first.shift:
        # At once where the kernel is known: the compiler would take minutes to fold it. Where it is
        # an argument, the form of its product is that of the platform which is compiled for.
        is_known = not isinstance(kernel, Tracer)
        with jax.ensure_compile_time_eval() if is_known else contextlib.nullcontext():
            ones = jnp.ones(ones_shape, jnp.int8)
            constant = first.shift * second.factor * _product(node, ones, kernel)
            if second.shift:
                shifts = first.shift * second.shift
                constant = constant + shifts * _sums_of_inputs(node, ones, kernel)
        total = total + constant
    return total


def _is_of_matrices(node: Node, kernel: jax.Array) -> bool:
    """Whether a product has one row of outputs for each of inputs; kernels may have more axes."""
    is_one = not _is_convolution(node) and kernel.ndim == 2
    return is_one and node["dimension_numbers"] == _MATRICES


def _is_convolution(node: Node) -> bool:
    return "window_strides" in dict(node.attributes)


def _numbers(node: Node) -> lax.ConvDimensionNumbers:
    return lax.ConvDimensionNumbers(*node["dimension_numbers"])


def _is_plain(node: Node) -> bool:
    """Whether a convolution is of NHWC images and HWIO kernels, without transposition."""
    plain = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC"))
    return (
        _numbers(node) == plain
        and node["batch_group_count"] == 1
        and tuple(node["lhs_dilation"]) == (1, 1)
    )


def _replaced(node: Node, **attributes: Any) -> Node:
    changed = tuple((dict(node.attributes) | attributes).items())
    return dataclasses.replace(node, attributes=changed)


def _spans(node: Node, kernel: jax.Array) -> tuple[int, ...]:
    """How many pixels a plain convolution's window reaches over."""
    return tuple((n - 1) * d + 1 for n, d in zip(kernel.shape[:2], node["rhs_dilation"]))


def _pad_config(node: Node) -> list[tuple[int, int, int]]:
    return [(0, 0, 0), *((low, high, 0) for low, high in node["padding"]), (0, 0, 0)]


def _product(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Σa'b', int32."""
    if not (_is_convolution(node) and _is_plain(node)):
        return multiply(node, x, kernel, jnp.int32)
    inputs, outputs = kernel.shape[2:]
    convolve = functools.partial(multiply, node, dtype=jnp.int32)
    of_windows = functools.partial(_product_of_windows, node)
    if inputs == 1 and outputs == node["feature_group_count"] > 1:
        on_cpu = on_gpu = functools.partial(_depthwise, node)
    else:
        on_cpu = of_windows if _is_for_windows(node, x, kernel) else convolve
        on_gpu = of_windows  # XLA:GPU has no convolution with int32 results.
    # XLA:TPU convolves int8, and its compiler fails on some strided parts of it, as windows have.
    return lax.platform_dependent(x, kernel, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=convolve)


def _product_of_windows(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A plain convolution as the matrix product of its windows, int32; one for each group."""
    groups, inputs, outputs = node["feature_group_count"], *kernel.shape[2:]
    windows = _windows(node, x, kernel)
    if groups == 1:
        rows = windows.reshape(-1, windows.shape[-1])
        matrix = kernel.reshape(-1, outputs)
        sums = lax.dot_general(rows, matrix, _MATRICES, preferred_element_type=jnp.int32)
    else:
        taps = kernel.shape[0] * kernel.shape[1]
        rows = windows.reshape(-1, taps, groups, inputs)
        matrices = kernel.reshape(taps, inputs, groups, -1)
        sums = jnp.einsum("rtgi,tigo->rgo", rows, matrices, preferred_element_type=jnp.int32)
    return sums.reshape(*windows.shape[:-1], outputs)


def _is_for_windows(node: Node, x: jax.Array, kernel: jax.Array) -> bool:
    """Whether a CPU is faster with the matrix product of windows of a plain convolution."""
    height, width, inputs, _ = kernel.shape
    if height == width == 1 or inputs <= _FEW_CHANNELS:
        return True
    sizes = _output_sizes(node, _padded_sizes(node, x), kernel)
    return sizes[0] * sizes[1] <= _FEW_PIXELS


def _padded_sizes(node: Node, x: jax.Array) -> list[int]:
    return [n + low + high for n, (low, high) in zip(x.shape[1:3], node["padding"])]


def _output_sizes(node: Node, padded: Iterable[int], kernel: jax.Array) -> list[int]:
    spans = _spans(node, kernel)
    return [(n - s) // t + 1 for n, s, t in zip(padded, spans, node["window_strides"])]


def _taps(node: Node, x: jax.Array, kernel: jax.Array, axis: int) -> list[jax.Array]:
    """What the kernel's pixels along its axis 0 or 1 meet in a padded image."""
    size = _output_sizes(node, x.shape[1:3], kernel)[axis]
    stride, dilation = node["window_strides"][axis], node["rhs_dilation"][axis]
    starts = [i * dilation for i in range(kernel.shape[axis])]
    span = (size - 1) * stride + 1
    return [lax.slice_in_dim(x, s, s + span, stride, axis=axis + 1) for s in starts]


def _padded(node: Node, x: jax.Array) -> jax.Array:
    return lax.pad(x, jnp.zeros((), x.dtype), _pad_config(node))


def _windows(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The window of every pixel of the output: (batch, height, width, taps · inputs).

    Gathered along one axis, then along the other, which takes fewer copies than pixel by pixel.
    """
    rows = jnp.concatenate(_taps(node, _padded(node, x), kernel, 1), -1)
    # `rows` has the output's width: only its height is still that of the padded image.
    return jnp.concatenate(_taps(node, rows, kernel, 0), -1)


def _depthwise(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution of each channel by itself, tap by tap: XLA:CPU's own takes 20 times as long."""
    total = jnp.zeros((), jnp.int32)
    for i, rows in enumerate(_taps(node, _padded(node, x.astype(jnp.int32)), kernel, 0)):
        for j, tap in enumerate(_taps(node, rows, kernel, 1)):
            total = total + tap * kernel[i, j, 0].astype(jnp.int32)
    return total


def _sums_of_inputs(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Σa', int32, such that it broadcasts against the product."""
    if not _is_convolution(node):
        if _is_of_matrices(node, kernel):
            return jnp.sum(x, -1, dtype=jnp.int32, keepdims=True)
        return multiply(node, x, jnp.ones_like(kernel), jnp.int32)
    if not _is_plain(node):
        return multiply(node, x, jnp.ones_like(kernel), jnp.int32)
    groups = node["feature_group_count"]
    sums = jnp.sum(x.reshape(*x.shape[:3], groups, -1), -1, dtype=jnp.int32)
    for axis in (1, 2):  # Windows are rectangles: along one axis, then along the other.
        window, strides, dilation = [1] * 4, [1] * 4, [1] * 4
        window[axis] = kernel.shape[axis - 1]
        strides[axis] = node["window_strides"][axis - 1]
        dilation[axis] = node["rhs_dilation"][axis - 1]
        padding = [(0, 0)] * 4
        padding[axis] = node["padding"][axis - 1]
        sums = lax.reduce_window(
            sums, 0, lax.add, window, strides, padding, window_dilation=dilation
        )
    return jnp.repeat(sums, kernel.shape[3] // groups, axis=3) if groups > 1 else sums
