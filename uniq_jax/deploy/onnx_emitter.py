"""What turns the nodes of a frozen network into ONNX nodes: values, their layouts and their codes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from uniq_jax.deploy.graph import Graph, Node
from uniq_jax.deploy.onnx_builder import Builder

# Where the axes (batch, height, width, channels) of an image are.
NCHW, NHWC = "NCHW", "NHWC"
_FROM_NHWC = {NCHW: (0, 3, 1, 2), NHWC: (0, 1, 2, 3)}
_FROM_NCHW = {NCHW: (0, 1, 2, 3), NHWC: (0, 2, 3, 1)}


@dataclasses.dataclass(frozen=True)
class Codes:
    """The codes of a quantizer.

    Attributes:
      name: of the tensor of codes 0..n.
      is_float: whether they are float32, not uint8.
      grid: (bits, offset).
      step: what one code is worth where uint8 codes are dequantized.
    """

    name: str
    is_float: bool
    grid: tuple[int, float]
    step: float = 1.0


class Emitter:
    """Makes ONNX nodes of a graph's, one by one; a table says how each operation is made.

    Attributes:
      graph: the nodes, with operations of `uniq_jax.deploy.onnx_fold` maybe.
      arrays: NumPy arrays, by name.
      shapes: of all outputs, for one image.
      users: the nodes that have a name as an input.
      by_name: the nodes.
      make: the ONNX graph.
      preferred: the layout of images where the inputs of a node differ in it.
      is_exact: whether every float32 operation of the frozen network is kept.
      has_guards: whether rounded numbers are kept from what follows, as `apart` does.
      codes: of the quantizers so far.
      int32: names of the integer sums that are int32; others are float32.
      in_kernels: names of the affine nodes whose scale is in the kernel of a product.
    """

    def __init__(
        self,
        graph: Graph,
        arrays: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        table: "Mapping[str, Emit]",
        *,
        preferred: str,
        is_exact: bool,
        has_guards: bool = False,
    ):
        self.graph = graph
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.shapes = {"input": (1, *graph.image_shape), **shapes}
        self.users = graph.users()
        self.by_name = {node.name: node for node in graph.nodes}
        self.make = Builder()
        self.preferred = preferred
        self.is_exact = is_exact
        self.has_guards = has_guards
        self.codes: dict[str, Codes] = {}
        self.int32: set[str] = set()
        self.in_kernels: set[str] = set()
        self._table = table
        self._values: dict[tuple[str, str], str] = {}
        self._layouts: dict[str, str] = {}

    def run(self) -> None:
        """Emits all nodes; "images" is the input, and "logits" the output."""
        self.put("input", "images", NHWC)
        for node in self.graph.nodes:
            emit = self._table.get(node.operation)
            if emit is None:
                raise self.unsupported(node)
            emit(self, node)
        self.make("Identity", self.read(self.graph.output, NHWC), name="logits")

    def unsupported(self, node: Node, what: str = "") -> NotImplementedError:
        """The error of a node that has no ONNX form."""
        where = f" of layer {node.layer!r}" if node.layer else ""
        detail = f" with {what}" if what else ""
        return NotImplementedError(
            f"an ONNX file has no form for the operation {node.operation!r} (node {node.name!r})"
            f"{where}{detail}"
        )

    def put(self, name: str, value: str, layout: str = "") -> None:
        """Says which tensor the output of a node is, and how its axes lie if it has four."""
        layout = layout if self.is_image(name) else ""
        self._values[name, layout] = value
        self._layouts[name] = layout

    def is_image(self, name: str) -> bool:
        """Whether a value has four axes."""
        return len(self.shapes[name]) == 4

    def layout(self, name: str) -> str:
        """How the axes of a value lie; "" where they are not four."""
        return self._layouts[name]

    def read(self, name: str, layout: str = "") -> str:
        """The tensor of a value, in its own layout or this one."""
        have = self._layouts[name]
        wanted = layout if layout and have else have
        if (name, wanted) not in self._values:
            self._values[name, wanted] = self.transposed(self._values[name, have], have, wanted)
        return self._values[name, wanted]

    def transposed(self, tensor: str, have: str, wanted: str) -> str:
        """A tensor in another layout."""
        if have == wanted or not have:
            return tensor
        perm = (_FROM_NHWC if wanted == NCHW else _FROM_NCHW)[wanted]
        return self.make("Transpose", tensor, perm=perm)

    def common(self, node: Node) -> str:
        """The layout that a node's inputs are best read in; "" where none has four axes."""
        values = [n for n in node.inputs if n not in self.arrays and self.is_image(n)]
        if not values:
            return ""
        layouts = {self._layouts[name] for name in values}
        return layouts.pop() if len(layouts) == 1 else self.preferred

    def axis(self, name: str, axis: int, layout: str) -> int:
        """Where an axis of a value (as the graph counts them) is in a layout."""
        return _FROM_NHWC[layout].index(axis) if layout and self.is_image(name) else axis

    def operands(self, node: Node, layout: str) -> list[str]:
        """The inputs of an elementwise node in a layout, arrays in the rank of the output."""
        return [
            self.laid(self.arrays[name], node.name, layout)
            if name in self.arrays
            else self.read(name, layout)
            for name in node.inputs
        ]

    def laid(self, array: np.ndarray, result: str, layout: str) -> str:
        """An array as a constant that is broadcast against a value in a layout."""
        if array.size == 1:
            array = array.reshape(())
        elif self.is_image(result):
            array = array.reshape((1,) * (4 - array.ndim) + array.shape)
            array = array.transpose(_FROM_NHWC[layout])
        return self.make.constant(array)

    def constant(self, number: Any) -> str:
        """A constant float32, or what NumPy type the number has."""
        return self.make.constant(np.float32(number) if isinstance(number, int | float) else number)

    def apart(self, value: str) -> str:
        """A rounded value that no compiler joins with what follows, where that is to be."""
        if not self.has_guards:
            return value
        return self.make("Max", value, self.constant(np.finfo(np.float32).min))

    def put_codes(self, node: Node, codes: Codes, layout: str) -> None:
        """Says what the codes of a quantizer are."""
        self.codes[node.name] = codes
        self.put(node.name, codes.name, layout)


Emit = Callable[[Emitter, Node], None]


def code_name(name: str, layout: str) -> str:
    """What the tensor of a quantizer's codes is called in the file."""
    return f"{name}_codes_{layout}" if layout else f"{name}_codes"
