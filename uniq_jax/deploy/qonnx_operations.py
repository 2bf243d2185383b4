"""A frozen network's operations as ONNX's and QONNX's."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from uniq_jax.deploy import integers
from uniq_jax.deploy.channels_first import ChannelsFirst
from uniq_jax.deploy.digits import kernel_digits
from uniq_jax.deploy.graph import Node
from uniq_jax.deploy.matrices import columns, flat, is_conv, matrix, summed_axes
from uniq_jax.deploy.onnx_builder import onnx
from uniq_jax.deploy.qonnx_builder import QONNX, Builder
from uniq_jax.deploy.uniform import uniform_step
from uniq_jax.nn.levels import EXACT

_LOWEST = np.finfo(np.float32).min

_SIMPLE: Mapping[str, str] = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "neg": "Neg",
    "abs": "Abs",
    "exp": "Exp",
    "tanh": "Tanh",
    "logistic": "Sigmoid",
    "sqrt": "Sqrt",
    "floor": "Floor",
}

# Codes are from 0, and round as they do in training.
_UNSIGNED = {"signed": 0, "narrow": 0, "rounding_mode": "ROUND"}


def model(network: ChannelsFirst, batch: int, *, levels: bool) -> Any:
    """The network as an `onnx.ModelProto`; arguments as of `export_qonnx`.

    Outputs of quantizers have their node's name, with "_values" behind it where they are no levels.
    """
    writer = _Writer(network, batch, levels)
    for node in network.graph.nodes:
        writer.names[node.name] = writer.write(node)
    writer.add("Identity", [writer.names[network.graph.output]], "logits")
    return writer.builder.model("logits")


class _Writer:
    def __init__(self, network: ChannelsFirst, batch: int, levels: bool):
        self.network = network
        self.batch = batch
        self.levels = levels
        self.by_name = {node.name: node for node in network.graph.nodes}
        self.users = network.graph.users()
        self.builder = Builder((batch, *network.graph.image_shape))
        self.constant = self.builder.constant
        self.names = {"input": "images"}
        # Of quantizers: what a level counts for in their outputs.
        self.units: dict[str, np.float32] = {}

    def write(self, node: Node) -> str:
        """Writes a node whose inputs are written; the name of its output."""
        special = getattr(self, f"_{node.operation}", None)
        if special is not None:
            return special(node)
        if node.operation not in _SIMPLE:
            raise NotImplementedError(
                f"QONNX has no form for the operation {node.operation!r} ({node.name})"
            )
        inputs = [self._input(node, i) for i in range(len(node.inputs))]
        return self.add(_SIMPLE[node.operation], inputs, node.name)

    def add(
        self,
        operation: str,
        inputs: list[str],
        name: str,
        shape: tuple[int, ...] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds an operation; without a shape it is that of the node of its name, or its input's."""
        if shape is None:
            known = self.network.shapes.get(name)
            shape = self._shape(inputs[0]) if known is None else (self.batch, *known[1:])
        return self.builder.add(operation, inputs, name, shape, domain, **attributes)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of what an operation gives."""
        return self.builder.shapes[name]

    def _input(self, node: Node, index: int = 0) -> str:
        name = node.inputs[index]
        if name in self.names:
            return self.names[name]
        return self.constant(self.network.arrays[name], name)

    def _array(self, node: Node, index: int) -> np.ndarray:
        return self.network.arrays[node.inputs[index]]

    def _max(self, node: Node) -> str:
        array = self.network.arrays.get(node.inputs[1])
        if array is not None and array.ndim == 0:
            if array <= _LOWEST:
                # It keeps compilers from joining two operations; here each is run by itself.
                return self._input(node)
            if array == 0:
                return self.add("Relu", [self._input(node)], node.name)
        return self.add("Max", [self._input(node), self._input(node, 1)], node.name)

    def _prelu(self, node: Node) -> str:
        rank = len(self.network.shapes[node.name])
        slope = self._array(node, 1).reshape(-1, *[1] * (rank - 2))
        inputs = [self._input(node), self.constant(slope, f"{node.name}_slope")]
        return self.add("PRelu", inputs, node.name)

    def _convert_element_type(self, node: Node) -> str:
        if node["new_dtype"] != "float32":
            raise NotImplementedError(f"QONNX has no numbers of {node['new_dtype']} ({node.name})")
        return self._input(node)

    def _decode(self, node: Node) -> str:
        unit = self.units[node.inputs[0]]
        if unit == 1:
            return self._input(node)
        return self.add(
            "Div", [self._input(node), self.constant(unit, f"{node.name}_unit")], node.name
        )

    def _pad(self, node: Node) -> str:
        low, high, _ = zip(*node["padding_config"])
        if not any((*low, *high)):
            return self._input(node)
        pads = self.constant((*low, *high), f"{node.name}_pads", np.int64)
        return self.add("Pad", [self._input(node), pads, self._input(node, 1)], node.name)

    def _slice(self, node: Node) -> str:
        rank = len(node["start_indices"])
        stop = [n if isinstance(n, int) else n[1] * self.batch for n in node["limit_indices"]]
        bounds = (node["start_indices"], stop, range(rank), node["strides"] or (1,) * rank)
        return self._cut(self._input(node), bounds, node.name)

    def _cut(self, x: str, bounds: Any, name: str, shape: tuple[int, ...] | None = None) -> str:
        """A slice: starts, ends, axes, strides."""
        inputs = [self.constant([*b], f"{name}_bounds{i}", np.int64) for i, b in enumerate(bounds)]
        return self.add("Slice", [x, *inputs], name, shape)

    def _reshape(self, node: Node) -> str:
        sizes = (self.batch, *self.network.shapes[node.name][1:])
        return self._shaped(self._input(node), sizes, node.name)

    def _transpose(self, node: Node) -> str:
        return self.add("Transpose", [self._input(node)], node.name, perm=node["permutation"])

    def _reduce_window_max(self, node: Node) -> str:
        return self.add(
            "MaxPool",
            [self._input(node)],
            node.name,
            kernel_shape=node["window_dimensions"][2:],
            strides=node["window_strides"][2:],
            pads=[pad[side] for side in (0, 1) for pad in node["padding"][2:]],
        )

    def _concatenate(self, node: Node) -> str:
        inputs = [self._input(node, i) for i in range(len(node.inputs))]
        return self.add("Concat", inputs, node.name, axis=node["dimension"])

    def _reduce_sum(self, node: Node) -> str:
        axes = self.constant(node["axes"], f"{node.name}_axes", np.int64)
        return self.add("ReduceSum", [self._input(node), axes], node.name, keepdims=0)

    def _reduce_max(self, node: Node) -> str:
        return self.add("ReduceMax", [self._input(node)], node.name, axes=node["axes"], keepdims=0)

    def _mean_pixels(self, node: Node) -> str:
        total = self._input(node)
        shape = list(self._shape(total))
        if not self.levels:
            return self.add("ReduceMean", [total], node.name, axes=[2, 3], keepdims=0)
        scale = self.constant(1 / math.prod(shape[2:]), f"{node.name}_scale")
        # Rows from the top, then columns from the left, as the network has it.
        for axis in (2, 3):
            count, shape[axis] = shape[axis], 1
            size = tuple(shape)
            parts = [
                self._cut(total, ([i], [i + 1], [axis], [1]), f"{node.name}_{axis}_{i}", size)
                for i in range(count)
            ]
            total = parts[0]
            for i, part in enumerate(parts[1:], 1):
                total = self.add("Add", [total, part], f"{node.name}_sum{axis}_{i}", size)
        total = self._shaped(total, tuple(shape[:2]), f"{node.name}_flat")
        return self.add("Mul", [total, scale], node.name)

    def _conv_general_dilated(self, node: Node) -> str:
        return self._multiplied(node, self._input(node, 1), node.name)

    def _dot_general(self, node: Node) -> str:
        if node.inputs[1] not in self.network.arrays:
            return self.add("MatMul", [self._input(node), self._input(node, 1)], node.name)
        kernel = matrix(node, self._array(node, 1))
        return self._multiplied(node, self.constant(kernel, node.inputs[1]), node.name)

    def _matrix_product(self, node: Node, kernel: str, name: str) -> str:
        """A node's product with this matrix, between two changes of shape where it needs them."""
        x, shape = self._input(node), (self.batch, *self.network.shapes[node.name][1:])
        count = summed_axes(node)
        if count > 1:
            x = self._shaped(x, flat(node, self._shape(x)), f"{name}_flat")
        if self._array(node, 1).ndim == count + 1:
            return self.add("MatMul", [x, kernel], name, shape)
        sums = (*self._shape(x)[:-1], matrix(node, self._array(node, 1)).shape[1])
        made = self.add("MatMul", [x, kernel], f"{name}_columns", sums)
        return self._shaped(made, shape, name)

    def _shaped(self, x: str, shape: tuple[int, ...], name: str) -> str:
        sizes = self.constant(shape, f"{name}_shape", np.int64)
        return self.add("Reshape", [x, sizes], name, shape)

    def _multiplied(self, node: Node, kernel: str, name: str) -> str:
        """A node's convolution, or matrix product, with this kernel."""
        if not is_conv(node):
            return self._matrix_product(node, kernel, name)
        shape = (self.batch, *self.network.shapes[node.name][1:])
        return self.add(
            "Conv",
            [self._input(node), kernel],
            name,
            shape,
            kernel_shape=self._array(node, 1).shape[2:],
            strides=node["window_strides"],
            dilations=node["rhs_dilation"],
            pads=[pad[side] for side in (0, 1) for pad in node["padding"]],
            group=node["feature_group_count"],
        )

    def _integer_product(self, node: Node) -> str:
        bits, offset = node["weight"]
        half = offset != int(offset)
        form = integers.form(bits, offset)
        kernel = self._array(node, 1) if is_conv(node) else matrix(node, self._array(node, 1))
        kernel = kernel.astype(np.float32) * form.factor + form.shift
        codes = (kernel + (2**bits - 1)) / 2 if half else kernel + offset
        if self.levels and node["largest_sum"] >= EXACT:
            return self._digit_product(node, codes)
        # Of a kernel's level, and of its code, in what the convolution sees.
        unit = np.float32(1) if self.levels else self._kernel_unit(node)
        step = unit * np.float32(2 if half else 1)
        kernel = self._kernel(f"{node.name}_kernel", codes, step, offset, bits)
        return self._multiplied(node, kernel, node.name)

    def _digit_product(self, node: Node, codes: np.ndarray) -> str:
        """A product of levels whose sums leave float32's integers: of the kernel's digits.

        Their sums are added as int32, and rounded to float32 once, as the frozen network has it.
        """
        total, shape = "", (self.batch, *self.network.shapes[node.name][1:])
        digits = kernel_digits(codes, node["weight"], node["largest_sum"])
        for i, (place, values) in enumerate(digits):
            name, bits = f"{node.name}_digit{i}", int(np.abs(values).max()).bit_length() + 1
            offset = 2 ** (bits - 1)
            digit_codes = values.astype(np.int32) + offset
            kernel = self._kernel(f"{name}_kernel", digit_codes, np.float32(1), offset, bits)
            part = self._multiplied(node, kernel, name)
            part = self.add("Cast", [part], f"{name}_whole", shape, to=onnx.TensorProto.INT32)
            place = self.constant(place, f"{name}_place", np.int32)
            part = self.add("Mul", [part, place], f"{name}_placed", shape)
            total = self.add("Add", [total, part], f"{name}_sum", shape) if total else part
        return self.add("Cast", [total], node.name, to=onnx.TensorProto.FLOAT)

    def _kernel(self, name: str, codes: np.ndarray, step: Any, offset: float, bits: int) -> str:
        """A kernel of codes."""
        values = ((codes - np.float32(offset)) * step).astype(np.float32)
        inputs = [
            self.constant(values, f"{name}_values"),
            self.constant(step, f"{name}_scale"),
            self.constant(offset, f"{name}_zeropt"),
            self.constant(bits, f"{name}_bits"),
        ]
        return self.add("IntQuant", inputs, name, values.shape, QONNX, **_UNSIGNED)

    def _kernel_unit(self, node: Node) -> np.ndarray:
        """What a kernel's level counts for, where the product is to be rescaled already."""
        (user,) = self.users[node.name]
        scale = self._array(user, 1) / self.units[node.inputs[0]]
        if scale.size == 1:
            return scale.reshape(())
        # The channels of a kernel are first, those of a matrix last.
        if is_conv(node):
            return scale.reshape(-1, 1, 1, 1)
        return columns(node, self._array(node, 1).shape, scale)[None]

    def _rescale(self, node: Node) -> str:
        if not self.levels:
            return self._input(node)
        return self.add("Mul", [self._input(node), self._input(node, 1)], node.name)

    def _encode(self, node: Node) -> str:
        x, limits, (bits, offset) = self._input(node), self._array(node, 1), node["grid"]
        if node["negate"]:
            x = self.add("Neg", [x], f"{node.name}_negative")
        step = None if self.levels else uniform_step(limits, offset)
        self.units[node.name] = np.float32(1)
        if step is None:
            return self._thresholds(node, x, limits[None])
        self.units[node.name] = step if offset == int(offset) else step / np.float32(2)
        inputs = [
            x,
            self.constant(step, f"{node.name}_scale"),
            self.constant(offset, f"{node.name}_zeropt"),
            self.constant(bits, f"{node.name}_bits"),
        ]
        name, shape = f"{node.name}_values", self._shape(x)
        return self.add("IntQuant", inputs, name, shape, QONNX, **_UNSIGNED)

    def _encode_sums(self, node: Node) -> str:
        product = self.by_name[node.inputs[0]]
        if product["largest_sum"] >= EXACT:
            raise NotImplementedError(
                f"QONNX has float32 sums, and those of {product.name} ({node.layer}) may be "
                f"{product['largest_sum']}, above 2**24"
            )
        self.units[node.name] = np.float32(1)
        x, signs = self._input(node), self._array(node, 2)
        if np.any(signs < 0):
            rank = len(self.network.shapes[product.name])
            signs = self.constant(signs.reshape(1, -1, *[1] * (rank - 2)), f"{node.name}_signs")
            x = self.add("Mul", [x, signs], f"{node.name}_signed")
        return self._thresholds(node, x, self._array(node, 1).T)

    def _thresholds(self, node: Node, x: str, limits: np.ndarray) -> str:
        """The levels of codes: how many limits, (1 or channels, n), a number reaches."""
        bits, offset = node["grid"]
        half = offset != int(offset)
        kind = "BIPOLAR" if half and bits == 1 else f"INT{bits + 1}" if offset else f"UINT{bits}"
        return self.add(
            "MultiThreshold",
            [x, self.constant(limits, f"{node.name}_limits")],
            node.name,
            self._shape(x),
            QONNX,
            out_dtype=kind,
            out_scale=2.0 if half else 1.0,
            out_bias=-float(2**bits - 1 if half else offset),
        )
