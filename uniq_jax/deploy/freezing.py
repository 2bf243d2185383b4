"""From a trained model to an integer network."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax.deploy import integers, operations, thresholds
from uniq_jax.deploy.graph import Graph, Node, pruned, replaced
from uniq_jax.deploy.network import About, FrozenNetwork
from uniq_jax.deploy.trace import ELEMENTWISE, Traced, trace
from uniq_jax.nn import levels

# Up to this width a quantizer becomes thresholds of every channel.
MOST_BITS = 5

# Products of levels, traced.
_PRODUCTS = ("conv_general_dilated", "dot_general")

# What keeps a quantizer from deciding on integer sums, for people.
AS_ASKED = "as asked"
_FLOAT_LAYER = "float layer"
_REASONS = {
    "add": "residual sum",
    "reduce_window_max": "max pooling",
    "mean_pixels": "mean over the pixels",
    "reduce_sum": "sum over the pixels",
}


def freeze(
    model: nnx.Module,
    image_shape: tuple[int, ...],
    *,
    integer_thresholds: bool = True,
    about: About | None = None,
) -> FrozenNetwork:
    """The integer network that a quantized model is in evaluation.

    Every product of two quantized operands becomes one of int8 codes with int32 sums. Where a layer
    feeds the next one's quantizer through batch norm, biases, ReLU or PReLU alone, all of it
    becomes integer thresholds on the sums; where it does not (residual sums, pooling, a PReLU that
    is not monotone) the same float32 operations are kept in the same order. The result has the
    codes of `model.eval()`, every one of them, and its logits.

    Args:
      model: quantized by `uniq_jax.quantize`, in float32; it stays as it is.
      image_shape: of one input, (height, width, channels).
      integer_thresholds: False keeps the float32 operations between sums and quantizers
        everywhere. Codes are the same; formats that know steps, not thresholds, want this form.
      about: labels, and how images are normalized, which files carry along and
        `uniq_jax.predict` needs.

    Returns:
      The network, which needs the model no more.

    Raises:
      ValueError: if the model has no layer whose input and kernel are quantized, computes in
        another dtype than float32, or has learned scalars that are not finite; if sums could
        overflow an int32; if `image_shape` or `about` are not of such images.
      NotImplementedError: if the model does something that no frozen network can; the message names
        it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from uniq_jax import deploy, models
      >>> model = models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0), method="uniq",
      ...                       weight_bits=2, activation_bits=2)
      >>> frozen = deploy.freeze(model, (8, 8, 3))
      >>> frozen(jnp.zeros((1, 8, 8, 3))).shape
      (1, 10)
    """
    about = _checked(image_shape, about or About())
    evaluated = nnx.clone(model)
    evaluated.eval()
    traced = trace(evaluated, image_shape)
    graph, arrays = _with_integers(traced)
    graph = _with_sum_thresholds(graph, arrays, wanted=integer_thresholds)
    graph, arrays = pruned(graph, arrays)
    return FrozenNetwork(graph, {k: jnp.asarray(v) for k, v in arrays.items()}, about)


def _checked(image_shape: Any, about: About) -> About:
    if (
        not isinstance(image_shape, tuple | list)
        or not image_shape
        or not all(isinstance(size, int | np.integer) and size > 0 for size in image_shape)
    ):
        raise ValueError(
            f"image_shape (={image_shape!r}) must be that of one input, without the batch: "
            "(height, width, channels)"
        )
    if len(about.mean) not in (0, 1, image_shape[-1]):
        raise ValueError(
            f"about.mean (={about.mean}) must have as many entries as image_shape (="
            f"{tuple(image_shape)}) has channels"
        )
    return about


def _with_integers(traced: Traced) -> tuple[Graph, dict[str, Any]]:
    """The graph whose quantized products are of integers."""
    arrays = dict(traced.arrays)
    encodes: dict[str, Node] = {}
    nodes: list[Node] = []
    has_product = False
    for node in traced.graph.nodes:
        if node.operation == "encode":
            encodes[node.name] = node
            nodes.append(_encode(node, traced, arrays))
            continue
        source = encodes.get(node.inputs[0])
        if source is not None and node.operation in _PRODUCTS and node.inputs[1] in arrays:
            layer = traced.layers[source["layer"]]
            if layer.weight_quantizer is not None:
                nodes.append(_integer_product(node, source, layer, arrays))
                has_product = True
                continue
        # Whatever else meets levels finds them as float32, which holds them.
        for name in node.inputs:
            if name in encodes and not any(n.name == f"{name}_levels" for n in nodes):
                grid = nodes[[n.name for n in nodes].index(name)]["grid"]
                nodes.append(Node(f"{name}_levels", "decode", (name,), (("grid", grid),)))
        inputs = tuple(f"{name}_levels" if name in encodes else name for name in node.inputs)
        nodes.append(dataclasses.replace(node, inputs=inputs))
    if not has_product:
        raise ValueError(
            "model must have a layer whose input and kernel are quantized; see uniq_jax.quantize"
        )
    return dataclasses.replace(traced.graph, nodes=tuple(nodes)), arrays


def _encode(node: Node, traced: Traced, arrays: dict[str, Any]) -> Node:
    """The quantizer of a layer's input as thresholds on float32 numbers."""
    quantizer = traced.layers[node["layer"]].activation_quantizer
    grid = quantizer.method.grid
    found, negate = thresholds.float_thresholds(quantizer.method, quantizer.parameters)
    arrays[f"{node.name}_thresholds"] = found
    return Node(
        node.name,
        "encode",
        (node.inputs[0], f"{node.name}_thresholds"),
        (("grid", (grid.bits, grid.offset)), ("negate", negate)),
        node.layer,
    )


def _integer_product(node: Node, source: Node, layer: Any, arrays: dict[str, Any]) -> Node:
    """The product of a layer's levels as one of int8 operands."""
    grids = layer.activation_quantizer.method.grid, layer.weight_quantizer.method.grid
    kernel = np.asarray(arrays.pop(node.inputs[1]))
    channels = [layer.kernel.shape[axis] for axis in layer.weight_quantizer.channel_axes]
    taps = kernel.size // math.prod(channels)
    levels.check_accumulator(*grids, taps)
    offset = grids[1].max_code if grids[1].has_half_levels else grids[1].offset
    codes = (kernel + offset) / (2 if grids[1].has_half_levels else 1)
    weight = integers.form(grids[1].bits, grids[1].offset)
    arrays[f"{node.name}_kernel"] = integers.operand(codes.astype(np.int16), weight)
    attributes = (
        ("activation", (grids[0].bits, grids[0].offset)),
        ("weight", (grids[1].bits, grids[1].offset)),
        ("largest_sum", taps * levels.largest_level(grids[0]) * levels.largest_level(grids[1])),
        *node.attributes,
    )
    names = (source.name, f"{node.name}_kernel")
    return Node(node.name, "integer_product", names, attributes, source.layer)


def _with_sum_thresholds(graph: Graph, arrays: dict[str, Any], *, wanted: bool) -> Graph:
    """The graph whose quantizers decide on sums wherever they see functions of one sum only.

    All others have an attribute "epilogue", which says why they don't.
    """
    nodes = {node.name: node for node in graph.nodes}
    shapes = operations.shapes(graph, arrays)
    changes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.operation != "encode":
            continue
        chain = _chain(node, nodes, arrays)
        if isinstance(chain, str):
            changes[node.name] = [_kept(node, chain)]
            continue
        # With more thresholds the float steps are smaller, and faster.
        if node["grid"][0] > MOST_BITS or not wanted:
            why = AS_ASKED if not wanted else f"{node['grid'][0]} bits"
            changes[node.name] = [_kept(node, why)]
            continue
        product = nodes[chain[0].inputs[0]]
        channels = shapes[product.name].shape[-1]
        signs = _signs(chain, arrays, channels)
        if isinstance(signs, str):
            changes[node.name] = [_kept(node, signs)]
            continue
        signs = -signs if node["negate"] else signs
        rank = len(shapes[product.name].shape)
        codes = functools.partial(_codes, (*chain, node), arrays, rank)
        name = f"{node.name}_sum_thresholds"
        bits, _ = node["grid"]
        arrays[name] = thresholds.sum_thresholds(
            codes, signs, largest_sum=product["largest_sum"], max_code=2**bits - 1
        )
        arrays[f"{name}_signs"] = signs.astype(np.int32)
        inputs = (product.name, name, f"{name}_signs")
        changes[node.name] = [
            Node(node.name, "encode_sums", inputs, (("grid", node["grid"]),), node.layer)
        ]
    return replaced(graph, changes)


def _kept(node: Node, why: str) -> Node:
    """The quantizer that decides on float32 numbers, and why."""
    return dataclasses.replace(node, attributes=(*node.attributes, ("epilogue", why)))


def _chain(
    node: Node, nodes: Mapping[str, Node], arrays: Mapping[str, Any]
) -> tuple[Node, ...] | str:
    """The steps from the scale of integer sums to a quantizer; or why not all are of one sum."""
    chain: list[Node] = []
    name = node.inputs[0]
    while (step := nodes.get(name)) is not None:
        if step.operation in _PRODUCTS:
            return _FLOAT_LAYER
        constants = [arrays[n] for n in step.inputs if n in arrays]
        if any(np.size(c) != np.shape(c)[-1] for c in constants if np.ndim(c)):
            return f"{step.operation} with an array of more than channels"
        chain.append(step)
        if step.operation == "rescale":
            source = nodes.get(step.inputs[0])
            is_integer = source is not None and source.operation == "integer_product"
            return tuple(reversed(chain)) if is_integer else _FLOAT_LAYER
        others = [n for n in step.inputs if n not in arrays]
        if step.operation not in ("prelu", *ELEMENTWISE) or len(others) != 1:
            return _REASONS.get(step.operation, step.operation)
        name = others[0]
    return "network's input"


def _signs(chain: tuple[Node, ...], arrays: Mapping[str, Any], channels: int) -> np.ndarray | str:
    """For each channel 1 if codes grow with its sums, -1 if they fall; or why neither is sure."""
    signs = np.ones(channels, np.int64)
    for step in chain:
        constants = [np.asarray(arrays[n]).reshape(-1) for n in step.inputs if n in arrays]
        if step.operation in ("rescale", "mul"):
            signs = signs * np.where(constants[0] < 0, -1, 1)
        elif step.operation == "neg" or (step.operation == "sub" and step.inputs[0] in arrays):
            signs = -signs
        elif step.operation == "div" and step.inputs[1] in arrays:
            signs = signs * np.where(constants[0] < 0, -1, 1)
        elif step.operation == "prelu":
            if np.any(constants[0] < 0):
                return "PReLU with a negative slope"
        elif step.operation not in ("add", "sub", "max", "min", "convert_element_type"):
            return f"{step.operation}, which may not be monotone"
    return signs


def _codes(
    steps: tuple[Node, ...], arrays: Mapping[str, Any], rank: int, sums: jax.Array
) -> np.ndarray:
    """The codes of sums, (n, channels), by the very steps that take the sums there."""
    *chain, encode = steps
    batch = sums.reshape(sums.shape[0], *(1,) * (rank - 2), sums.shape[1])
    values = operations.execute(tuple(chain), arrays, {chain[0].inputs[0]: batch}, sums.shape[0])
    x = values[encode.inputs[0]]
    limits = jnp.asarray(arrays[encode.inputs[1]])
    codes = integers.count_below(-x if encode["negate"] else x, limits)
    return np.asarray(codes).reshape(sums.shape)
