"""A frozen network with fewer float operations, for files whose codes may flip.

Scales, batch norm and biases behind a product become one factor and one summand for each channel,
and thresholds of a quantizer move through them, and through PReLU and ReLU, to the product. Every
such step is exact in real numbers and rounds in float32. The new graph has two operations more:

    affine  x, scale, shift      scale * x + shift
    count   x, thresholds        how many rows of thresholds (n, channels) x reaches; `grid`
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from uniq_jax.deploy.graph import Graph, Node, pruned
from uniq_jax.deploy.uniform import uniform_step

# A threshold that every number reaches, and one that none does.
_ALWAYS, _NEVER = -1e30, 1e30

Affine = tuple[str, np.ndarray, np.ndarray]


def folded(
    graph: Graph, arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Graph, dict[str, Any], dict[str, tuple[int, ...]]]:
    """The graph with affine nodes, its arrays, and the shapes of its nodes' outputs.

    Args:
      graph: of a frozen network, or of a float one.
      arrays: its arrays.
      shapes: of its nodes' outputs.
    """
    folder = _Folder(graph, arrays, dict(shapes))
    return *folder.run(), folder.shapes


class _Folder:
    def __init__(self, graph: Graph, arrays: Mapping[str, Any], shapes: dict[str, tuple[int, ...]]):
        self.graph = graph
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.shapes = shapes
        self.users = graph.users()
        self.by_name = {node.name: node for node in graph.nodes}
        # What each node is of an earlier one.
        self.chains: dict[str, Affine] = {}

    def run(self) -> tuple[Graph, dict[str, Any]]:
        for node in self.graph.nodes:
            chain = self._step(node)
            if chain is not None:
                self.chains[node.name] = chain
        kept: list[Node] = []
        for node in self.graph.nodes:
            if node.name in self.chains:
                kept.append(self._affine(node.name, node.name, node.layer))
            elif node.operation == "encode" and not node["negate"]:
                kept.extend(self._encode(node))
            else:
                kept.append(node)
        graph = dataclasses.replace(self.graph, nodes=tuple(kept))
        return pruned(graph, self.arrays)

    def _step(self, node: Node) -> Affine | None:
        """A node as an affine function of the node that a chain begins with."""
        values = [name for name in node.inputs if name not in self.arrays]
        constants = [self.arrays[name] for name in node.inputs if name in self.arrays]
        if len(values) != 1 or len(constants) > 1 or values[0] == "input":
            return None
        channels = self.shapes[node.name][-1]
        number = np.zeros(1)
        if constants:
            number = constants[0]
            if number.size not in (1, channels) or number.size != (number.shape or (1,))[-1]:
                return None
            number = number.reshape(-1).astype(np.float64)
        base, scale, shift = self.chains.get(values[0], (values[0], np.ones(1), np.zeros(1)))
        first = node.inputs[0] in self.arrays
        match node.operation:
            case "rescale" | "mul":
                return base, scale * number, shift * number
            case "div" if not first:
                return base, scale / number, shift / number
            case "add":
                return base, scale, shift + number
            case "sub" if first:
                return base, -scale, number - shift
            case "sub":
                return base, scale, shift - number
            case "neg":
                return base, -scale, -shift
            case "max" if np.all(number == np.finfo(np.float32).min):
                return base, scale, shift
        return None

    def _affine(self, name: str, of: str, layer: str = "") -> Node:
        base, scale, shift = self.chains[of]
        self.arrays[f"{name}_scale"] = scale.astype(np.float32)
        self.arrays[f"{name}_shift"] = shift.astype(np.float32)
        return Node(name, "affine", (base, f"{name}_scale", f"{name}_shift"), (), layer)

    def _encode(self, node: Node) -> list[Node]:
        """A quantizer, with its thresholds as near to the product as they can be."""
        thresholds = self.arrays[node.inputs[1]].astype(np.float64)[:, None]
        bits, offset = node["grid"]
        is_uniform = uniform_step(self.arrays[node.inputs[1]], offset) is not None
        x = node.inputs[0]
        if is_uniform or bits > 5:
            return [
                dataclasses.replace(
                    node, inputs=(self._unrectified(x, thresholds), *node.inputs[1:])
                )
            ]
        while len(self.users.get(x, ())) == 1:
            step = self.by_name.get(x)
            if x in self.chains:
                base, scale, shift = self.chains[x]
                if np.any(scale < 0):
                    return self._signed(node, x, thresholds)
                thresholds = _through(thresholds, scale, shift)
                x = base
            elif step is None or (moved := self._before(step, thresholds)) is None:
                break
            else:
                x, thresholds = step.inputs[0], moved
        return [self._count(node, x, thresholds)]

    def _signed(self, node: Node, x: str, thresholds: np.ndarray) -> list[Node]:
        """The count behind the signs of a chain's scales, which fall with them."""
        base, scale, shift = self.chains[x]
        name = f"{node.name}_signed"
        self.shapes[name] = self.shapes[base]
        thresholds = _through(thresholds, np.abs(scale), shift)
        self.chains[name] = (base, np.where(scale < 0, -1.0, 1.0), np.zeros(1))
        return [self._affine(name, name), self._count(node, name, thresholds)]

    def _count(self, node: Node, x: str, thresholds: np.ndarray) -> Node:
        name = f"{node.name}_count"
        self.arrays[name] = np.clip(thresholds, _ALWAYS, _NEVER).astype(np.float32)
        return Node(node.name, "count", (x, name), (("grid", node["grid"]),), node.layer)

    def _before(self, step: Node, thresholds: np.ndarray) -> np.ndarray | None:
        """The thresholds in front of an increasing function, or None if it is none."""
        if step.operation == "prelu":
            slope = self.arrays[step.inputs[1]].reshape(-1).astype(np.float64)
            if np.any(slope <= 0):
                return None
            return np.where(thresholds > 0, thresholds, thresholds / slope)
        if self._is_relu(step):
            return np.where(thresholds > 0, thresholds, _ALWAYS)
        return None

    def _is_relu(self, step: Node) -> bool:
        limit = self.arrays.get(step.inputs[-1]) if step.operation == "max" else None
        return limit is not None and limit.size == 1 and float(limit.reshape(())) == 0

    def _unrectified(self, x: str, thresholds: np.ndarray) -> str:
        """What a quantizer may see in place of a rectified input: codes are 0 below 0 anyway."""
        step = self.by_name.get(x)
        if step is None or len(self.users[x]) > 1 or not self._is_relu(step):
            return x
        return step.inputs[0] if thresholds[0] > 0 else x


def _through(thresholds: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The thresholds of x where those of `scale * x + shift` are given, no scale negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = (thresholds - shift) / scale
    return np.where(scale == 0, np.where(thresholds <= shift, _ALWAYS, _NEVER), moved)
