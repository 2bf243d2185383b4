"""Bytes of a quantized kernel where it is deployed."""

import math

import jax

from uniq_jax.nn.quantizer import WeightQuantizer
from uniq_jax.quantizers import packed_size

_FLOAT_BYTES = 4


def packed_kernel_bytes(
    quantizer: WeightQuantizer, kernel: jax.Array | jax.ShapeDtypeStruct
) -> int:
    """Bytes of the packed codes of `kernel` and of the float32 scales that are not learned.

    Learned scales are variables of the quantizer, and counted with other variables. Nothing is
    computed.
    """
    codes = packed_size(math.prod(kernel.shape), quantizer.method.bits)
    if quantizer.method.parameter_types:
        return codes
    scale = jax.eval_shape(quantizer.encode, kernel).scale
    return codes + _FLOAT_BYTES * math.prod(scale.shape)
