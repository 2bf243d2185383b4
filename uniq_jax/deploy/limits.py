"""What files can say of products, windows and padding: all else is refused, not written wrong.

Images are (batch, height, width, channels), as a frozen network has them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from uniq_jax.deploy.graph import Graph, Node
from uniq_jax.deploy.matrices import is_conv

# Of (batch, height, width, channels), and of a kernel (height, width, in, out).
IMAGE, KERNEL = (0, 3, 1, 2), (3, 2, 0, 1)
CONVOLUTION = (IMAGE, KERNEL, IMAGE)

_PRODUCTS = ("conv_general_dilated", "dot_general", "integer_product")

Shapes = Mapping[str, tuple[int, ...]]


def check(graph: Graph, arrays: Mapping[str, Any], shapes: Shapes) -> None:
    """Checks that nodes have no attributes that files would not say.

    Args:
      graph: of a frozen network.
      arrays: its constants.
      shapes: of all nodes' outputs and "input".

    Raises:
      NotImplementedError: at the first node that has; the message names it, the attribute, its
        value, and what is allowed.
    """
    sizes = {**shapes, **{name: np.shape(array) for name, array in arrays.items()}}
    for node in graph.nodes:
        if node.operation in _PRODUCTS and is_conv(node):
            _check_convolution(node, node.inputs[1] in arrays)
        elif node.operation in _PRODUCTS:
            _check_matrices(node, sizes, node.inputs[1] in arrays)
        elif node.operation == "reduce_window_max":
            _check_window(node)
        elif node.operation == "slice":
            _check_slice(node, sizes[node.inputs[0]])
        elif node.operation == "pad":
            config = node["padding_config"]
            if any(inner for _, _, inner in config):
                raise refused(node, "padding_config", config, "without padding between numbers")


def refused(node: Node, attribute: str, value: Any, allowed: str) -> NotImplementedError:
    """The error of a node with an attribute that has no form in a file."""
    layer = f" of layer {node.layer!r}" if node.layer else ""
    return NotImplementedError(
        f"the file has no form for the operation {node.operation!r} (node {node.name!r}){layer} "
        f"with {attribute} (={value!r}): it must be {allowed}"
    )


def _check_convolution(node: Node, has_kernel: bool) -> None:
    if not has_kernel:
        raise refused(node, "kernel", node.inputs[1], "a constant")
    numbers, dilation, padding = (
        node[key] for key in ("dimension_numbers", "lhs_dilation", "padding")
    )
    if numbers != CONVOLUTION:
        allowed = f"{CONVOLUTION}, images (batch, height, width, channels)"
        raise refused(node, "dimension_numbers", numbers, allowed)
    if any(n != 1 for n in dilation):
        raise refused(node, "lhs_dilation", dilation, "1 along every axis")
    if node["batch_group_count"] != 1:
        raise refused(node, "batch_group_count", node["batch_group_count"], "1")
    if any(n < 0 for ends in padding for n in ends):
        raise refused(node, "padding", padding, "0 or more at every end")


def _check_matrices(node: Node, shapes: Shapes, has_kernel: bool) -> None:
    numbers = node["dimension_numbers"]
    first, second = (len(shapes[name]) for name in node.inputs)
    if has_kernel:
        count = len(numbers[0][1])
        contracted, batch = (tuple(range(first - count, first)), tuple(range(count))), ((), ())
        is_allowed = 0 < count < min(first, second)
        allowed = "the input's last axes with the kernel's first ones in their order, no batch"
    else:
        leading = tuple(range(first - 2))
        contracted, batch = ((first - 1,), (second - 2,)), (leading, leading)
        is_allowed = first == second >= 2
        allowed = "those of matrices: the first's last axis with the second's last but one"
    if not is_allowed or numbers != (contracted, batch):
        raise refused(node, "dimension_numbers", numbers, allowed)


def _check_slice(node: Node, shape: tuple[int, ...]) -> None:
    start, end = node["start_indices"], node["limit_indices"]
    # What is no integer is so many times the batch.
    if any(not isinstance(n, int) for n in start):
        raise refused(node, "start_indices", start, "integers, whatever the batch")
    if any(not isinstance(n, int) and n[1] != size for n, size in zip(end, shape)):
        raise refused(node, "limit_indices", end, "integers, or the whole of an axis")


def _check_window(node: Node) -> None:
    size = node["window_dimensions"]
    if len(size) != 4:
        raise refused(node, "window_dimensions", size, "one for each of four axes, of images")
    for key in ("window_dimensions", "window_strides"):
        if (node[key][0], node[key][3]) != (1, 1):
            raise refused(node, key, node[key], "1 along batch and channels")
    padding = node["padding"]
    if padding[0] != (0, 0) or padding[3] != (0, 0) or any(n < 0 for p in padding for n in p):
        allowed = "(0, 0) along batch and channels, and 0 or more at every end"
        raise refused(node, "padding", padding, allowed)
    for key in ("base_dilation", "window_dilation"):
        if any(n != 1 for n in node[key]):
            raise refused(node, key, node[key], "1 along every axis")
