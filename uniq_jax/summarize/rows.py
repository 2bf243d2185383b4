"""A network's layers with their shapes, widths and costs."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from uniq_jax.nn import QuantizerParam
from uniq_jax.nn.size import packed_kernel_bytes
from uniq_jax.summarize.trace import Shape, Trace, trace

FLOAT_BITS = 32
_FLOAT_BYTES = 4
_QUANTIZERS = ("weight_quantizer", "activation_quantizer")


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: a module that has variables of its own, or multiplies.

    Attributes:
      path: as rules see it; "" for the model itself.
      type: name of the class.
      input_shape, output_shape: of the first array in and out at the layer's first call, under
        `vmap` and `scan` without their axis; None where there is none, or no call.
      parameters: numbers that are trained, quantizers' own state aside.
      weight_bits, weight_method: of the kernel; 32 and "float" where it is not quantized.
      activation_bits, activation_method: of the input, likewise.
      macs: multiply-accumulates for one example, of all calls.
      bit_operations: macs * weight_bits * activation_bits.
      float_bytes: of all variables in float32, without quantizers.
      packed_bytes: with the kernel as packed codes, as `deploy.model_size` counts.
    """

    path: str
    type: str
    input_shape: Shape | None
    output_shape: Shape | None
    parameters: int
    weight_bits: int
    weight_method: str
    activation_bits: int
    activation_method: str
    macs: int
    bit_operations: int
    float_bytes: int
    packed_bytes: int


def rows(model: nnx.Module, arguments: tuple[Any, ...], batch: int) -> list[Row]:
    """Describes every layer of `model`, which is called with `batch` examples in `arguments`."""
    traced = trace(model, arguments)
    modules = list(nnx.iter_modules(model))
    numbers = {path: number for number, (path, _) in enumerate(modules)}
    owned = _variables_by_module(model, numbers)
    never_called = (number for number in range(len(modules)) if number not in traced.shapes)
    found = []
    for number in (*traced.shapes, *never_called):
        if owned[number] or traced.macs[number]:
            path, module = modules[number]
            found.append(_row(number, path, module, owned[number], traced, batch))
    return found


def _variables_by_module(
    model: nnx.Module, numbers: dict[tuple[Any, ...], int]
) -> Mapping[int, list[nnx.Variable]]:
    """Each variable once, random keys aside; quantizers' state belongs to the quantized layer."""
    owned: Mapping[int, list[nnx.Variable]] = collections.defaultdict(list)
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            place = path[:-1]
            while place not in numbers or (place and place[-1] in _QUANTIZERS):
                place = place[:-1]
            owned[numbers[place]].append(node)
    return owned


def _row(
    number: int,
    path: tuple[Any, ...],
    module: Any,
    variables: list[nnx.Variable],
    traced: Trace,
    batch: int,
) -> Row:
    weight, activation = (getattr(module, name, None) for name in _QUANTIZERS)
    learned = [v for v in variables if not isinstance(v, QuantizerParam)]
    float_bytes = _FLOAT_BYTES * sum(map(_size, learned))
    packed_bytes = _FLOAT_BYTES * sum(map(_size, variables))
    if weight is not None and any(v is module.kernel for v in variables):
        packed_bytes += packed_kernel_bytes(weight, module.kernel.get_value())
        packed_bytes -= _FLOAT_BYTES * _size(module.kernel)
    input_shape, output_shape = traced.shapes.get(number, (None, None))
    weight_bits = FLOAT_BITS if weight is None else weight.method.bits
    activation_bits = FLOAT_BITS if activation is None else activation.method.bits
    macs = traced.macs[number] // batch
    return Row(
        path="/".join(map(str, path)),
        type=type(module).__name__,
        input_shape=input_shape,
        output_shape=output_shape,
        parameters=sum(_size(v) for v in learned if isinstance(v, nnx.Param)),
        weight_bits=weight_bits,
        weight_method="float" if weight is None else weight.method.kind,
        activation_bits=activation_bits,
        activation_method="float" if activation is None else activation.method.kind,
        macs=macs,
        bit_operations=macs * weight_bits * activation_bits,
        float_bytes=float_bytes,
        packed_bytes=packed_bytes,
    )


def _size(variable: nnx.Variable) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variable.get_value()))
