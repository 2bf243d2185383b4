"""ONNX nodes of float operations, which are the same in every form of a file."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from uniq_jax.deploy import matrices
from uniq_jax.deploy.graph import Node
from uniq_jax.deploy.matrices import is_conv
from uniq_jax.deploy.onnx_builder import Builder, onnx
from uniq_jax.deploy.onnx_emitter import NCHW, NHWC, Emit, Emitter

FLOAT = onnx.TensorProto.FLOAT
INT8 = onnx.TensorProto.INT8
INT32 = onnx.TensorProto.INT32
UINT8 = onnx.TensorProto.UINT8

LOWEST = np.finfo(np.float32).min

_TYPES = {"float32": FLOAT, "int32": INT32, "bool": onnx.TensorProto.BOOL}

_SAME = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "neg": "Neg", "abs": "Abs"},
    **{"sign": "Sign", "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid"},
    **{"sqrt": "Sqrt", "erf": "Erf", "floor": "Floor", "round_even": "Round", "min": "Min"},
    **{"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"},
    **{"eq": "Equal", "and": "And", "or": "Or", "not": "Not"},
}

_TWO: Mapping[str, Callable[[Builder, Node, list[str]], str]] = {
    "rsqrt": lambda make, node, x: make("Reciprocal", make("Sqrt", *x)),
    "square": lambda make, node, x: make("Mul", x[0], x[0]),
    "ne": lambda make, node, x: make("Not", make("Equal", *x)),
    "select_n": lambda make, node, x: make("Where", x[0], x[2], x[1]),
    "integer_pow": lambda make, node, x: make("Pow", x[0], make.constant(np.float32(node["y"]))),
}


def elementwise(emitter: Emitter, node: Node) -> None:
    """One operation on numbers."""
    layout = emitter.common(node)
    made = emitter.make(_SAME[node.operation], *emitter.operands(node, layout))
    emitter.put(node.name, made, layout)


def composed(emitter: Emitter, node: Node) -> None:
    """An operation on numbers that ONNX has as two, or under another order of inputs."""
    layout = emitter.common(node)
    made = _TWO[node.operation](emitter.make, node, emitter.operands(node, layout))
    emitter.put(node.name, made, layout)


def limit(emitter: Emitter, node: Node) -> float | None:
    """The one number that a maximum is taken with, or None."""
    numbers = [emitter.arrays[n] for n in node.inputs if n in emitter.arrays]
    if node.operation != "max" or not numbers or numbers[0].size != 1:
        return None
    return float(numbers[0].reshape(()))


def maximum(emitter: Emitter, node: Node) -> None:
    """The larger number; Relu where one is zero."""
    layout = emitter.common(node)
    if limit(emitter, node) == 0:
        value = next(name for name in node.inputs if name not in emitter.arrays)
        made = emitter.make("Relu", emitter.read(value, layout))
    else:
        made = emitter.make("Max", *emitter.operands(node, layout))
    emitter.put(node.name, made, layout)


def _prelu(emitter: Emitter, node: Node) -> None:
    layout = emitter.common(node)
    slope = emitter.arrays[node.inputs[1]].reshape(-1)
    slope = slope.reshape(1, -1, 1, 1) if layout == NCHW else slope
    value = emitter.read(node.inputs[0], layout)
    emitter.put(node.name, emitter.make("PRelu", value, emitter.make.constant(slope)), layout)


def _convert(emitter: Emitter, node: Node) -> None:
    kind = _TYPES.get(str(node["new_dtype"]))
    if kind is None:
        raise emitter.unsupported(node, f"dtype {node['new_dtype']}")
    layout = emitter.common(node)
    emitter.put(node.name, emitter.make("Cast", emitter.read(node.inputs[0]), to=kind), layout)


def _reshape(emitter: Emitter, node: Node) -> None:
    sizes = [n if isinstance(n, int) else -1 for n in node["new_sizes"]]
    value = emitter.read(node.inputs[0], NHWC)
    made = emitter.make("Reshape", value, emitter.make.integers(*sizes))
    emitter.put(node.name, made, NHWC)


def _squeeze(emitter: Emitter, node: Node) -> None:
    value = emitter.read(node.inputs[0], NHWC)
    made = emitter.make("Squeeze", value, emitter.make.integers(*node["dimensions"]))
    emitter.put(node.name, made, NHWC)


def _transpose(emitter: Emitter, node: Node) -> None:
    value = emitter.read(node.inputs[0], NHWC)
    emitter.put(node.name, emitter.make("Transpose", value, perm=node["permutation"]), NHWC)


def _slice(emitter: Emitter, node: Node) -> None:
    """Slice, along the axes that it shortens."""
    name, layout = node.inputs[0], emitter.common(node)
    steps = node["strides"] or (1,) * len(node["start_indices"])
    parts = []
    for i, size in enumerate(emitter.shapes[name]):
        start, end = node["start_indices"][i], node["limit_indices"][i]
        if isinstance(end, int) and (start, end, steps[i]) != (0, size, 1):
            parts.append((start, end, emitter.axis(name, i, layout), steps[i]))
    value = emitter.read(name, layout)
    if parts:
        ranges = [emitter.make.integers(*values) for values in zip(*parts)]
        value = emitter.make("Slice", value, *ranges)
    emitter.put(node.name, value, layout)


def _pad(emitter: Emitter, node: Node) -> None:
    name, layout = node.inputs[0], emitter.common(node)
    config = node["padding_config"]
    if any(low < 0 or high < 0 or inner for low, high, inner in config):
        raise emitter.unsupported(node, f"padding {config}")
    value = emitter.read(name, layout)
    if any(low or high for low, high, _ in config):
        pads = [0] * (2 * len(config))
        for i, (low, high, _) in enumerate(config):
            place = emitter.axis(name, i, layout)
            pads[place], pads[place + len(config)] = low, high
        fill = emitter.make.constant(emitter.arrays[node.inputs[1]])
        value = emitter.make("Pad", value, emitter.make.integers(*pads), fill)
    emitter.put(node.name, value, layout)


def _concatenate(emitter: Emitter, node: Node) -> None:
    layout = emitter.common(node)
    axis = emitter.axis(node.name, node["dimension"], layout)
    made = emitter.make("Concat", *emitter.operands(node, layout), axis=axis)
    emitter.put(node.name, made, layout)


def _reduce(emitter: Emitter, node: Node) -> None:
    value, axes = emitter.read(node.inputs[0], NHWC), node["axes"]
    if node.operation == "reduce_sum":
        made = emitter.make("ReduceSum", value, emitter.make.integers(*axes), keepdims=0)
    else:
        made = emitter.make("ReduceMax", value, axes=axes, keepdims=0)
    emitter.put(node.name, made, NHWC)


def _max_pool(emitter: Emitter, node: Node) -> None:
    padding = node["padding"]
    made = emitter.make(
        "MaxPool",
        emitter.read(node.inputs[0], NCHW),
        kernel_shape=node["window_dimensions"][1:3],
        strides=node["window_strides"][1:3],
        pads=[padding[i][side] for side in (0, 1) for i in (1, 2)],
    )
    emitter.put(node.name, made, NCHW)


def _mean_pixels(emitter: Emitter, node: Node) -> None:
    """The mean over pixels; in the exact form in the order of `uniq_jax.exact.exact_mean`."""
    name = node.inputs[0]
    layout, value, make = emitter.layout(name), emitter.read(name), emitter.make
    places = [emitter.axis(name, axis, layout) for axis in (1, 2)]
    if not emitter.is_exact:
        emitter.put(node.name, make("ReduceMean", value, axes=places, keepdims=0))
        return
    _, height, width, channels = emitter.shapes[name]
    for place, count in zip(places, (height, width)):
        first, *others = make.split(value, count, place)
        value = first
        for other in others:
            value = make("Add", value, other)
    value = make("Reshape", value, make.integers(-1, channels))
    emitter.put(node.name, make("Mul", value, emitter.constant(1 / (height * width))))


# Products


def product_layout(node: Node) -> str:
    """The layout of images that ONNX multiplies."""
    return NCHW if is_conv(node) else NHWC


def turned(node: Node, kernel: np.ndarray) -> np.ndarray:
    """A kernel with the axes of ONNX: (out, in, height, width), or (in, out) of a matrix."""
    return kernel.transpose(3, 2, 0, 1) if is_conv(node) else matrices.matrix(node, kernel)


def multiplied(emitter: Emitter, node: Node, x: str, kernel: str) -> str:
    """Conv or MatMul of a tensor in ONNX's layout and a kernel of `turned`."""
    if is_conv(node):
        return emitter.make("Conv", x, kernel, **conv_attributes(node))
    return shaped(emitter, node, emitter.make("MatMul", flat(emitter, node, x), kernel))


def flat(emitter: Emitter, node: Node, x: str) -> str:
    """The input of a matrix product with the axes that are summed over as one."""
    if matrices.summed_axes(node) == 1:
        return x
    _, *sizes = matrices.flat(node, emitter.shapes[node.inputs[0]])
    return emitter.make("Reshape", x, emitter.make.integers(-1, *sizes))


def shaped(emitter: Emitter, node: Node, sums: str) -> str:
    """What a matrix product gives with all axes that a kernel has behind those summed over."""
    if emitter.arrays[node.inputs[1]].ndim == matrices.summed_axes(node) + 1:
        return sums
    _, *sizes = emitter.shapes[node.name]
    return emitter.make("Reshape", sums, emitter.make.integers(-1, *sizes))


def conv_attributes(node: Node) -> dict[str, Any]:
    """Those of Conv."""
    return {
        "strides": node["window_strides"],
        "dilations": node["rhs_dilation"],
        "group": node["feature_group_count"],
        "pads": [ends[side] for side in (0, 1) for ends in node["padding"]],
    }


def scale_in_kernel(emitter: Emitter, node: Node) -> np.ndarray:
    """The scale of the affine node that alone sees a product: the kernel is to have it; else 1."""
    users = emitter.users.get(node.name, ())
    if len(users) != 1 or users[0].operation != "affine":
        return np.ones(1, np.float32)
    emitter.in_kernels.add(users[0].name)
    return emitter.arrays[users[0].inputs[1]]


def _product(emitter: Emitter, node: Node) -> None:
    """A product of floats, whose sums no two runtimes take in the same order."""
    name, kernel = node.inputs
    if kernel not in emitter.arrays:
        raise emitter.unsupported(node, "two inputs that are no constants")
    layout = product_layout(node)
    scaled = turned(node, emitter.arrays[kernel] * scale_in_kernel(emitter, node))
    x = emitter.read(name, layout)
    made = multiplied(emitter, node, x, emitter.make.constant(scaled))
    emitter.put(node.name, made, layout)


def affine(emitter: Emitter, node: Node) -> None:
    """The folded scale and shift of `uniq_jax.deploy.onnx_fold`."""
    layout = emitter.layout(node.inputs[0])
    value = emitter.read(node.inputs[0])
    scale, shift = (emitter.arrays[name] for name in node.inputs[1:])
    if node.name not in emitter.in_kernels and np.any(scale != 1):
        value = emitter.make("Mul", value, emitter.laid(scale, node.name, layout))
    if np.any(shift):
        value = emitter.make("Add", value, emitter.laid(shift, node.name, layout))
    emitter.put(node.name, value, layout)


OPERATIONS: Mapping[str, Emit] = {
    **dict.fromkeys(_SAME, elementwise),
    **dict.fromkeys(_TWO, composed),
    "max": maximum,
    "prelu": _prelu,
    "convert_element_type": _convert,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "slice": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_window_max": _max_pool,
    "mean_pixels": _mean_pixels,
    "conv_general_dilated": _product,
    "dot_general": _product,
    "affine": affine,
}
