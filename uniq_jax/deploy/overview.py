"""The layers of a frozen network, and how the output of each becomes codes again."""

import dataclasses
import math

from uniq_jax.deploy.graph import Graph, Node
from uniq_jax.deploy.network import FrozenNetwork

INTEGER_THRESHOLDS = "integer thresholds"
_FLOAT_LAYER = "float layer"

_FLOAT_PRODUCTS = ("conv_general_dilated", "dot_general")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One product of a frozen network.

    Attributes:
      path: of the layer in the model; for float products the name of their node.
      shape: of the kernel.
      weight_bits, activation_bits: 32 in a float product.
      packed_bytes: of the kernel in a packed file.
      output: "integer thresholds" where the next codes are decided on integer sums; "float
        epilogue: …" where they are decided on float32 numbers, and why; both where both are;
        "float layer" where such a one comes first; or "logits".
    """

    path: str
    shape: tuple[int, ...]
    weight_bits: int
    activation_bits: int
    packed_bytes: int
    output: str

    @property
    def has_float_epilogue(self) -> bool:
        """Whether float32 operations lie between its integer sums and the next codes."""
        return self.weight_bits < 32 and "float epilogue" in self.output


def layers(network: FrozenNetwork) -> tuple[Layer, ...]:
    """The products of a frozen network, in their order."""
    users = network.graph.users()
    found = []
    for node in network.graph.nodes:
        is_float = node.operation in _FLOAT_PRODUCTS
        if is_float and node.inputs[1] not in network.arrays:
            continue  # Of two activations, as in attention.
        if not (is_float or node.operation.endswith("product")):
            continue
        weight, activation = (32, 32) if is_float else (node["weight"][0], node["activation"][0])
        shape = tuple(network.arrays[node.inputs[1]].shape)
        size = -(-math.prod(shape) * weight // 8)
        path, output = node.layer or node.name, _output(network.graph, node, users)
        found.append(Layer(path, shape, weight, activation, size, output))
    return tuple(found)


def summary(network: FrozenNetwork) -> str:
    """The layers of a frozen network as text, a line for each.

    A line has the layer's path, the shape of its kernel, the bits of its weights and inputs, the
    bytes of its kernel in a packed file, and what quantizes its output: integer thresholds on the
    sums, or a float epilogue, float32 operations that cannot become thresholds, with the reason.

    Example:
      >>> from flax import nnx
      >>> from uniq_jax import deploy, models
      >>> model = models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0), method="uniq",
      ...                       weight_bits=2, activation_bits=2)
      >>> text = summary(deploy.freeze(model, (8, 8, 3)))
      >>> print(text.splitlines()[2])
      layer1/0/conv2  3x3x16x16  2 x 2 bits    576 B  float epilogue: residual sum
    """
    rows = [
        (
            layer.path,
            "x".join(map(str, layer.shape)),
            "float32" if layer.weight_bits == 32 else _bits(layer),
            f"{layer.packed_bytes:,} B",
            layer.output,
        )
        for layer in layers(network)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]}"
        for row in rows
    )


def _bits(layer: Layer) -> str:
    return f"{layer.weight_bits} x {layer.activation_bits} bits"


def _output(graph: Graph, product: Node, users: dict[str, list[Node]]) -> str:
    """What becomes of a product's sums on the way to the next codes."""
    direct = users.get(product.name, [])
    found = [INTEGER_THRESHOLDS] if any(n.operation == "encode_sums" for n in direct) else []
    reached = {n.name for n in direct if n.operation != "encode_sums"}
    if reached or product.name == graph.output:
        found.append(_epilogue(graph, reached))
    return "; ".join(found)


def _epilogue(graph: Graph, reached: set[str]) -> str:
    """The reason of the first quantizer that these nodes lead to, or what comes before it."""
    for node in graph.nodes:
        if node.name not in reached and not reached.intersection(node.inputs):
            continue
        if node.operation == "encode":
            why = dict(node.attributes).get("epilogue", "")
            return f"float epilogue: {why}" if why else "float epilogue"
        if node.operation in _FLOAT_PRODUCTS and node.name not in reached:
            return _FLOAT_LAYER
        if node.operation != "encode_sums":
            reached.add(node.name)
    return "logits"
