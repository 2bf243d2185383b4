"""Max pooling in front of the steps that end in it, where it has fewer numbers to leave.

The largest of f(x) is f of the largest x, to the last bit, where f does not fall: a scale, batch
norm, biases, ReLU. Where a channel's scale is negative it does fall; there the signs of kernel and
scale are changed, which changes no number behind them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from uniq_jax.deploy import integers
from uniq_jax.deploy.graph import Graph, Node, replaced
from uniq_jax.nn.levels import EXACT

# Steps that never fall; a difference where it is of the input and a constant.
_RISING = ("add", "sub", "max", "min")


def pooled_early(
    graph: Graph, arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Graph, dict[str, Any], dict[str, tuple[int, ...]]]:
    """The graph with max pooling right behind products where that changes nothing.

    Args:
      graph: of a frozen network.
      arrays: its arrays.
      shapes: of its nodes' outputs.

    Returns:
      The graph, its arrays, and the shapes of its nodes' outputs.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    shapes = dict(shapes)
    nodes, users = {node.name: node for node in graph.nodes}, graph.users()
    changes: dict[str, list[Node]] = {}
    for pool in graph.nodes:
        if pool.operation != "reduce_window_max":
            continue
        chain, signs = _chain(pool, nodes, users, arrays)
        if not chain or len(users[chain[0].inputs[0]]) > 1:
            continue
        if not _turn(chain[0], nodes, arrays, signs):
            continue
        first, base = f"{pool.name}_first", chain[0].inputs[0]
        shapes[first] = shapes[pool.name]
        moved = [dataclasses.replace(pool, name=first, inputs=(base,))]
        names = {base: first}
        for step in chain:
            inputs = tuple(names.get(name, name) for name in step.inputs)
            name = pool.name if step is chain[-1] else step.name
            moved.append(dataclasses.replace(step, name=name, inputs=inputs))
            names[step.name] = name
            shapes[name] = shapes[pool.name]
            changes[step.name] = []
        changes[pool.name] = moved
    return replaced(graph, changes), arrays, shapes


def _chain(
    pool: Node, nodes: Mapping[str, Node], users: Mapping[str, Any], arrays: Mapping[str, Any]
) -> tuple[list[Node], np.ndarray]:
    """The steps from a product's scale to a pooling, and -1 for channels where they fall."""
    chain: list[Node] = []
    signs = np.ones(1)
    name = pool.inputs[0]
    while (step := nodes.get(name)) is not None and len(users[name]) == 1:
        constants = [arrays[n].reshape(-1) for n in step.inputs if n in arrays]
        values = [n for n in step.inputs if n not in arrays]
        if len(values) != 1 or any(
            c.size != np.shape(arrays[n])[-1] for c, n in _sized(step, arrays)
        ):
            break
        if step.operation in ("rescale", "mul"):
            signs = signs * np.where(constants[0] < 0, -1, 1)
        elif step.operation not in _RISING or (step.operation, values[0]) == (
            "sub",
            step.inputs[1],
        ):
            break
        chain.append(step)
        name = values[0]
        if step.operation == "rescale":
            return chain[::-1], signs
    return [], signs


def _sized(step: Node, arrays: Mapping[str, Any]) -> list[tuple[np.ndarray, str]]:
    """The arrays of a step that are no single numbers, and their names."""
    return [(arrays[n].reshape(-1), n) for n in step.inputs if n in arrays and arrays[n].ndim]


def _turn(
    rescale: Node, nodes: Mapping[str, Node], arrays: dict[str, Any], signs: np.ndarray
) -> bool:
    """Gives a product the sign with which its chain does not fall; whether that can be done."""
    product = nodes.get(rescale.inputs[0])
    if product is None or product.operation != "integer_product":
        return False
    # Larger sums are int32, which ONNX Runtime does not pool.
    if product["largest_sum"] >= EXACT:
        return False
    if np.all(signs > 0):
        return True
    bits, offset = product["weight"]
    if offset == int(offset):
        return False
    kernel, scale = product.inputs[1], rescale.inputs[1]
    form = integers.form(bits, offset)
    codes = integers.codes_of(arrays[kernel], form)
    codes = np.where(signs < 0, 2**bits - 1 - codes, codes)
    arrays[kernel] = (codes * form.code_factor + form.code_shift).astype(np.int8)
    arrays[scale] = (arrays[scale] * signs).astype(np.float32)
    return True
