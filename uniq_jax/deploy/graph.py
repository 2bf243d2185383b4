"""The frozen network as data: operations in their order, and the arrays they use."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# A size of the batch, times an integer; what else a size may be is an integer.
Size = int | tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
      name: of its output.
      operation: of `uniq_jax.deploy.operations.NAMES`.
      inputs: names of outputs of earlier nodes, of arrays, or "input".
      attributes: name to numbers, strings, or tuples of them: what is no array.
      layer: path of the layer of the model that it comes from, or "".
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    layer: str = ""

    def __getitem__(self, attribute: str) -> Any:
        return dict(self.attributes)[attribute]


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be executed; hashable.

    Attributes:
      nodes: each with a name of its own.
      output: the node whose output is the network's.
      image_shape: of one input image, float32: (height, width, channels).
    """

    nodes: tuple[Node, ...]
    output: str
    image_shape: tuple[int, ...]

    def node(self, name: str) -> Node:
        """The node of this name."""
        return next(node for node in self.nodes if node.name == name)

    def users(self) -> dict[str, list[Node]]:
        """For each name, the nodes that have it as an input."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users.setdefault(name, []).append(node)
        return users


def pruned(graph: Graph, arrays: Mapping[str, Any]) -> tuple[Graph, dict[str, Any]]:
    """The graph and its arrays without what the output does not depend on."""
    wanted = {graph.output}
    kept = []
    for node in reversed(graph.nodes):
        if node.name in wanted:
            kept.append(node)
            wanted.update(node.inputs)
    graph = dataclasses.replace(graph, nodes=tuple(reversed(kept)))
    return graph, {name: array for name, array in arrays.items() if name in wanted}


def replaced(graph: Graph, changes: Mapping[str, Sequence[Node]]) -> Graph:
    """The graph with each node named in `changes` replaced by these; the last keeps its name."""
    nodes = [new for old in graph.nodes for new in changes.get(old.name, (old,))]
    return dataclasses.replace(graph, nodes=tuple(nodes))
