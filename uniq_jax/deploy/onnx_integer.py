"""The form of integer matrix products, with images as (batch, height, width, channels).

A layer gathers the window of every pixel (Pad, Slice, Concat) as uint8 and multiplies it with the
int8 kernel by ONNX Runtime's MatMulIntegerToFloat, which rounds `sum * scale` once. Every float32
operation of the frozen network is kept, in its order; ONNX Runtime runs each alone, but for factors
behind convolutions of floats, which a Max keeps apart. Thresholds are comparisons, or a formula
that is proved to have their codes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from uniq_jax.deploy import matrices
from uniq_jax.deploy.graph import Node
from uniq_jax.deploy.matrices import is_conv
from uniq_jax.deploy.onnx_arithmetic import integer_line, line, quotient
from uniq_jax.deploy.onnx_builder import MICROSOFT
from uniq_jax.deploy.onnx_emitter import NHWC, Codes, Emit, Emitter, code_name
from uniq_jax.deploy.onnx_levels import (
    FEW,
    FEW_EVEN,
    Arithmetic,
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
    INT8,
    INT32,
    LOWEST,
    OPERATIONS,
    UINT8,
    conv_attributes,
    flat,
    limit,
    maximum,
    shaped,
    turned,
)
from uniq_jax.deploy.uniform import uniform_step
from uniq_jax.nn import levels
from uniq_jax.quantizers import Grid


def _maximum(emitter: Emitter, node: Node) -> None:
    """The larger number; what only keeps operations apart has nothing to keep apart here."""
    if limit(emitter, node) == LOWEST:
        value = next(name for name in node.inputs if name not in emitter.arrays)
        emitter.put(node.name, emitter.read(value), emitter.layout(value))
        return
    maximum(emitter, node)


def _rescale(emitter: Emitter, node: Node) -> None:
    name = node.inputs[0]
    layout = emitter.layout(name)
    if _follower(emitter, name) is node:
        emitter.put(node.name, emitter.read(name), layout)
        return
    if name not in emitter.int32:
        # ONNX Runtime would multiply a convolution's kernel with the factor, and round it there.
        apart = emitter.make("Max", emitter.read(name), emitter.make.constant(LOWEST))
        emitter.put(name, apart, layout)
    emitter.put(node.name, rescaled(emitter, node), layout)


def _follower(emitter: Emitter, product: str) -> Node | None:
    """The node whose factor an integer product applies itself: the only one that sees its sums."""
    users = emitter.users.get(product, ())
    node = emitter.by_name[product]
    if len(users) != 1 or not _is_matrix(node) or node["largest_sum"] >= levels.EXACT:
        return None
    if users[0].operation == "encode_sums":
        return users[0] if _line(emitter, users[0]) is not None else None
    return users[0] if users[0].operation == "rescale" else None


def _is_matrix(node: Node) -> bool:
    """Whether a product is one of uint8 with an int8 matrix here."""
    if node.operation != "integer_product":
        return False
    groups = node["feature_group_count"] if is_conv(node) else 1
    return groups == 1 and arithmetic(node["activation"], node["weight"]).is_int8


def _line(emitter: Emitter, node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Factors and summands that take sums to codes, if there are any."""
    product = emitter.by_name[node.inputs[0]]
    if product["largest_sum"] >= levels.EXACT:
        return None
    limits, signs = (emitter.arrays[name] for name in node.inputs[1:])
    return line(limits, signs, product["largest_sum"])


def _encode(emitter: Emitter, node: Node) -> None:
    """Codes of floats, by the thresholds of the whole layer."""
    x, layout = encode_input(emitter, node)
    thresholds = emitter.arrays[node.inputs[1]]
    offset = node["grid"][1]
    found = quotient(thresholds) if offset == 0 and thresholds.size <= FEW else None
    step = uniform_step(thresholds, offset)
    if found is not None:
        factor, step = found
        if factor != 1:
            x = emitter.make("Mul", x, emitter.make.constant(factor))
        _put_quantized(emitter, node, x, step, layout)
    elif step is not None and thresholds.size > FEW_EVEN:
        put_even(emitter, node, x, step, layout)
    elif thresholds.size > FEW:
        put_guessed(emitter, node, x, thresholds, layout)
    else:
        _put_counted(emitter, node, x, thresholds[:, None], layout)


def _encode_sums(emitter: Emitter, node: Node) -> None:
    """Codes of integer sums, by the thresholds of every channel."""
    name, make = node.inputs[0], emitter.make
    layout = emitter.layout(name)
    if name in emitter.quantized:
        _put_clipped(emitter, node, emitter.read(name), layout)
        return
    found = _line(emitter, node)
    if found is None:
        sums, thresholds = signed_sums(emitter, node)
        _put_counted(emitter, node, sums, thresholds, layout)
        return
    x = emitter.read(name)
    if _follower(emitter, name) is not node:
        factor, summand = (emitter.laid(array, name, layout) for array in found)
        x = make("Add", make("Mul", x, factor), summand)
    _put_quantized(emitter, node, x, np.float32(1), layout)


def _put_counted(emitter: Emitter, node: Node, x: str, thresholds: np.ndarray, layout: str) -> None:
    """The number of thresholds (n, channels or 1) that x reaches."""
    total, make = "", emitter.make
    for row in thresholds:
        above = make("GreaterOrEqual", x, emitter.laid(row, node.inputs[0], layout))
        one = make("Cast", above, to=UINT8)
        total = make("Add", total, one) if total else one
    make.rename(code_name(node.name, layout))
    _put(emitter, node, layout)


def _put_quantized(emitter: Emitter, node: Node, x: str, step: np.float32, layout: str) -> None:
    """The rounded quotient of x and a step, from 0 to the largest code."""
    zero = emitter.make.constant(np.uint8(0))
    x = emitter.make("QuantizeLinear", x, emitter.make.constant(step), zero)
    _put_clipped(emitter, node, x, layout)


def _put_clipped(emitter: Emitter, node: Node, x: str, layout: str) -> None:
    """Codes of uint8 numbers that may be above the largest code."""
    ends = [emitter.make.constant(np.uint8(n)) for n in (0, 2 ** node["grid"][0] - 1)]
    emitter.make("Clip", x, *ends, name=code_name(node.name, layout))
    _put(emitter, node, layout)


def _put(emitter: Emitter, node: Node, layout: str) -> None:
    codes = Codes(code_name(node.name, layout), False, node["grid"])
    emitter.put_codes(node, codes, layout)


def _integer_product(emitter: Emitter, node: Node) -> None:
    """A product of codes: in int8 where both fit, else, and in groups, of float32 levels."""
    kind = arithmetic(node["activation"], node["weight"])
    if kind.is_int8 and is_conv(node) and _put_codes_at_once(emitter, node, kind):
        return
    if not _is_matrix(node):
        level_product(emitter, node, np.ones(1))
        return
    make = emitter.make
    value = _unsigned(emitter, node, kind.factor)
    value = _windows(emitter, node, value, kind) if is_conv(node) else flat(emitter, node, value)
    weight = kernel(emitter, node, matrices.matrix(node, kernel_codes(emitter, node)))
    zero = make.constant(np.uint8(kind.zero))
    zeros = (zero,) if kind.zero else ()
    if node["largest_sum"] >= levels.EXACT:
        made = make("MatMulInteger", value, weight, *zeros)
        emitter.int32.add(node.name)
    else:
        scale, *summand = _factor(emitter, node)
        tail = (zero, "", make.constant(summand[0])) if summand else zeros
        inputs = value, weight, emitter.constant(1), make.constant(scale), *tail
        made = make("MatMulIntegerToFloat", *inputs, domain=MICROSOFT)
    emitter.put(node.name, made if is_conv(node) else shaped(emitter, node, made), NHWC)


def _unsigned(emitter: Emitter, node: Node, factor: int) -> str:
    """The uint8 operands `factor * code` of a product's input."""
    source = node.inputs[0]
    codes = emitter.codes[source]
    value = emitter.make("Cast", codes.name, to=UINT8) if codes.is_float else codes.name
    if factor != 1:
        value = emitter.make("Mul", value, emitter.make.constant(np.uint8(factor)))
    return emitter.transposed(value, emitter.layout(source), NHWC)


def _put_codes_at_once(emitter: Emitter, node: Node, kind: Arithmetic) -> bool:
    """QLinearConv, which sums and quantizes, if its arithmetic has the codes behind a product.

    It adds an integer to each sum and scales it once. Kernel and input are multiplied with small
    integers for that to be fine enough.
    """
    users = emitter.users.get(node.name, ())
    if len(users) != 1 or users[0].operation != "encode_sums" or _line(emitter, users[0]) is None:
        return False
    largest = kind.factor * (2 ** node["activation"][0] - 1)
    level = levels.largest_level(Grid(*node["weight"]))
    limits, signs = (emitter.arrays[name] for name in users[0].inputs[1:])
    for stretch in (1, 2, 4, 8):
        room = min(127 // level, (2**15 - 1) // (2 * stretch * largest * level))
        if stretch * largest > 255 or room < 1:
            break
        found = integer_line(limits, signs, node["largest_sum"], room, stretch)
        if found is not None:
            _quantized_conv(emitter, node, kind, stretch, *found)
            return True
    return False


def _quantized_conv(
    emitter: Emitter,
    node: Node,
    kind: Arithmetic,
    stretch: int,
    factors: np.ndarray,
    summands: np.ndarray,
    scales: np.ndarray,
) -> None:
    """QLinearConv with the factors of its channels in the kernel."""
    make, one = emitter.make, emitter.constant(1)
    weight = make(
        "Cast", kernel(emitter, node, turned(node, kernel_codes(emitter, node))), to=INT32
    )
    weight = make("Mul", weight, make.constant(factors.reshape(-1, 1, 1, 1)))
    weight = make("Cast", weight, to=INT8)
    made = make(
        "QLinearConv",
        _unsigned(emitter, node, kind.factor * stretch),
        one,
        make.constant(np.uint8(kind.zero * stretch)),
        weight,
        make.constant(scales),
        make.constant(np.zeros(scales.shape, np.int8)),
        one,
        make.constant(np.uint8(0)),
        make.constant(summands),
        domain=MICROSOFT,
        channels_last=1,
        **conv_attributes(node),
    )
    emitter.put(node.name, made, NHWC)
    emitter.quantized.add(node.name)


def _factor(emitter: Emitter, node: Node) -> tuple[Any, ...]:
    """What a product multiplies its sums with, and maybe adds."""
    follower = _follower(emitter, node.name)
    if follower is None:
        return (np.float32(1),)
    shape = emitter.arrays[node.inputs[1]].shape
    if follower.operation == "rescale":
        scale = emitter.arrays[follower.inputs[1]]
        return (scale.reshape(()) if scale.size == 1 else matrices.columns(node, shape, scale),)
    found = _line(emitter, follower)
    assert found is not None
    return tuple(matrices.columns(node, shape, array) for array in found)


def _windows(emitter: Emitter, node: Node, x: str, kind: Arithmetic) -> str:
    """The window of every pixel of the output, as (batch, height, width, taps · channels)."""
    make = emitter.make
    attributes = conv_attributes(node)
    (top, left, bottom, right), strides = attributes["pads"], attributes["strides"]
    if any(attributes["pads"]):
        pads = make.integers(0, top, left, 0, 0, bottom, right, 0)
        x = make("Pad", x, pads, make.constant(np.uint8(kind.zero)))
    size = emitter.arrays[node.inputs[1]].shape[:2]
    output = emitter.shapes[node.name][1:3]
    taps = []
    for i in range(size[0]):
        for j in range(size[1]):
            starts = [n * step for n, step in zip((i, j), attributes["dilations"])]
            spans = [(count - 1) * stride + 1 for count, stride in zip(output, strides)]
            ends = [start + span for start, span in zip(starts, spans)]
            ranges = (starts, ends, (1, 2), strides)
            taps.append(make("Slice", x, *(make.integers(*values) for values in ranges)))
    return taps[0] if len(taps) == 1 else make("Concat", *taps, axis=3)


INTEGER: Mapping[str, Emit] = {
    **OPERATIONS,
    "max": _maximum,
    "rescale": _rescale,
    "encode": _encode,
    "encode_sums": _encode_sums,
    "decode": decode,
    "integer_product": _integer_product,
}
