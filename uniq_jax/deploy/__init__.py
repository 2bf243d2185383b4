"""From a trained model to an integer network: freeze, check, save, and what it costs.

Loading a frozen network and calling it needs jax, numpy and safetensors only; what looks at models
is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from uniq_jax.deploy.network import About as About
from uniq_jax.deploy.network import FrozenNetwork as FrozenNetwork
from uniq_jax.deploy.overview import Layer as Layer
from uniq_jax.deploy.overview import layers as layers
from uniq_jax.deploy.overview import summary as summary
from uniq_jax.deploy.packed_file import load as load
from uniq_jax.deploy.packed_file import save as save

if TYPE_CHECKING:
    from uniq_jax.deploy.freezing import freeze as freeze
    from uniq_jax.deploy.onnx_check import ExportCheck as ExportCheck
    from uniq_jax.deploy.onnx_check import compare_onnx as compare_onnx
    from uniq_jax.deploy.onnx_export import export_onnx as export_onnx
    from uniq_jax.deploy.onnx_metadata import onnx_about as onnx_about
    from uniq_jax.deploy.openvino_export import export_openvino as export_openvino
    from uniq_jax.deploy.qonnx_export import export_qonnx as export_qonnx
    from uniq_jax.deploy.runtimes import compile_openvino as compile_openvino
    from uniq_jax.deploy.runtimes import open_onnxruntime as open_onnxruntime
    from uniq_jax.deploy.size import Size as Size
    from uniq_jax.deploy.size import model_size as model_size
    from uniq_jax.deploy.stablehlo import export_stablehlo as export_stablehlo
    from uniq_jax.deploy.verification import LayerCheck as LayerCheck
    from uniq_jax.deploy.verification import Verification as Verification
    from uniq_jax.deploy.verification import verify as verify

# Flax imports optax; ONNX and its runtimes are extras.
_LAZY = {
    "ExportCheck": "onnx_check",
    "LayerCheck": "verification",
    "Size": "size",
    "Verification": "verification",
    "compare_onnx": "onnx_check",
    "compile_openvino": "runtimes",
    "export_onnx": "onnx_export",
    "export_openvino": "openvino_export",
    "export_qonnx": "qonnx_export",
    "export_stablehlo": "stablehlo",
    "freeze": "freezing",
    "model_size": "size",
    "onnx_about": "onnx_metadata",
    "open_onnxruntime": "runtimes",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
