"""A frozen network's operations as OpenVINO's, its binary convolutions as BinaryConvolution.

Codes and sums are float32 numbers, integers all of them. BinaryConvolution multiplies ±1 by ±1:

    inputs {0, 1}, where bit b stands for 2b − 1:  sums = (result + Σ kernel) / 2
    inputs ±1:                                     sums = result

Padding has the code 0, the bit 0, in the first case, and is left out in the second.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from uniq_jax.deploy import integers
from uniq_jax.deploy.channels_first import ChannelsFirst
from uniq_jax.deploy.digits import kernel_digits
from uniq_jax.deploy.graph import Node
from uniq_jax.deploy.openvino_edges import bit_edges
from uniq_jax.deploy.openvino_values import (
    TINY,
    Value,
    apart,
    as_bits,
    bit_tensor,
    constant,
    count,
    even_code,
    level_of_code,
    levels,
    openvino,
    ops,
    rounded_sum,
    window,
)
from uniq_jax.deploy.uniform import uniform_step
from uniq_jax.nn.levels import EXACT

# Up to this many thresholds each has a comparison.
_FEW = 31

# Operations that are not joined with a sum or product in front of them.
_APART = ("max", "min", "encode", "encode_sums", "mean_pixels", "reduce_window_max")

# BinaryConvolution's sums are wrong where a pixel's bits do not fill bytes.
_CHANNELS = 8

_SIMPLE: Mapping[str, Callable[..., Value]] = {
    "add": ops.add,
    "sub": ops.subtract,
    "mul": ops.multiply,
    "div": ops.divide,
    "max": ops.maximum,
    "min": ops.minimum,
    "neg": ops.negative,
    "abs": ops.abs,
    "exp": ops.exp,
    "tanh": ops.tanh,
    "logistic": ops.sigmoid,
    "sqrt": ops.sqrt,
    "floor": ops.floor,
    "dot_general": lambda x, kernel: ops.matmul(x, kernel, False, False),
}


def is_binary(node: Node, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether a node is a product that BinaryConvolution can be.

    Args:
      node: of `ChannelsFirst.graph`.
      arrays: its constants.
    """
    if node.operation != "integer_product" or node["weight"] != (1, 0.5):
        return False
    kernel = arrays[node.inputs[1]]
    return (
        node["activation"] in ((1, 0.0), (1, 0.5))
        and kernel.ndim == 4
        and node["feature_group_count"] == 1
        and kernel.shape[1] % _CHANNELS == 0
    )


def model(network: ChannelsFirst, batch: int | None, *, outputs: Sequence[str] = ()) -> Any:
    """The network in OpenVINO's operations, from "images" to "logits".

    Args:
      network: of `channels_first`.
      batch: how many images a call takes; None for any number.
      outputs: nodes whose values are outputs too, behind the logits; those of codes are levels.

    Returns:
      An `openvino.Model`.

    Raises:
      NotImplementedError: for an operation that has no form here; the message names it.
    """
    channels, *pixels = network.graph.image_shape
    shape = openvino.PartialShape([-1 if batch is None else batch, *pixels, channels])
    images = ops.parameter(shape, np.float32, name="images")
    images.output(0).set_names({"images"})
    writer = _Writer(network)
    writer.values["input"] = ops.transpose(images, np.array([0, 3, 1, 2]))
    for node in network.graph.nodes:
        writer.values[node.name] = writer.write(node)
    names = (network.graph.output, *outputs)
    results = [ops.result(writer.values[name], name=name) for name in names]
    for result, name in zip(results, ("logits", *outputs)):
        result.output(0).set_names({name})
    made: Any = openvino.Model
    return made(results, [images], "frozen")


class _Writer:
    """Writes nodes one by one; of codes that binary products take, it writes the bits too."""

    def __init__(self, network: ChannelsFirst):
        self.network = network
        self.nodes = {node.name: node for node in network.graph.nodes}
        self.users = network.graph.users()
        self.values: dict[str, Value] = {}
        self.bits: dict[str, Value] = {}

    def write(self, node: Node) -> Value:
        """The output of a node whose inputs are written."""
        special = getattr(self, f"_{node.operation}", None)
        if special is not None:
            return special(node)
        if node.operation not in _SIMPLE:
            raise NotImplementedError(
                f"OpenVINO's file has no form for the operation {node.operation!r} ({node.name})"
            )
        return self._rounded(node, _SIMPLE[node.operation](*self._inputs(node)))

    def _rounded(self, node: Node, value: Value) -> Value:
        """A value that OpenVINO does not join with what follows into one rounding.

        Sums of floats are rounded in an order of its own anyhow; they go without, and so does the
        sum of two values, which it joins with nothing behind it.
        """
        users = self.users.get(node.name, ())
        if (
            all(user.operation in _APART for user in users)
            or (node.operation == "add" and not any(i in self.network.arrays for i in node.inputs))
            or self._is_of_float_sums(node)
        ):
            return value
        return apart(value)

    def _inputs(self, node: Node) -> list[Value]:
        return [self._input(node, i) for i in range(len(node.inputs))]

    def _input(self, node: Node, index: int = 0) -> Value:
        name = node.inputs[index]
        return self.values[name] if name in self.values else constant(self._array(node, index))

    def _array(self, node: Node, index: int) -> np.ndarray:
        return self.network.arrays[node.inputs[index]]

    def _max(self, node: Node) -> Value:
        array = self.network.arrays.get(node.inputs[1])
        if array is not None and array.ndim == 0:
            if array == 0:
                return ops.relu(self._input(node))
            if array <= np.finfo(np.float32).min and self._is_of_float_sums(node):
                # These are rounded anyhow, and one step without it.
                return self._input(node)
        return ops.maximum(*self._inputs(node))

    def _prelu(self, node: Node) -> Value:
        return ops.prelu(self._input(node), constant(self._array(node, 1).reshape(-1)))

    def _convert_element_type(self, node: Node) -> Value:
        if node["new_dtype"] != "float32":
            raise NotImplementedError(f"OpenVINO's file has no numbers of {node['new_dtype']}")
        return self._input(node)

    def _rescale(self, node: Node) -> Value:
        product = self.nodes.get(node.inputs[0])
        scale = self._array(node, 1)
        x = self._input(node)
        if product is not None and self._is_binary(product):
            total, factor = self._correction(product)
            x, scale = ops.add(x, constant(total)), scale * factor
        return self._rounded(node, ops.multiply(apart(x), constant(scale)))

    def _pad(self, node: Node) -> Value:
        low, high, _ = zip(*node["padding_config"])
        if not any((*low, *high)):
            return self._input(node)
        value = self._input(node, 1)
        return ops.pad(self._input(node), np.array(low), np.array(high), "constant", value)

    def _slice(self, node: Node) -> Value:
        rank = len(node["start_indices"])
        last = np.iinfo(np.int64).max
        stop = [n if isinstance(n, int) else last for n in node["limit_indices"]]
        step = np.array(node["strides"] or (1,) * rank)
        start = np.array(node["start_indices"])
        return ops.slice(self._input(node), start, np.array(stop), step, np.arange(rank))

    def _reshape(self, node: Node) -> Value:
        sizes = np.array([n if isinstance(n, int) else -1 for n in node["new_sizes"]])
        return ops.reshape(self._input(node), sizes, False)

    def _transpose(self, node: Node) -> Value:
        return ops.transpose(self._input(node), np.array(node["permutation"]))

    def _reduce_window_max(self, node: Node) -> Value:
        low, high = zip(*node["padding"][2:])
        window, strides = node["window_dimensions"][2:], node["window_strides"][2:]
        pooled = ops.max_pool(self._input(node), [*strides], [1, 1], [*low], [*high], [*window])
        return pooled.output(0)

    def _concatenate(self, node: Node) -> Value:
        return ops.concat(self._inputs(node), node["dimension"])

    def _reduce_sum(self, node: Node) -> Value:
        return apart(ops.reduce_sum(self._input(node), np.array(node["axes"]), False))

    def _reduce_max(self, node: Node) -> Value:
        return ops.reduce_max(self._input(node), np.array(node["axes"]), False)

    def _mean_pixels(self, node: Node) -> Value:
        height, width = self.network.shapes[node.inputs[0]][2:]
        total = self._input(node)
        # Rows from the top, then columns from the left, as the network has it.
        for size in (height, width):
            parts = ops.split(total, np.array(2), size).outputs()
            total = functools.reduce(ops.add, parts)
            total = ops.squeeze(total, np.array([2]))
        return ops.multiply(apart(total), constant(1 / (height * width)))

    def _conv_general_dilated(self, node: Node) -> Value:
        return self._convolution(node, self._array(node, 1))

    def _convolution(self, node: Node, kernel: np.ndarray) -> Value:
        groups = node["feature_group_count"]
        convolution = ops.convolution
        if groups > 1:
            kernel = kernel.reshape(groups, -1, *kernel.shape[1:])
            convolution = ops.group_convolution
        return convolution(self._input(node), constant(kernel), *window(node))

    def _integer_product(self, node: Node) -> Value:
        kernel = self._array(node, 1)
        if self._is_binary(node):
            filters = bit_tensor(kernel > 0)
            pad_value = -1.0 if node["activation"][1] == 0 else 0.0
            x = self.bits[node.inputs[0]]
            return ops.binary_convolution(x, filters, *window(node), "xnor-popcount", pad_value)
        form = integers.form(*node["weight"])
        if node["largest_sum"] < EXACT:
            return self._level_product(node, levels(kernel, form))
        codes = np.asarray(integers.codes_of(kernel, form))
        digits = kernel_digits(codes, node["weight"], node["largest_sum"])
        return rounded_sum([(place, self._level_product(node, d)) for place, d in digits])

    def _level_product(self, node: Node, kernel: np.ndarray) -> Value:
        """The product with a kernel of levels, exact where its sums stay below 2**24."""
        if kernel.ndim == 2:
            return ops.matmul(self._input(node), constant(kernel), False, False)
        return self._convolution(node, kernel)

    def _correction(self, product: Node) -> tuple[np.ndarray, np.float32]:
        """(t, f), float32: sums of a binary product are `(result + t) * f`."""
        kernel = levels(self._array(product, 1), integers.form(*product["weight"]))
        if product["activation"][1]:
            return np.zeros((1, kernel.shape[0], 1, 1), np.float32), np.float32(1)
        return kernel.sum((1, 2, 3)).reshape(1, -1, 1, 1), np.float32(0.5)

    def _decode(self, node: Node) -> Value:
        return self._input(node)

    def _encode(self, node: Node) -> Value:
        if self._has_binary_user(node):
            start, edge, rises = bit_edges(self.network, node)
            self.bits[node.name] = as_bits(self.values[start], edge, rises)
        x, limits = self._input(node), self._array(node, 1)
        # A denormal limit, between 0 and what is above it, would be taken for 0.
        limits = np.where((limits > 0) & (limits < TINY), TINY, limits)
        x = ops.negative(x) if node["negate"] else x
        step = None if limits.size <= _FEW else uniform_step(limits, node["grid"][1])
        code = count(x, list(limits)) if step is None else even_code(x, step, node["grid"])
        return level_of_code(code, node)

    def _encode_sums(self, node: Node) -> Value:
        product = self.nodes[node.inputs[0]]
        rank = len(self.network.shapes[product.name])
        shape = (1, -1, *[1] * (rank - 2))
        limits = self._array(node, 1).astype(np.float64)
        signs = self._array(node, 2).astype(np.float64).reshape(shape)
        x = self._input(node)
        total, factor = self._correction(product) if self._is_binary(product) else (0.0, 1.0)
        # Thresholds of the result: results are integers, and thresholds lie between them.
        edges = [(limit.reshape(shape) - 0.5) * signs / factor - total for limit in limits]
        edge = edges[0]
        if product["largest_sum"] >= EXACT:
            # These sums are rounded, and reach a rounded limit if they reached it before.
            edges = [limit.astype(np.float32).reshape(shape) * signs for limit in limits]
            edge = edges[0].astype(np.float32)
            edge = np.where(signs > 0, np.nextafter(edge, np.float32(-np.inf)), edge)
        if self._has_binary_user(node):
            self.bits[node.name] = as_bits(x, edge, signs > 0)
        edges = [(edge * signs).astype(np.float32) for edge in edges]
        return level_of_code(count(ops.multiply(x, constant(signs)), edges), node)

    def _is_of_float_sums(self, node: Node) -> bool:
        """Whether a node's input comes from a product of floats, through constants alone."""
        while True:
            others = [name for name in node.inputs if name not in self.network.arrays]
            if len(others) != 1 or others[0] not in self.nodes:
                return False
            node = self.nodes[others[0]]
            if node.operation in ("conv_general_dilated", "dot_general"):
                return True
            if node.operation not in ("add", "sub", "mul", "max"):
                return False

    def _is_binary(self, node: Node) -> bool:
        return is_binary(node, self.network.arrays)

    def _has_binary_user(self, node: Node) -> bool:
        return any(self._is_binary(user) for user in self.users.get(node.name, ()))
