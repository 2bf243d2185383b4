"""What the pickles of PyTorch checkpoints hold: storages, tensors, parameters, NumPy arrays."""

import dataclasses
import math
import re
from typing import Any, Literal

import numpy as np

from uniq_jax.interop.dtypes import DTYPES
from uniq_jax.interop.pickles import Builder, Global, Inert, Stateful

STORAGE_DTYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.storage.UntypedStorage": "uint8",
}
# An axis of stride 0 repeats its elements for nothing, so that a few bytes can become any number.
# Up to this much (or the size of the whole file) it may.
MAX_REPEATED_BYTES = 2**26
_MAX_AXES = 64  # of PyTorch and NumPy alike


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Elements in a row, to be found in the file under a key.

    Attributes:
      key: in the file.
      dtype: of the elements; bytes where tensors say themselves what they hold.
      start: where this storage begins in what the file holds under the key, in elements.
      length: in elements.
      whole_length: of what the file holds under the key.
    """

    key: str
    dtype: np.dtype
    start: int
    length: int
    whole_length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage, as the file describes it: nothing is checked yet.

    Attributes:
      storage: of the elements.
      dtype: of the elements.
      offset: of the first element.
      shape, strides: in elements.
      is_changed: whether PyTorch would conjugate or negate the elements.
    """

    storage: Storage
    dtype: np.dtype
    offset: Any
    shape: Any
    strides: Any
    is_changed: bool

    def view(self, data: bytes, byte_order: Literal["<", ">"], file_size: int) -> np.ndarray:
        """The tensor as a read-only array on `data`.

        Args:
          data: what the file holds under the storage's key.
          byte_order: of `data`.
          file_size: in bytes.

        Raises:
          ValueError: if the tensor is not within its storage, or can't be an array.
        """
        if self.is_changed:
            raise ValueError("is a conjugate or negative view; resolve it before saving")
        axes = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or len(self.shape) > _MAX_AXES:
            raise ValueError(f"has {len(self.shape)} axes and {len(self.strides)} strides")
        if not all(isinstance(x, int) and 0 <= x < 2**63 for x in axes):
            raise ValueError("has an offset, shape or stride that is no number of elements")
        item = self.dtype.itemsize
        # Empty axes let the others be of any length.
        if math.prod(x for x in self.shape if x) * item > max(file_size, MAX_REPEATED_BYTES):
            raise ValueError(f"of shape {self.shape} is larger than the whole file")
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        first_byte = self.storage.start * self.storage.dtype.itemsize
        available = self.storage.length * self.storage.dtype.itemsize
        if (last + 1) * item > available or first_byte + available > len(data):
            raise ValueError(
                f"of shape {self.shape}, strides {self.strides} and offset {self.offset} needs "
                f"{(last + 1) * item} bytes of a storage of {min(available, len(data))}"
            )
        array = np.ndarray(
            self.shape,
            self.dtype.newbyteorder(byte_order),
            buffer=data,
            offset=first_byte + self.offset * item,
            # The stride of an axis of one element means nothing, and may be anything.
            strides=[s * item if n > 1 else 0 for n, s in zip(self.shape, self.strides)],
        )
        return array.astype(self.dtype, copy=False)


class _NumpyDtype(Stateful):
    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    def set_state(self, state: Any) -> None:
        match state:
            case (int(), "<" | ">" | "|" as byte_order, *_):
                self.dtype = self.dtype.newbyteorder(byte_order)
            case _:
                raise ValueError("it has a NumPy dtype in an unknown byte order")


class NumpyArray(Stateful):
    """An array that was pickled by NumPy.

    Attributes:
      value: read-only; None if its elements are of no numeric type.
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        match state:
            case (int(), tuple() as shape, _NumpyDtype() as kind, bool() as is_fortran, data):
                dtype = kind.dtype
            case _:
                return
        if isinstance(data, str):
            data = data.encode("latin-1")  # bytes of Python 2
        if not all(isinstance(n, int) and 0 <= n < 2**63 for n in shape) or len(shape) > _MAX_AXES:
            raise ValueError("it has a NumPy array whose shape is none")
        size = math.prod(shape) * dtype.itemsize
        if not isinstance(data, bytes | bytearray):
            data = b""  # How it is pickled varies.
        if len(data) != size:
            raise ValueError(f"it has a NumPy array of shape {shape} without its {size} bytes")
        order = "F" if is_fortran else "C"
        array = np.ndarray(shape, dtype, buffer=bytes(data), order=order)
        self.value = array.astype(dtype.newbyteorder("="), copy=False)


def persistent_object(identity: Any) -> Any:
    """The storage that a persistent id describes.

    Raises:
      ValueError: if it is no id that `torch.save` writes.
    """
    match identity:
        case ("storage", Global(name), str(key), _, int(whole), *rest) if whole >= 0:
            if name not in STORAGE_DTYPES:
                raise ValueError(f"it has a {name}, which must be one of {list(STORAGE_DTYPES)}")
            dtype = DTYPES[STORAGE_DTYPES[name]]
            match rest:
                case [] | [None]:
                    return Storage(key, dtype, start=0, length=whole, whole_length=whole)
                case [(_, int(start), int(length))] if 0 <= start <= start + length <= whole:
                    return Storage(key, dtype, start=start, length=length, whole_length=whole)
        case ("module", Global() as module, *_):
            return module
    raise ValueError("it has a persistent id that describes no storage")


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    match arguments:
        case (Storage() as storage, offset, tuple() as shape, tuple() as strides, *rest):
            # After requires_grad and backward_hooks.
            metadata = rest[2] if len(rest) > 2 else None
            return Tensor(storage, storage.dtype, offset, shape, strides, bool(metadata))
    raise ValueError("it makes a tensor of what is no storage, offset, shape and strides")


def _tensor_with_dtype(arguments: tuple[Any, ...]) -> Tensor:
    match arguments:
        case (storage, offset, shape, strides, grad, hooks, Global(name), *metadata):
            dtype = DTYPES.get(name.removeprefix("torch."))
            if dtype is None:
                raise ValueError(f"it has a tensor of dtype {name}, which NumPy can't hold")
            tensor = _tensor((storage, offset, shape, strides, grad, hooks, *metadata))
            return dataclasses.replace(tensor, dtype=dtype)
    raise ValueError("it makes a tensor without a dtype")


def _tensor_subclass(arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (Global(name), _, tuple() as inner, _):
            build = _TENSOR_BUILDERS.get(name)
            return Inert(name) if build is None else build(inner)
    raise ValueError("it makes a tensor's subclass without its parts")


def _parameter(arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (Tensor() | Inert() as value, *_):
            return value
    raise ValueError("it makes a parameter of what is no tensor")


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (tuple() as shape,):
            return shape
    raise ValueError("it makes a torch.Size of what is no tuple")


def _dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    match arguments:
        case () | (Global(),):  # the latter is a defaultdict's default
            return {}
        case (list() as items,):  # an OrderedDict as Python 2 pickled it
            pairs = (item for item in items if isinstance(item, list) and len(item) == 2)
            return {key: value for key, value in pairs if isinstance(key, str)}
    raise ValueError("it makes a dictionary of what are no pairs")


def _bytes(arguments: tuple[Any, ...]) -> bytes | Inert:
    match arguments:
        case (str(text), "latin1"):  # how protocol 2 writes bytes
            return text.encode("latin-1")
    return Inert("_codecs.encode")


def _numpy_dtype(arguments: tuple[Any, ...]) -> _NumpyDtype | Inert:
    match arguments:
        case (str(code), *_) if re.fullmatch("b1|[iu][1248]|f[248]|c(8|16)", code):
            return _NumpyDtype(np.dtype(code))
    return Inert("numpy.dtype")


def _numpy_array(arguments: tuple[Any, ...]) -> NumpyArray:
    del arguments  # Of an empty array: all that matters comes as its state.
    return NumpyArray()


_TENSOR_BUILDERS: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
}

# All that is ever called for a pickle. NumPy scalars, optimizers, arguments of programs and
# whatever else lies in checkpoints stay inert.
BUILDERS: dict[str, Builder] = {
    **_TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type": _tensor_subclass,
    "torch._tensor._rebuild_from_type_v2": _tensor_subclass,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "_codecs.encode": _bytes,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
}
