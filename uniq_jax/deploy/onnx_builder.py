"""An ONNX graph in the making: nodes, constants that are stored once, and packed kernels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    import onnx
    from onnx import helper, numpy_helper
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ONNX files need the package onnx: pip install 'uniq_jax[onnx]'", name=error.name
    ) from error

# The oldest that has all that is used, MatMulIntegerToFloat of ONNX Runtime's own domain aside:
# QuantizeLinear with a scale per channel (13), Relu, Clip and Pad of uint8 (13), GreaterOrEqual on
# every type (16). The older an opset, the more runtimes know it; 18 to 21 add nothing needed here.
OPSET = 17

# The oldest IR version that opset 17 goes with.
_IR_VERSION = 8

MICROSOFT = "com.microsoft"

# Kernels of at most so many bits are stored in fields of 1, 2 or 4 bits.
_MOST_PACKED_BITS = 4


class Builder:
    """Collects the nodes of one graph; calling it adds one and gives the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._known: dict[tuple[Any, ...], str] = {}

    def __call__(
        self, operation: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any
    ) -> str:
        name = name or f"{operation}_{len(self.nodes)}"
        node = helper.make_node(operation, inputs, [name], name, domain=domain, **attributes)
        self.nodes.append(node)
        return name

    def split(self, x: str, count: int, axis: int) -> list[str]:
        """The slices of length 1 along an axis of `count`, which they keep."""
        name = f"Split_{len(self.nodes)}"
        names = [f"{name}_{i}" for i in range(count)]
        sizes = self.constant(np.ones(count, np.int64))
        self.nodes.append(helper.make_node("Split", [x, sizes], names, name, axis=axis))
        return names

    def rename(self, name: str) -> str:
        """Renames the output of the node that was added last."""
        self.nodes[-1].output[0] = self.nodes[-1].name = name
        return name

    def constant(self, array: Any) -> str:
        """The name of an initializer with this value, shape and dtype."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = f"constant_{len(self.initializers)}"
            self._known[key] = name
            self.initializers.append(numpy_helper.from_array(array, name))
        return self._known[key]

    def integers(self, *values: int) -> str:
        """A constant int64 vector, as shapes and axes are."""
        return self.constant(np.array(values, np.int64))

    def kernel(self, codes: np.ndarray, bits: int, factor: int, shift: int) -> str:
        """The int8 kernel `factor * codes + shift`; up to four bits it is stored packed.

        A byte holds 8, 4 or 2 codes, the first in its lowest bits. Runtimes unpack them when they
        load the file: `Gather` takes each byte to its codes' values, in a table of 256 rows.
        """
        if bits > _MOST_PACKED_BITS:
            return self.constant((codes.astype(np.int16) * factor + shift).astype(np.int8))
        field = 4 if bits == 3 else bits
        fields = 8 // field
        flat = codes.astype(np.uint8).reshape(-1)
        flat = np.pad(flat, (0, -flat.size % fields)).reshape(-1, fields)
        places = np.arange(fields) * field
        packed = (flat << places).sum(1).astype(np.uint8)
        values = (np.arange(256)[:, None] >> places) % 2**field
        table = (values * factor + shift).clip(-128, 127).astype(np.int8)
        rows = self("Cast", self.constant(packed), to=onnx.TensorProto.INT32)
        unpacked = self("Gather", self.constant(table), rows, axis=0)
        if codes.size % fields:
            unpacked = self("Reshape", unpacked, self.integers(-1))
            ends = self.integers(0), self.integers(codes.size)
            unpacked = self("Slice", unpacked, *ends, self.integers(0))
        return self("Reshape", unpacked, self.integers(*codes.shape))

    def model(
        self,
        inputs: Sequence[tuple[str, Sequence[Any]]],
        outputs: Sequence[tuple[str, Sequence[Any]]],
        metadata: dict[str, str],
    ) -> Any:
        """The model: float32 inputs and outputs by name and shape, where a size may be a name."""

        def described(values: Sequence[tuple[str, Sequence[Any]]]) -> list[Any]:
            kind = onnx.TensorProto.FLOAT
            return [helper.make_tensor_value_info(n, kind, list(shape)) for n, shape in values]

        graph = helper.make_graph(
            self.nodes, "uniq_jax", described(inputs), described(outputs), self.initializers
        )
        domains = {node.domain for node in self.nodes} - {""}
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="uniq_jax"
        )
        helper.set_model_props(model, metadata)
        return model
