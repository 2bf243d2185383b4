"""Frozen networks as ONNX files."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

from uniq_jax.deploy import limits, operations
from uniq_jax.deploy.freezing import AS_ASKED
from uniq_jax.deploy.graph import Graph
from uniq_jax.deploy.network import FrozenNetwork
from uniq_jax.deploy.onnx_emitter import NCHW, NHWC, Emitter
from uniq_jax.deploy.onnx_fold import folded
from uniq_jax.deploy.onnx_integer import INTEGER
from uniq_jax.deploy.onnx_metadata import onnx_metadata
from uniq_jax.deploy.onnx_pooling import pooled_early
from uniq_jax.deploy.onnx_qdq import QDQ

Form = Literal["qdq", "integer"]


def export_onnx(
    network: FrozenNetwork,
    path: str | os.PathLike[str],
    *,
    form: Form = "qdq",
    batch: int | None = None,
) -> None:
    """Writes a frozen network as an ONNX file, as a whole or not at all.

    The file's input "images" is float32 (batch, height, width, channels), normalized as
    `network.about` says; its output "logits" is float32 (batch, classes). Its metadata tells the
    format, the form and, as JSON, what `About` holds.

    Args:
      network: of `uniq_jax.freeze`. With integer thresholds (the default there) the form "qdq"
        keeps every operation, and its codes are those of the network; without them it is folded
        into fewer and faster operations, and a few codes flip.
      path: of the file, by custom ending in .onnx.
      form: "qdq", quantize and dequantize nodes, which OpenVINO runs as int8 convolutions and every
        runtime can run; or "integer", integer matrix products of ONNX Runtime, always exact.
      batch: images that the file takes at once; None for any number.

    Raises:
      ValueError: if `form` or `batch` is none of these.
      NotImplementedError: if the network has an operation that no file of this form can express;
        the message names it.
      OSError: if the file cannot be written.
    """
    if form not in get_args(Form):
        raise ValueError(f"form (={form!r}) must be one of {', '.join(map(repr, get_args(Form)))}")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch (={batch!r}) must be an integer, at least 1, or None")
    data = to_onnx(network, form, batch).SerializeToString()
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_onnx(network: FrozenNetwork, form: Form, batch: int | None) -> Any:
    """The ONNX model of a network; arguments as of `export_onnx`."""
    graph, arrays = network.graph, network.arrays
    shapes = {name: tuple(value.shape) for name, value in operations.shapes(graph, arrays).items()}
    limits.check(graph, arrays, shapes)
    if form == "integer":
        graph, arrays, shapes = pooled_early(graph, arrays, shapes)
        emitter = Emitter(graph, arrays, shapes, INTEGER, preferred=NHWC, is_exact=True)
    elif _is_exact(graph):
        options = {"is_exact": True, "has_guards": True}
        emitter = Emitter(graph, arrays, shapes, QDQ, preferred=NCHW, **options)
    else:
        graph, arrays, shapes = folded(graph, arrays, shapes)
        emitter = Emitter(graph, arrays, shapes, QDQ, preferred=NCHW, is_exact=False)
    emitter.run()
    size = "batch" if batch is None else batch
    return emitter.make.model(
        [("images", (size, *network.graph.image_shape))],
        [("logits", (size, *shapes[network.graph.output][1:]))],
        onnx_metadata(form, network.about),
    )


def _is_exact(graph: Graph) -> bool:
    """Whether a file in the form "qdq" keeps every operation: unless the freezing was told not to.

    Float networks have no codes to keep.
    """
    quantizers = [node for node in graph.nodes if node.operation in ("encode", "encode_sums")]
    reasons = [dict(node.attributes).get("epilogue") for node in quantizers]
    return bool(quantizers) and AS_ASKED not in reasons
