"""An ONNX graph in the making, with the shape of everything, as QONNX's tools want it."""

from typing import Any

import numpy as np

from uniq_jax.deploy.onnx_builder import onnx

QONNX = "qonnx.custom_op.general"

# Of plain ONNX: the oldest whose operations are all that is used.
_OPSET, _IR_VERSION = 13, 8


class Builder:
    """Collects operations, constants, and the shapes of both.

    Attributes:
      shapes: of "images" and of what operations give, by name.
    """

    def __init__(self, image_shape: tuple[int, ...]):
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"images": image_shape}
        self._types: dict[str, int] = {"images": onnx.TensorProto.FLOAT}

    def add(
        self,
        operation: str,
        inputs: list[str],
        name: str,
        shape: tuple[int, ...],
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds an operation whose output has this name and shape; returns the name.

        The output has the first input's type, or that of the attribute `to`.
        """
        self.shapes[name] = tuple(shape)
        self._types[name] = attributes.get("to", self._types[inputs[0]])
        made = onnx.helper.make_node(operation, inputs, [name], name, domain=domain, **attributes)
        self.nodes.append(made)
        return name

    def constant(self, values: Any, name: str, dtype: Any = np.float32) -> str:
        """Adds a constant; returns its name."""
        array = np.array(values, dtype, order="C")
        tensor = self.constants[name] = onnx.numpy_helper.from_array(array, name)
        self._types[name] = tensor.data_type
        return name

    def model(self, output: str) -> Any:
        """The graph from "images" to an output, as an `onnx.ModelProto`."""
        helper = onnx.helper
        infos = {
            name: helper.make_tensor_value_info(name, self._types[name], shape)
            for name, shape in self.shapes.items()
        }
        images, logits = infos.pop("images"), infos.pop(output)
        # QONNX's interpreter runs nodes one by one, and looks here for what constants are, too.
        constants = [
            helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            for name, tensor in self.constants.items()
        ]
        graph = helper.make_graph(
            self.nodes,
            "frozen",
            [images],
            [logits],
            list(self.constants.values()),
            value_info=[*infos.values(), *constants],
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(QONNX, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
