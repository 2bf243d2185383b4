"""Where the bits of binary products change, as edges of a value far in front of them.

Between a residual sum and a binary product stand batch norm, a ReLU and the quantizer: functions of
one channel, monotone, of which one bit is left. So there is one number for each channel at which
that bit changes, and all of it is one comparison with the sum itself. The number is found by asking
the steps in front of it, each rounded to float32 as the network rounds it: no bit moves.
"""

from collections.abc import Callable, Mapping

import numpy as np

from uniq_jax.deploy.bisection import LARGEST, SMALLEST, bisect, floats
from uniq_jax.deploy.channels_first import ChannelsFirst
from uniq_jax.deploy.graph import Node

_STEPS: Mapping[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
}


def bit_edges(network: ChannelsFirst, encode: Node) -> tuple[str, np.ndarray, np.ndarray]:
    """The edges of an `encode` of one bit.

    Args:
      network: of `channels_first`.
      encode: one of its nodes; its input is (n, channels, height, width).

    Returns:
      Name of the value that is compared, from which the node's input comes through constants;
      edges, float32 (1, channels, 1, 1); and where the bit rises, bool of the same shape: it is 1
      where the value is above its edge, and elsewhere where it is not.
    """
    channels = network.shapes[encode.inputs[0]][1]
    start, steps = _steps(network, encode.inputs[0], channels)
    signs = np.ones(channels, np.float32)
    for node in steps:
        signs *= _direction(network, node, channels)
    limit = network.arrays[encode.inputs[1]]
    if encode["negate"]:
        signs = -signs

    def reached(keys: np.ndarray) -> np.ndarray:
        x = floats(keys) * signs
        with np.errstate(over="ignore"):
            for node in steps:
                x = _STEPS[node.operation](*_operands(network, node, x))
        return (-x if encode["negate"] else x) >= limit

    keys = bisect(reached, np.full(channels, SMALLEST), np.full(channels, LARGEST))
    # The largest number that does not reach the limit yet; nothing is below the smallest one.
    below = floats(np.maximum(keys - 1, SMALLEST))
    # Where the bit falls, what reaches it lies at -key and below.
    edges = np.where(signs > 0, below, -floats(np.minimum(keys, LARGEST)))
    shape = (1, channels, 1, 1)
    return start, edges.reshape(shape), (signs > 0).reshape(shape)


def _steps(network: ChannelsFirst, name: str, channels: int) -> tuple[str, list[Node]]:
    """What a value is made from through constants of one number a channel, and how, in order."""
    nodes = {node.name: node for node in network.graph.nodes}
    steps = []
    while name in nodes and nodes[name].operation in _STEPS:
        constants = [network.arrays[i] for i in nodes[name].inputs if i in network.arrays]
        values = [i for i in nodes[name].inputs if i not in network.arrays]
        per_channel = all(c.size == 1 or c.shape == (1, channels, 1, 1) for c in constants)
        divides_by_value = nodes[name].operation == "div" and values != [*nodes[name].inputs[:1]]
        if len(values) != 1 or not per_channel or divides_by_value:
            break
        steps.append(nodes[name])
        (name,) = values
    return name, steps[::-1]


def _operands(network: ChannelsFirst, node: Node, x: np.ndarray) -> list[np.ndarray]:
    """A step's inputs, (channels,) or (1,), `x` among them."""
    return [network.arrays[i].reshape(-1) if i in network.arrays else x for i in node.inputs]


def _direction(network: ChannelsFirst, node: Node, channels: int) -> np.ndarray:
    """(channels,): -1 where a step falls, else 1."""
    falls = np.zeros(channels, bool)
    if node.operation == "neg" or (node.operation == "sub" and node.inputs[0] in network.arrays):
        falls[:] = True
    if node.operation in ("mul", "div"):
        (array,) = (network.arrays[i] for i in node.inputs if i in network.arrays)
        falls |= array.reshape(-1) < 0
    return np.where(falls, np.float32(-1), np.float32(1))
