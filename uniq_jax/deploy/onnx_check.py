"""Exported files in their runtimes, and whether they are the frozen network: code by code."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import jax
import numpy as np

from uniq_jax.deploy.network import FrozenNetwork
from uniq_jax.deploy.runtimes import compile_openvino, open_onnxruntime
from uniq_jax.deploy.verification import (
    LayerCheck,
    Verification,
    encodes_of,
    largest_difference,
    largest_logit,
    logits_and_codes,
)

Runtime = Literal["onnxruntime", "openvino"]
Outputs = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ExportCheck(Verification):
    """An exported file and the frozen network on the same images.

    `layers` are () where only logits were compared.
    """

    def summary(self) -> str:
        """One line."""
        return (
            f"mismatching classes: {self.class_mismatches} of {self.images}; "
            f"mismatching codes: {self.mismatches} of {self.codes}"
        )


def compare_onnx(
    network: FrozenNetwork,
    file: str | os.PathLike[str] | Callable[[np.ndarray], Any],
    batches: Iterable[Any],
    *,
    runtime: Runtime = "onnxruntime",
) -> ExportCheck:
    """Compares an exported file, run by its runtime, with the frozen network.

    Of ONNX files the codes are compared too: a copy in memory has them as outputs. Where a fast
    form is checked, that may keep its runtime from joining some nodes.

    Args:
      network: that the file was made of.
      file: path of an ONNX file; or, for any other format, a function of images to logits.
      batches: of images, float32 (batch, height, width, channels), normalized.
      runtime: that runs the file: "onnxruntime" or "openvino".

    Raises:
      ValueError: if there are no batches, the runtime is no such, or the file is of another
        network.
    """
    if runtime not in get_args(Runtime):
        allowed = ", ".join(map(repr, get_args(Runtime)))
        raise ValueError(f"runtime (={runtime!r}) must be one of {allowed}")
    encodes = encodes_of(network)
    if callable(file):
        encodes, of_file = [], _logits_only(file)
    else:
        of_file = _with_codes(file, [node.name for node in encodes], runtime)

    total, classes, largest, difference = 0, 0, 0.0, 0.0
    counts, mismatches = np.zeros(len(encodes), int), np.zeros(len(encodes), int)
    for batch in batches:
        images = np.asarray(batch, np.float32)
        logits, codes = jax.tree.map(np.asarray, logits_and_codes(network, images))
        found = of_file(images)
        for i, (node, wanted) in enumerate(zip(encodes, codes)):
            counts[i] += wanted.size
            mismatches[i] += int(np.sum(wanted != found[node.name]))
        if found["logits"].shape != logits.shape:
            raise ValueError(
                f"file gives logits of shape {found['logits'].shape}, and network {logits.shape}"
            )
        total += len(images)
        classes += int(np.sum(logits.argmax(-1) != found["logits"].argmax(-1)))
        difference = max(difference, largest_difference(logits, found["logits"]))
        largest = max(largest, largest_logit(logits))
    if not total:
        raise ValueError("batches must hold at least one batch")
    layers = tuple(
        LayerCheck(node.layer, int(n), int(m)) for node, n, m in zip(encodes, counts, mismatches)
    )
    return ExportCheck(total, layers, difference / (largest or 1.0), classes)


def _logits_only(function: Callable[[np.ndarray], Any]) -> Outputs:
    return lambda images: {"logits": np.asarray(function(images))}


def _with_codes(file: str | os.PathLike[str], names: list[str], runtime: Runtime) -> Outputs:
    """What gives the logits and the codes of these quantizers, axes in the network's order."""
    from uniq_jax.deploy.onnx_builder import onnx
    from uniq_jax.deploy.onnx_emitter import NCHW, NHWC, code_name

    model = onnx.load(os.fspath(file))
    made = {output for node in model.graph.node for output in node.output}
    found = {}
    for name in names:
        layout = next((x for x in (NCHW, NHWC, "") if code_name(name, x) in made), None)
        if layout is None:
            raise ValueError(
                f"file (={os.fspath(file)!r}) has no codes of {name!r}: it is of another"
            )
        found[name] = layout
        tensor = onnx.helper.make_empty_tensor_value_info(code_name(name, layout))
        model.graph.output.append(tensor)
    wanted = ["logits", *(code_name(name, layout) for name, layout in found.items())]
    run = _opened(model.SerializeToString(), wanted, runtime)

    def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
        logits, *codes = run(images)
        turned = {
            name: value.transpose(0, 2, 3, 1) if layout == NCHW else value
            for (name, layout), value in zip(found.items(), codes)
        }
        return {"logits": logits, **turned}

    return outputs


def _opened(
    content: bytes, outputs: list[str], runtime: Runtime
) -> Callable[[np.ndarray], list[np.ndarray]]:
    if runtime == "onnxruntime":
        session = open_onnxruntime(content)
        return lambda images: session.run(outputs, {"images": images})
    compiled = compile_openvino(content)

    def run(images: np.ndarray) -> list[np.ndarray]:
        results = compiled({"images": images})
        return [results[name] for name in outputs]

    return run
