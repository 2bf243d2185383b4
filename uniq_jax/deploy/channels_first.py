"""A graph whose images have their channels first, as ONNX's and OpenVINO's operations want them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from uniq_jax.deploy import limits, operations
from uniq_jax.deploy.graph import Graph, Node
from uniq_jax.deploy.limits import IMAGE, KERNEL
from uniq_jax.deploy.trace import ELEMENTWISE

_BROADCASTING = ("rescale", "prelu", "decode", *ELEMENTWISE)
_NCHW = ((0, 1, 2, 3),) * 3

# Attributes with one entry for each axis.
_PER_AXIS = {
    "slice": ("start_indices", "limit_indices", "strides"),
    "pad": ("padding_config",),
    "reduce_window_max": (
        "window_dimensions",
        "window_strides",
        "padding",
        "base_dilation",
        "window_dilation",
    ),
}


@dataclasses.dataclass(frozen=True)
class ChannelsFirst:
    """A graph over (batch, channels, height, width), with what it takes to write it down.

    Its operations are those of a frozen network, but for the axes: "encode_sums" has its channels
    along axis 1, "mean_pixels" goes over axes 2 and 3, and elementwise constants are shaped for
    their place.

    Attributes:
      graph: its `image_shape` is (channels, height, width).
      arrays: constants by name, kernels (out, in, height, width).
      shapes: of all nodes' outputs and "input", for one image.
    """

    graph: Graph
    arrays: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]


def channels_first(graph: Graph, arrays: Mapping[str, Any]) -> ChannelsFirst:
    """The same network for images with their channels first.

    Raises:
      NotImplementedError: for an operation on images whose axes have no such form, and for what
        `limits.check` refuses.
    """
    sizes = {name: tuple(s.shape) for name, s in operations.shapes(graph, arrays).items()}
    sizes.setdefault("input", (1, *graph.image_shape))
    limits.check(graph, arrays, sizes)
    changes = _Changes(sizes, {name: np.asarray(array) for name, array in arrays.items()})
    nodes = []
    for node in graph.nodes:
        nodes += changes.of(node)
    if len(sizes[graph.output]) == 4:
        raise NotImplementedError("the network's output is an image; channels have no one place")
    shapes = {name: _permuted(size, IMAGE) for name, size in sizes.items()}
    used = {name for node in nodes for name in node.inputs}
    first = dataclasses.replace(
        graph, nodes=tuple(nodes), image_shape=_permuted((1, *graph.image_shape), IMAGE)[1:]
    )
    return ChannelsFirst(
        first, {k: v for k, v in changes.arrays.items() if k in used}, {**shapes, **changes.more}
    )


class _Changes:
    def __init__(self, sizes: Mapping[str, tuple[int, ...]], arrays: dict[str, np.ndarray]):
        self.sizes = sizes
        self.arrays = arrays
        self.more: dict[str, tuple[int, ...]] = {}

    def of(self, node: Node) -> list[Node]:
        """What a node becomes."""
        ranks = [len(self.sizes[n]) for n in (*node.inputs, node.name) if n in self.sizes]
        if ranks[-1] not in (2, 4) and self._has_channels(node):
            allowed = "(batch, channels), or that of images"
            if node.operation == "encode_sums":
                allowed += "; freeze(..., integer_thresholds=False) makes no such operation"
            raise limits.refused(node, "an output of shape", self.sizes[node.name], allowed)
        if 4 not in ranks or node.operation in ("encode", "encode_sums", "mean_pixels"):
            return [node]
        if node.operation in _BROADCASTING:
            return [self._inputs(node, lambda name: self._constant(name, 4))]
        attributes = dict(node.attributes)
        if node.operation in _PER_AXIS:
            for key in _PER_AXIS[node.operation]:
                # Without strides a slice takes all; it has None.
                if attributes[key] is not None:
                    attributes[key] = _permuted(attributes[key], IMAGE)
        elif node.operation == "concatenate":
            attributes["dimension"] = IMAGE.index(attributes["dimension"])
        elif node.operation in ("reduce_sum", "reduce_max") and attributes["axes"] == (1, 2):
            attributes["axes"] = (2, 3)
        elif attributes.get("dimension_numbers") == limits.CONVOLUTION:
            attributes["dimension_numbers"] = _NCHW
            node = self._inputs(node, self._kernel)
        elif node.operation == "reshape" and ranks[-1] != 4:
            back = Node(
                f"{node.name}_pixels", "transpose", node.inputs, (("permutation", (0, 2, 3, 1)),)
            )
            self.more[back.name] = self.sizes[node.inputs[0]]
            return [back, dataclasses.replace(node, inputs=(back.name,))]
        else:
            raise NotImplementedError(
                f"no form with channels first for the operation {node.operation!r} ({node.name})"
            )
        return [dataclasses.replace(node, attributes=tuple(attributes.items()))]

    def _has_channels(self, node: Node) -> bool:
        """Whether a node finds its channels along axis 1, wherever they are in the network."""
        if node.operation == "prelu":
            return self.arrays[node.inputs[1]].size > 1
        return node.operation == "encode_sums"

    def _inputs(self, node: Node, change: Callable[[str], str]) -> Node:
        names = (n if n not in self.arrays or n in self.sizes else change(n) for n in node.inputs)
        return dataclasses.replace(node, inputs=tuple(names))

    def _constant(self, name: str, rank: int) -> str:
        """The name of a constant that broadcasts against images."""
        array = self.arrays[name]
        if not array.ndim:
            return name
        whole = array.reshape((1,) * (rank - array.ndim) + array.shape)
        self.arrays[f"{name}_first"] = whole.transpose(IMAGE)
        return f"{name}_first"

    def _kernel(self, name: str) -> str:
        self.arrays[f"{name}_first"] = self.arrays[name].transpose(KERNEL)
        return f"{name}_first"


def _permuted(values: tuple[Any, ...], axes: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(values[axis] for axis in axes) if len(values) == 4 else tuple(values)
