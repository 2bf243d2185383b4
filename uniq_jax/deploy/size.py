"""Bytes of a network, in float32 and with its codes packed."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax.nn import QuantConv, QuantizerParam, QuantLinear
from uniq_jax.quantizers import pack_codes

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
    """Measures a model: its quantized kernels are encoded and packed, and the bytes counted."""
    float_bytes = packed_bytes = 0
    packed_kernels = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, QuantConv | QuantLinear) and module.weight_quantizer is not None:
            quantizer: Any = module.weight_quantizer
            codes, scale, _ = quantizer.encode(module.kernel[...], dtype=jnp.uint8)
            packed = pack_codes(np.asarray(codes), bits=quantizer.method.bits)
            # A learned step is counted among the variables below.
            scales = 0 if quantizer.parameters else scale.size * _FLOAT_BYTES
            packed_kernels[*path, "kernel"] = packed.nbytes + scales
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        size = variable[...].size * _FLOAT_BYTES
        float_bytes += 0 if isinstance(variable, QuantizerParam) else size
        packed_bytes += packed_kernels.get(path, size)
    return Size(float_bytes=float_bytes, packed_bytes=packed_bytes)
