"""Reads and writes .safetensors files."""

from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from uniq_jax.interop.dtypes import DTYPES

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def read_arrays(stream: BinaryIO) -> dict[str, np.ndarray]:
    """Arrays by their names, which are sorted: the format keeps no order.

    Raises:
      ValueError: if it is no .safetensors file, or has a dtype that NumPy can't hold.
    """
    try:
        # Not safetensors.numpy.load: it knows neither bfloat16 nor the types of 8 bits.
        tensors = sorted(safetensors.deserialize(stream.read()))
    except safetensors.SafetensorError as error:
        raise ValueError(f"is a damaged .safetensors file: {error}") from error
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _DTYPES:
            allowed = ", ".join(_DTYPES)
            raise ValueError(f"has {name!r} of type {tensor['dtype']}, not one of {allowed}")
        dtype = DTYPES[_DTYPES[tensor["dtype"]]]
        array = np.frombuffer(tensor["data"], dtype.newbyteorder("<")).astype(dtype, copy=False)
        arrays[name] = array.reshape(tensor["shape"])
    return arrays


def write_arrays(stream: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, which must be in C order.

    Raises:
      ValueError: if the format has no such dtype.
    """
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES.values():
            raise ValueError(f"{name!r} has dtype {array.dtype}, which .safetensors can't hold")
    stream.write(safetensors.numpy.save(dict(arrays)))
