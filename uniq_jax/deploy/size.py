"""Bytes of a network, in float32 and with its codes packed."""

import dataclasses
import math
from typing import Any

from flax import nnx

from uniq_jax.nn import QuantizerParam
from uniq_jax.nn.size import packed_kernel_bytes

_FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of a network's arrays, random keys of training aside.

    Attributes:
      float_bytes: all in float32, without quantizers.
      packed_bytes: quantized kernels as packed codes with their float32 scales, everything else,
        learned quantizer state included, in float32.
    """

    float_bytes: int
    packed_bytes: int


def model_size(model: nnx.Module) -> Size:
    """Counts a model's bytes from shapes and widths; its arrays may be ShapeDtypeStructs."""
    float_bytes = packed_bytes = 0
    packed_kernels = {}
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(model))
    for path, module in modules:
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None:
            kernel = module.kernel.get_value()
            packed_kernels[*path, "kernel"] = packed_kernel_bytes(quantizer, kernel)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        size = math.prod(variable.get_value().shape) * _FLOAT_BYTES
        float_bytes += 0 if isinstance(variable, QuantizerParam) else size
        packed_bytes += packed_kernels.get(path, size)
    return Size(float_bytes=float_bytes, packed_bytes=packed_bytes)
