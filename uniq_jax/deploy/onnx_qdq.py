"""The form of quantize and dequantize nodes, with images as (batch, channels, height, width).

A layer is QuantizeLinear → DequantizeLinear → Conv with a dequantized int8 kernel, which OpenVINO
runs as an int8 convolution with int32 sums. In the exact form every scale is 1, so that the
convolution gives the integer sums themselves, and the frozen network's float32 operations follow,
each kept from its neighbours by a maximum that changes no number: compilers would else join a
product with the sum behind it. In the fast form scales and biases are folded (`onnx_fold`).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from uniq_jax.deploy import integers, matrices
from uniq_jax.deploy.graph import Node
from uniq_jax.deploy.matrices import is_conv
from uniq_jax.deploy.onnx_emitter import Codes, Emit, Emitter, code_name
from uniq_jax.deploy.onnx_levels import (
    FEW,
    FEW_EVEN,
    arithmetic,
    decode,
    encode_input,
    kernel,
    kernel_codes,
    level_product,
    put_even,
    put_guessed,
    rescaled,
    signed_sums,
)
from uniq_jax.deploy.onnx_operations import (
    FLOAT,
    OPERATIONS,
    elementwise,
    multiplied,
    product_layout,
    scale_in_kernel,
    turned,
)
from uniq_jax.deploy.uniform import uniform_step
from uniq_jax.nn.levels import EXACT

# What may stand behind a rounded product or sum without being joined with it.
_APART = ("max", "min", "encode", "encode_sums", "mean_pixels", "reduce_window_max")


def _guarded(emitter: Emitter, node: Node, value: str) -> str:
    """A rounded value that nothing is joined with, in the exact form."""
    users = emitter.users.get(node.name, ())
    return value if all(user.operation in _APART for user in users) else emitter.apart(value)


def _rounded(emitter: Emitter, node: Node) -> None:
    elementwise(emitter, node)
    layout = emitter.layout(node.name)
    emitter.put(node.name, _guarded(emitter, node, emitter.read(node.name)), layout)


def _rescale(emitter: Emitter, node: Node) -> None:
    value = _guarded(emitter, node, rescaled(emitter, node))
    emitter.put(node.name, value, emitter.layout(node.inputs[0]))


def _encode(emitter: Emitter, node: Node) -> None:
    """Codes of floats, by the thresholds of the whole layer."""
    x, layout = encode_input(emitter, node)
    thresholds = emitter.arrays[node.inputs[1]]
    step = uniform_step(thresholds, node["grid"][1])
    if step is not None and not emitter.is_exact:
        _put_rounded(emitter, node, x, float(step), layout)
    elif step is not None and thresholds.size > FEW_EVEN:
        put_even(emitter, node, x, step, layout)
    elif thresholds.size > FEW:
        put_guessed(emitter, node, x, thresholds, layout)
    else:
        _put_counted(emitter, node, x, thresholds[:, None], layout)


def _count(emitter: Emitter, node: Node) -> None:
    """Codes of floats, by the thresholds of every channel."""
    x, thresholds = emitter.read(node.inputs[0]), emitter.arrays[node.inputs[1]]
    _put_counted(emitter, node, x, thresholds, emitter.layout(node.inputs[0]))


def _encode_sums(emitter: Emitter, node: Node) -> None:
    """Codes of integer sums, by the thresholds of every channel."""
    sums, thresholds = signed_sums(emitter, node)
    if thresholds.dtype == np.float32 and np.max(np.abs(thresholds)) < EXACT / 4:
        # Half-way between two sums, where the last bit of a sum does not matter.
        thresholds = thresholds - np.float32(0.5)
    _put_counted(emitter, node, sums, thresholds, emitter.layout(node.inputs[0]))


def _put_counted(emitter: Emitter, node: Node, x: str, thresholds: np.ndarray, layout: str) -> None:
    """The number of thresholds (n, channels or 1) that x reaches, each a comparison."""
    reached = []
    for row in thresholds:
        # x >= t, in the form that OpenVINO joins with the convolution in front.
        below = row - 1 if row.dtype == np.int32 else np.nextafter(row, np.float32(-np.inf))
        above = emitter.make("Greater", x, emitter.laid(below, node.inputs[0], layout))
        reached.append(emitter.make("Cast", above, to=FLOAT))
    total = reached[0]
    for one in reached[1:-1]:
        total = emitter.make("Add", total, one)
    name = code_name(node.name, layout)
    if len(reached) > 1:
        total = emitter.make("Add", total, reached[-1], name=name)
    else:
        emitter.make.rename(name)
    emitter.put_codes(node, Codes(name, True, node["grid"]), layout)


def _put_rounded(emitter: Emitter, node: Node, x: str, step: float, layout: str) -> None:
    """Codes of evenly spaced thresholds, by rounding."""
    bits, offset = node["grid"]
    largest, make, name = 2**bits - 1, emitter.make, code_name(node.name, layout)
    if offset == 0 and bits <= 7:
        x = make("Clip", x, emitter.constant(0), emitter.constant(largest * step))
        parameters = emitter.constant(step), make.constant(np.uint8(0))
        make("QuantizeLinear", x, *parameters, name=name)
        emitter.put_codes(node, Codes(name, False, node["grid"], step), layout)
        return
    x = make("Add", make("Mul", x, emitter.constant(1 / step)), emitter.constant(offset))
    x = make("Clip", make("Round", x), emitter.constant(0), emitter.constant(largest), name=name)
    emitter.put_codes(node, Codes(name, True, node["grid"]), layout)


def _integer_product(emitter: Emitter, node: Node) -> None:
    """A product of codes: in int8 where both fit, else of float32 levels."""
    kind = arithmetic(node["activation"], node["weight"])
    scale = scale_in_kernel(emitter, node)
    if not emitter.is_exact and _is_wide_conv(node):
        _wide_conv(emitter, node, scale)
        return
    if not kind.is_int8:
        level_product(emitter, node, scale)
        if node.name not in emitter.int32:
            # Or else the scale behind would be joined with the kernel, whose levels are exact.
            sums = _guarded(emitter, node, emitter.read(node.name))
            emitter.put(node.name, sums, product_layout(node))
        return
    make, layout = emitter.make, product_layout(node)
    step = emitter.codes[node.inputs[0]].step
    zero = make.constant(np.uint8(kind.zero))
    x = _unsigned(emitter, node.inputs[0], kind.factor, layout)
    if is_conv(node) and emitter.arrays[node.inputs[1]].shape[:2] == (1, 1):
        x, node = _strided(emitter, node, x)
    x = make("DequantizeLinear", x, emitter.constant(step), zero)
    weight = kernel(emitter, node, turned(node, kernel_codes(emitter, node)))
    scale = (scale.astype(np.float64) / step).astype(np.float32)
    if scale.size > 1:
        scale = matrices.columns(node, emitter.arrays[node.inputs[1]].shape, scale)
    scale = make.constant(scale.reshape(()) if scale.size == 1 else scale)
    weight = make("DequantizeLinear", weight, scale, axis=0 if is_conv(node) else 1)
    sums = multiplied(emitter, node, x, weight)
    if len(emitter.users.get(node.name, ())) > 1:
        # OpenVINO gives one user's scale to all of them.
        sums = emitter.apart(sums)
    emitter.put(node.name, sums, layout)


def _is_wide_conv(node: Node) -> bool:
    """Whether a convolution has 8-bit codes on both sides."""
    widths = node["activation"][0], node["weight"][0]
    return is_conv(node) and node["feature_group_count"] == 1 and widths == (8, 8)


def _wide_conv(emitter: Emitter, node: Node, scale: np.ndarray) -> None:
    """An int8 convolution of operands that are no levels (`uniq_jax.deploy.products`).

    What their shifts come to is added: a sum of the input's window, which is a convolution of one
    channel, and a constant image, whose borders see fewer pixels. Processors without VNNI
    instructions would round such sums, so that the exact form multiplies floats instead.
    """
    first, second = (integers.form(*node[name]) for name in ("activation", "weight"))
    make, layout = emitter.make, product_layout(node)
    operands = turned(node, emitter.arrays[node.inputs[1]])
    scale = scale.reshape(-1).astype(np.float64)
    x = _signed(emitter, node.inputs[0], first, layout)

    def multiplied_with(kernel: np.ndarray, factor: np.ndarray) -> str:
        factors = np.broadcast_to(factor, kernel.shape[:1]).astype(np.float32)
        weight = make("DequantizeLinear", make.constant(kernel), make.constant(factors), axis=0)
        return multiplied(emitter, node, x, weight)

    sums = multiplied_with(operands, first.factor * second.factor * scale)
    if second.shift:
        windows = multiplied_with(np.ones_like(operands[:1]), np.ones(1))
        factor = (first.factor * second.shift * scale).astype(np.float32)
        factor = emitter.laid(factor, node.name, layout)
        sums = make("Add", sums, make("Mul", windows, factor))
    if first.shift:
        levels = operands.astype(np.float32) * second.factor + second.shift
        seen = emitter.shapes[node.inputs[0]][1:3]
        constant = _sums_of_kernel(node, levels, seen) * (first.shift * scale)
        sums = make("Add", sums, emitter.laid(constant.astype(np.float32), node.name, layout))
    emitter.put(node.name, sums, layout)


def _signed(emitter: Emitter, source: str, form: integers.Form, layout: str) -> str:
    """The int8 operands of a quantizer's float32 codes, dequantized to themselves."""
    make, zero = emitter.make, emitter.make.constant(np.int8(0))
    # OpenVINO takes the convolution for a float one where a transposition stands in between.
    value = emitter.transposed(emitter.codes[source].name, emitter.layout(source), layout)
    value = make("Add", value, emitter.constant(form.code_shift))
    value = make("QuantizeLinear", value, emitter.constant(1), zero)
    return make("DequantizeLinear", value, emitter.constant(1), zero)


def _sums_of_kernel(node: Node, kernel: np.ndarray, seen: tuple[int, ...]) -> np.ndarray:
    """The sum of the kernel (out, in, height, width) over the pixels that are in the image.

    Returns:
      (height, width, out).
    """
    kernel = kernel.sum(1).transpose(1, 2, 0).astype(np.float64)
    for axis, size in enumerate(seen):
        low, high = node["padding"][axis]
        stride, dilation = node["window_strides"][axis], node["rhs_dilation"][axis]
        taps = np.arange(kernel.shape[axis]) * dilation
        count = (size + low + high - taps[-1] - 1) // stride + 1
        places = np.arange(count)[:, None] * stride - low + taps
        is_inside = ((places >= 0) & (places < size)).astype(np.float64)
        kernel = np.moveaxis(np.tensordot(is_inside, kernel, (1, axis)), 0, axis)
    return kernel


def _strided(emitter: Emitter, node: Node, x: str) -> tuple[str, Node]:
    """The pixels that a 1x1 convolution with strides sees, and the convolution without them.

    OpenVINO would skip them in front of the quantizer, and then take the convolution for a float
    one.
    """
    strides = node["window_strides"]
    if all(n == 1 for n in strides) or any(n for ends in node["padding"] for n in ends):
        return x, node
    height, width = emitter.shapes[node.inputs[0]][1:3]
    ranges = (0, 0), (height, width), (2, 3), strides
    x = emitter.make("Slice", x, *(emitter.make.integers(*values) for values in ranges))
    attributes = {**dict(node.attributes), "window_strides": (1,) * len(strides)}
    return x, dataclasses.replace(node, attributes=tuple(attributes.items()))


def _unsigned(emitter: Emitter, source: str, factor: int, layout: str) -> str:
    """The uint8 operands `factor * code` of a quantizer."""
    codes, make = emitter.codes[source], emitter.make
    value = codes.name
    if codes.is_float:
        if factor != 1:
            value = make("Mul", value, emitter.constant(factor))
        value = make("QuantizeLinear", value, emitter.constant(1), make.constant(np.uint8(0)))
    return emitter.transposed(value, emitter.layout(source), layout)


QDQ: Mapping[str, Emit] = {
    **OPERATIONS,
    **dict.fromkeys(("add", "sub", "mul", "div"), _rounded),
    "rescale": _rescale,
    "encode": _encode,
    "count": _count,
    "encode_sums": _encode_sums,
    "decode": decode,
    "integer_product": _integer_product,
}
