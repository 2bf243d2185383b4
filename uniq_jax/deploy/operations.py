"""What the nodes of a graph do, in JAX.

An operation takes its node and its inputs, and gives the output. Elementwise ones broadcast.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from uniq_jax import exact
from uniq_jax.deploy import integers, products
from uniq_jax.deploy.graph import Graph, Node

Operation = Callable[..., jax.Array]

# Larger windows of max pooling are not written out.
_FEW_PIXELS = 9


def _elementwise(function: Callable[..., jax.Array]) -> Operation:
    return lambda node, *inputs: function(*inputs)


def _sizes(sizes: tuple[Any, ...], batch: int) -> tuple[int, ...]:
    return tuple(n if isinstance(n, int) else n[1] * batch for n in sizes)


def _reshape(node: Node, x: jax.Array) -> jax.Array:
    # One unknown size is all that the batch can make.
    return x.reshape([n if isinstance(n, int) else -1 for n in node["new_sizes"]])


def _reduce_window_max(node: Node, x: jax.Array) -> jax.Array:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    window, strides, padding, base_dilation, dilation = (tuple(node[name]) for name in names)
    if max(base_dilation) > 1 or math.prod(window) > _FEW_PIXELS:
        return lax.reduce_window(x, -jnp.inf, lax.max, *(node[name] for name in names))
    # XLA:CPU takes the maximum of shifted images in a quarter of the time.
    x = lax.pad(x, -jnp.inf, [(low, high, 0) for low, high in padding])
    spans = [(n - 1) * d + 1 for n, d in zip(window, dilation)]
    sizes = [(n - s) // t + 1 for n, s, t in zip(x.shape, spans, strides)]
    shifted = []
    for offsets in itertools.product(*(range(n) for n in window)):
        starts = [i * d for i, d in zip(offsets, dilation)]
        stops = [a + (n - 1) * t + 1 for a, n, t in zip(starts, sizes, strides)]
        shifted.append(lax.slice(x, starts, stops, strides))
    return functools.reduce(jnp.maximum, shifted)


def _rescale(node: Node, sums: jax.Array, scale: jax.Array) -> jax.Array:
    del node
    return exact.rescale(sums.astype(scale.dtype), scale)


def _encode(node: Node, x: jax.Array, thresholds: jax.Array) -> jax.Array:
    codes = integers.count_below(-x if node["negate"] else x, thresholds)
    return integers.operand(codes, integers.form(*node["grid"]))


def _encode_sums(node: Node, sums: jax.Array, thresholds: jax.Array, sign: jax.Array) -> jax.Array:
    codes = integers.count_reached(sums * sign, thresholds)
    return integers.operand(codes, integers.form(*node["grid"]))


def _decode(node: Node, operand: jax.Array) -> jax.Array:
    return integers.levels_of(operand, integers.form(*node["grid"]))


OPERATIONS: Mapping[str, Operation] = {
    "add": _elementwise(jnp.add),
    "sub": _elementwise(jnp.subtract),
    "mul": _elementwise(jnp.multiply),
    "div": _elementwise(jnp.divide),
    "max": _elementwise(jnp.maximum),
    "min": _elementwise(jnp.minimum),
    "neg": _elementwise(jnp.negative),
    "abs": _elementwise(jnp.abs),
    "sign": _elementwise(jnp.sign),
    "exp": _elementwise(jnp.exp),
    "log": _elementwise(jnp.log),
    "tanh": _elementwise(jnp.tanh),
    "logistic": _elementwise(lax.logistic),
    "sqrt": _elementwise(jnp.sqrt),
    "rsqrt": _elementwise(lax.rsqrt),
    "erf": _elementwise(lax.erf),
    "floor": _elementwise(jnp.floor),
    "round_even": _elementwise(jnp.round),
    "square": _elementwise(jnp.square),
    "gt": _elementwise(jnp.greater),
    "ge": _elementwise(jnp.greater_equal),
    "lt": _elementwise(jnp.less),
    "le": _elementwise(jnp.less_equal),
    "eq": _elementwise(jnp.equal),
    "ne": _elementwise(jnp.not_equal),
    "and": _elementwise(jnp.logical_and),
    "or": _elementwise(jnp.logical_or),
    "not": _elementwise(jnp.logical_not),
    "select_n": _elementwise(lambda which, off, on: jnp.where(which, on, off)),
    "integer_pow": lambda node, x: lax.integer_pow(x, node["y"]),
    "convert_element_type": lambda node, x: x.astype(node["new_dtype"]),
    "reshape": _reshape,
    "transpose": lambda node, x: x.transpose(node["permutation"]),
    "squeeze": lambda node, x: lax.squeeze(x, node["dimensions"]),
    "pad": lambda node, x, value: lax.pad(x, value, node["padding_config"]),
    "concatenate": lambda node, *inputs: jnp.concatenate(inputs, node["dimension"]),
    "reduce_sum": lambda node, x: x.sum(node["axes"]),
    "reduce_max": lambda node, x: x.max(node["axes"]),
    "argmax": lambda node, x: lax.argmax(x, node["axes"][0], jnp.dtype(node["index_dtype"])),
    "reduce_window_max": _reduce_window_max,
    "dot_general": products.multiply,
    "conv_general_dilated": products.multiply,
    "prelu": _elementwise(exact.exact_prelu),
    "mean_pixels": _elementwise(exact.exact_mean),
    "rescale": _rescale,
    "integer_product": products.integer_product,
    "encode": _encode,
    "encode_sums": _encode_sums,
    "decode": _decode,
}


def _broadcast(node: Node, x: jax.Array, batch: int) -> jax.Array:
    return lax.broadcast_in_dim(x, _sizes(node["shape"], batch), node["broadcast_dimensions"])


def _slice(node: Node, x: jax.Array, batch: int) -> jax.Array:
    start, end = (_sizes(node[f"{name}_indices"], batch) for name in ("start", "limit"))
    return lax.slice(x, start, end, node["strides"])


# These take the batch, too: any of their sizes may hang on it.
_OF_BATCH: Mapping[str, Operation] = {"broadcast_in_dim": _broadcast, "slice": _slice}

NAMES = frozenset({*OPERATIONS, *_OF_BATCH})
"""All operations of a graph."""


def execute(
    nodes: tuple[Node, ...], arrays: Mapping[str, Any], values: dict[str, Any], batch: int
) -> dict[str, Any]:
    """The outputs of all nodes, beside the `values` there are, by name."""
    for node in nodes:
        inputs = [values[name] if name in values else arrays[name] for name in node.inputs]
        if node.operation in _OF_BATCH:
            values[node.name] = _OF_BATCH[node.operation](node, *inputs, batch)
        else:
            values[node.name] = OPERATIONS[node.operation](node, *inputs)
    return values


def shapes(graph: Graph, arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every node's output for one image."""
    image = jax.ShapeDtypeStruct((1, *graph.image_shape), jnp.float32)
    return jax.eval_shape(
        lambda x: execute(graph.nodes, arrays, {"input": x}, 1),
        image,
    )
