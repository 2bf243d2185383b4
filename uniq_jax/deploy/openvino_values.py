"""Numbers, codes and bits in OpenVINO's operations."""

import importlib
from typing import Any

import numpy as np

from uniq_jax.deploy import integers
from uniq_jax.deploy.graph import Node
from uniq_jax.deploy.runtimes import load_openvino

openvino = load_openvino()
ops = importlib.import_module("openvino.opset15")

Value = Any

# Less than any number of a network.
_LOW = np.float32(-1e30)

# What is nearer to 0 is taken for 0.
TINY = np.finfo(np.float32).tiny

# Where `rounded_sum` splits its parts: half of float32's 24 bits.
_SPLIT = 2.0**12


def apart(value: Value) -> Value:
    """The value itself, by an operation that compilers do not join with sums and products."""
    return ops.maximum(value, constant(_LOW))


def constant(values: Any) -> Value:
    """A float32 constant."""
    return ops.constant(np.asarray(values, np.float32))


def window(node: Node) -> tuple[list[int], ...]:
    """Strides, padding in front and behind, and dilations of a convolution."""
    low, high = zip(*node["padding"])
    return [*node["window_strides"]], [*low], [*high], [*node["rhs_dilation"]]


def levels(operands: np.ndarray, form: integers.Form) -> np.ndarray:
    """The integer levels of a kernel's operands, float32."""
    return operands.astype(np.float32) * form.factor + form.shift


def level_of_code(code: Value, node: Node) -> Value:
    """The integer level of a code, float32."""
    bits, offset = node["grid"]
    if offset == int(offset):
        return ops.subtract(code, constant(offset)) if offset else code
    return ops.subtract(ops.multiply(code, constant(2)), constant(2**bits - 1))


def count(x: Value, limits: list[np.ndarray]) -> Value:
    """How many limits `x` reaches, float32."""
    reached = [ops.convert(ops.greater_equal(x, constant(limit)), "f32") for limit in limits]
    total = reached[0]
    for one in reached[1:]:
        total = ops.add(total, one)
    return total


def even_code(x: Value, step: np.float32, grid: tuple[int, float]) -> Value:
    """The code by the evenly spaced thresholds of `uniform_step`, exact: guessed, and corrected.

    Threshold i is `step * (i - 1/2 - offset)`, a product rounded once, and a number on it has the
    even code of the two at its sides: from an even code on, which is guessed, the next threshold is
    passed by what is larger, and the one behind it is reached by what is equal too. Sums and
    products before these two may be joined by OpenVINO: the guess has room for it.
    """
    bits, offset = grid
    pair = ops.add(ops.multiply(x, constant(0.5 / float(step))), constant(offset / 2))
    pair = ops.floor(ops.clamp(pair, 0.0, 2.0 ** (bits - 1) - 1))
    code = even = ops.multiply(pair, constant(2))
    for place, reaches in ((0.5, ops.greater), (1.5, ops.greater_equal)):
        threshold = ops.multiply(apart(ops.add(even, constant(place - offset))), constant(step))
        code = ops.add(code, ops.convert(reaches(x, threshold), "f32"))
    return ops.minimum(code, constant(2**bits - 1))


def rounded_sum(parts: list[tuple[int, Value]]) -> Value:
    """The sum of `place * part`, an int32, rounded to float32 once.

    Parts are integers below 2**24. Each is split in two, so that all sums but the last are integers
    that float32 holds, in whatever order and however joined. (OpenVINO has int32 too, of which some
    of its devices make float32.)
    """
    high, low = constant(0), constant(0)
    for place, part in parts:
        upper = ops.floor(ops.multiply(part, constant(1 / _SPLIT)))
        lower = ops.subtract(part, ops.multiply(upper, constant(_SPLIT)))
        high = ops.add(high, ops.multiply(upper, constant(place)))
        low = ops.add(low, ops.multiply(lower, constant(place)))
    return ops.add(ops.multiply(high, constant(_SPLIT)), low)


def as_bits(x: Value, edge: np.ndarray, rises: np.ndarray) -> Value:
    """The bits of a binary product's input: `x > edge` where it rises, `x <= edge` where it falls.

    Each constant is one of its own: OpenVINO joins no others to the operation before.
    """
    edge = edge.astype(np.float32)
    # An edge of 0 is taken for none, and a denormal one for 0, which may lie on its other side.
    edge = np.where(np.abs(edge) < TINY, np.where(edge < 0, -TINY, TINY), edge)
    low, high = np.where(rises, 0, 1), np.where(rises, 1, 0)
    return ops.fake_quantize(x, constant(edge), constant(edge), constant(low), constant(high), 2)


def bit_tensor(bits: np.ndarray) -> Value:
    """A constant of bits, the first one lowest in its byte."""
    tensor = openvino.Tensor(openvino.Type.u1, openvino.Shape(bits.shape))
    tensor.data.reshape(-1)[:] = np.packbits(bits.reshape(-1), bitorder="little")
    return ops.constant(tensor)
