"""Frozen networks as QONNX files."""

import dataclasses
import json
import os
from pathlib import Path

from uniq_jax.deploy import qonnx_operations
from uniq_jax.deploy.channels_first import channels_first
from uniq_jax.deploy.network import FrozenNetwork
from uniq_jax.deploy.whole_files import written


def export_qonnx(
    network: FrozenNetwork,
    path: str | os.PathLike[str],
    *,
    batch: int = 1,
    levels: bool | None = None,
) -> None:
    """Writes a frozen network in QONNX, the dialect of ONNX for few bits (arXiv:2206.07527).

    Kernels are `IntQuant` operations with the bits of their codes. There are two forms:

    - of values: `IntQuant` quantizes activations whose thresholds are evenly spaced, with
      `scale * (code − zeropt)` as its output, `MultiThreshold` all others; products are those of
      values. What tools for hardware start from; a rounding may flip a code.
    - of levels: every quantizer is a `MultiThreshold`, products are those of integers, and where
      only a quantizer follows, its thresholds are on their sums, for each channel. Its codes are
      the frozen network's, every one.

    "images" is float32 (batch, channels, height, width), normalized as `network.about` says, which
    the file's metadata hold as JSON under "about"; "logits" is float32 (batch, classes).

    Args:
      network: of `uniq_jax.freeze`; for the form of values with `integer_thresholds=False`.
      path: of the file, by custom ending in .onnx.
      batch: images of a call; QONNX's tools want every size known.
      levels: whether to write the form of levels. None for that of values, unless the network has
        integer thresholds on sums.

    Raises:
      ValueError: if `batch` is below 1, or `levels` is False for a network with integer thresholds.
      NotImplementedError: if the network has an operation that has no form here, or integer sums of
        2**24 and more in front of integer thresholds; the message names it.
      OSError: if the file cannot be written.
    """
    if batch < 1:
        raise ValueError(f"batch (={batch}) must be at least 1")
    has_sums = any(node.operation == "encode_sums" for node in network.graph.nodes)
    if levels is None:
        levels = has_sums
    if has_sums and not levels:
        raise ValueError(
            "levels (=False) must be True for a network with integer thresholds; "
            "freeze(..., integer_thresholds=False) makes one without"
        )
    first = channels_first(network.graph, network.arrays)
    model = qonnx_operations.model(first, batch, levels=levels)
    model.metadata_props.add(key="format", value="uniq_jax.qonnx")
    model.metadata_props.add(key="about", value=json.dumps(dataclasses.asdict(network.about)))
    with written(Path(path)) as (file,):
        file.write_bytes(model.SerializeToString())
