"""Frozen networks as OpenVINO's files."""

import dataclasses
import json
import os
from pathlib import Path

from uniq_jax.deploy import limits, openvino_operations
from uniq_jax.deploy.channels_first import ChannelsFirst, channels_first
from uniq_jax.deploy.matrices import is_conv
from uniq_jax.deploy.network import FrozenNetwork
from uniq_jax.deploy.onnx_export import export_onnx
from uniq_jax.deploy.openvino_values import openvino
from uniq_jax.deploy.whole_files import written


def export_openvino(
    network: FrozenNetwork, path: str | os.PathLike[str], *, batch: int | None = None
) -> None:
    """Writes a frozen network as OpenVINO's IR: an .xml file, and its arrays in a .bin beside it.

    Where layers have 1-bit weights and inputs they become BinaryConvolution, which no ONNX file can
    say; all other layers of such a network are float32 ones of the same numbers. Other networks are
    those of `export_onnx`, converted.

    "images" is float32 (batch, height, width, channels), normalized as `network.about` says, which
    the file's runtime information holds as JSON under ("uniq_jax", "about"); "logits" is float32
    (batch, classes). Compile with INFERENCE_PRECISION_HINT="f32": some processors would round to
    bfloat16 else.

    Args:
      network: of `uniq_jax.freeze`. With integer thresholds (the default there) binary layers take
        up the quantizers behind them, and are fastest.
      path: of the .xml file.
      batch: images of a call; None for any number, which for a network with binary layers is 1:
        OpenVINO wants their sizes known. `openvino.Model.reshape` changes it before compiling.

    Raises:
      ValueError: if `path` does not end in .xml, or `batch` is below 1.
      NotImplementedError: if the network has an operation that has no form here; the message names
        it.
      OSError: if a file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"path (={str(path)!r}) must end in .xml")
    if batch is not None and batch < 1:
        raise ValueError(f"batch (={batch}) must be at least 1, or None")
    first = _binary_form(network)
    with written(path.with_suffix(".bin"), path) as (arrays, described):
        if first is not None:
            model = openvino_operations.model(first, batch or 1)
        else:
            source = arrays.with_suffix(".onnx")
            export_onnx(network, source, batch=batch)
            model = openvino.convert_model(source)
        about = json.dumps(dataclasses.asdict(network.about))
        model.set_rt_info(about, ["uniq_jax", "about"])
        openvino.save_model(model, described, compress_to_fp16=False)


def _binary_form(network: FrozenNetwork) -> ChannelsFirst | None:
    """The network with channels first, if any of its layers becomes a BinaryConvolution."""
    products = [node for node in network.graph.nodes if node.operation == "integer_product"]
    bits = ((node["activation"][0], node["weight"][0]) for node in products if is_conv(node))
    if (1, 1) not in bits:
        return None
    first = channels_first(network.graph, network.arrays)
    is_binary = openvino_operations.is_binary
    if not any(is_binary(n, first.arrays) for n in first.graph.nodes):
        return None
    for node in first.graph.nodes:
        if node.operation in ("dot_general", "integer_product") and not is_conv(node):
            kernel = first.arrays.get(node.inputs[1])
            if kernel is not None and kernel.ndim != 2:
                raise limits.refused(node, "a kernel of shape", kernel.shape, "that of a matrix")
    return first
