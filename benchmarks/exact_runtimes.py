"""What exported files of a frozen network give in their own runtimes; a part of `exact.py`."""

import pathlib
import tempfile
from typing import Any

import numpy as np
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx

from uniq_jax import deploy
from uniq_jax.deploy.runtimes import load_openvino

EXACT = ("ONNX Runtime", "OpenVINO", "OpenVINO binary", "QONNX")
"""Forms that keep every operation; "OpenVINO fast" does not."""

_OPENVINO = {"INFERENCE_PRECISION_HINT": "f32"}


def compared(
    model: Any, frozen: deploy.FrozenNetwork, images: np.ndarray, qonnx_images: int
) -> dict[str, dict[str, int]]:
    """Images and codes that were compared with `frozen`, and how many differ, by runtime.

    Of OpenVINO's own format and of QONNX classes alone are compared.

    Args:
      model: that `frozen` was made of.
      frozen: with integer thresholds.
      images: float32, normalized.
      qonnx_images: how many of them QONNX runs, which takes seconds for each.
    """
    shape = images.shape[1:]
    fast = deploy.freeze(model, shape, integer_thresholds=False)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        path = directory / "network.onnx"
        deploy.export_onnx(frozen, path, form="integer")
        found["ONNX Runtime"] = deploy.compare_onnx(frozen, path, [images])
        deploy.export_onnx(frozen, path, batch=len(images))
        found["OpenVINO"] = deploy.compare_onnx(frozen, path, [images], runtime="openvino")
        deploy.export_onnx(fast, path, batch=len(images))
        found["OpenVINO fast"] = deploy.compare_onnx(fast, path, [images], runtime="openvino")
        if _is_binary(frozen):
            deploy.export_openvino(frozen, directory / "network.xml", batch=len(images))
            core = load_openvino().Core()
            run = core.compile_model(directory / "network.xml", "CPU", _OPENVINO)
            found["OpenVINO binary"] = deploy.compare_onnx(
                frozen, lambda batch: run(batch)["logits"], [images]
            )
        found["QONNX"] = _qonnx(frozen, fast, images[:qonnx_images], path)
    return {
        runtime: {
            "images": check.images,
            "class_mismatches": check.class_mismatches,
            "codes": check.codes,
            "mismatches": check.mismatches,
        }
        for runtime, check in found.items()
    }


def _is_binary(frozen: deploy.FrozenNetwork) -> bool:
    return any((x.weight_bits, x.activation_bits) == (1, 1) for x in deploy.layers(frozen))


def _qonnx(
    frozen: deploy.FrozenNetwork,
    fast: deploy.FrozenNetwork,
    images: np.ndarray,
    path: pathlib.Path,
) -> deploy.ExportCheck:
    """The form of levels, with thresholds on sums unless these leave float32's integers."""
    try:
        deploy.export_qonnx(frozen, path, batch=len(images), levels=True)
    except NotImplementedError:
        deploy.export_qonnx(fast, path, batch=len(images), levels=True)
    model = ModelWrapper(str(path))

    def run(batch: np.ndarray) -> np.ndarray:
        first = {"images": np.ascontiguousarray(batch.transpose(0, 3, 1, 2))}
        return execute_onnx(model, first)["logits"]

    return deploy.compare_onnx(frozen, run, [images])
