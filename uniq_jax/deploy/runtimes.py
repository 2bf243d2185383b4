"""The runtimes of exported files, opened as they have to be."""

import os
import sys
from typing import Any


def compile_openvino(model: str | os.PathLike[str] | bytes, *, threads: int | None = None) -> Any:
    """A file compiled by OpenVINO for this machine's CPU, in float32 wherever it is not int8.

    OpenVINO's default is bfloat16 where the processor has it, which changes logits by per cents.

    Args:
      model: path of a .onnx or .xml file, or the content of an ONNX file.
      threads: to run on; None for OpenVINO's choice.

    Returns:
      An `openvino.CompiledModel`.

    Raises:
      ModuleNotFoundError: without the package openvino.
    """
    openvino = load_openvino()
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    core = openvino.Core()
    read = core.read_model(model if isinstance(model, bytes) else os.fspath(model))
    return core.compile_model(read, "CPU", options)


def load_openvino() -> Any:
    """The package, without the report of its import.

    It sends that over the network from a fork of this process, which JAX's threads do not survive.

    Raises:
      ModuleNotFoundError: without the package openvino.
    """
    if "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # pyright: ignore[reportArgumentType]
        try:
            import openvino.tools.ovc
        except ModuleNotFoundError as error:
            if error.name != "openvino":
                raise
            raise ModuleNotFoundError(
                "OpenVINO is missing: pip install 'uniq_jax[openvino]'", name=error.name
            ) from error
        finally:
            del sys.modules["openvino_telemetry"]
    import openvino

    return openvino


def open_onnxruntime(model: str | os.PathLike[str] | bytes, *, threads: int | None = None) -> Any:
    """An ONNX file as a session of ONNX Runtime on this machine's CPU.

    Args:
      model: path of the file, or its content.
      threads: to run on; None for ONNX Runtime's choice.

    Returns:
      An `onnxruntime.InferenceSession`.

    Raises:
      ModuleNotFoundError: without the package onnxruntime.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ONNX Runtime is missing: pip install 'uniq_jax[onnx]'", name=error.name
        ) from error
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    content = model if isinstance(model, bytes) else os.fspath(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
