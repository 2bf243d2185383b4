"""Codes, levels and products of codes as ONNX nodes: what both forms of a file share."""

import dataclasses

import numpy as np

from uniq_jax.deploy import integers, matrices
from uniq_jax.deploy.digits import kernel_digits
from uniq_jax.deploy.graph import Node
from uniq_jax.deploy.matrices import is_conv
from uniq_jax.deploy.onnx_emitter import Codes, Emitter, code_name
from uniq_jax.deploy.onnx_operations import (
    FLOAT,
    INT32,
    multiplied,
    product_layout,
    turned,
)
from uniq_jax.nn import levels
from uniq_jax.quantizers import Grid

# With more thresholds a code is guessed, and corrected: where they are evenly spaced, and else.
FEW_EVEN, FEW = 7, 31


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a product of two grids is calculated.

    Attributes:
      is_int8: with uint8 codes and int8 weights; else with float32 levels.
      factor: the uint8 operand is `factor * code`, and the level `operand - zero`.
      zero: see there.
    """

    is_int8: bool
    factor: int
    zero: int


def arithmetic(activation: tuple[int, float], weight: tuple[int, float]) -> Arithmetic:
    """Of the products of these grids: (bits, offset).

    Processors without VNNI instructions sum pairs of products in 16 bits, which pairs of 7-bit
    codes and odd 7-bit weights still fit. Wider ones are multiplied as floats.
    """
    form = integers.form(*weight)
    bits, offset = activation
    factor = 2 if offset != int(offset) else 1
    largest = factor * (2**bits - 1), levels.largest_level(Grid(*weight))
    fits = (form.factor, form.shift) == (1, 0) and 2 * largest[0] * largest[1] < 2**15
    return Arithmetic(fits, factor, int(factor * offset))


def kernel_codes(emitter: Emitter, node: Node) -> np.ndarray:
    """The codes of an integer product's kernel, with the axes that the graph has."""
    form = integers.form(*node["weight"])
    return np.asarray(integers.codes_of(emitter.arrays[node.inputs[1]], form))


def kernel(emitter: Emitter, node: Node, codes: np.ndarray) -> str:
    """An int8 kernel, packed in the file."""
    form = integers.form(*node["weight"])
    bits = node["weight"][0]
    return emitter.make.kernel(codes, bits, form.code_factor, form.code_shift)


def levels_of(emitter: Emitter, source: str, layout: str) -> str:
    """The integer levels of a quantizer's codes, float32."""
    codes, make = emitter.codes[source], emitter.make
    value = codes.name if codes.is_float else make("Cast", codes.name, to=FLOAT)
    offset = codes.grid[1]
    factor = 2 if offset != int(offset) else 1
    if factor != 1:
        value = make("Mul", value, emitter.constant(factor))
    if offset:
        value = make("Sub", value, emitter.constant(factor * offset))
    return emitter.transposed(value, emitter.layout(source), layout)


def decode(emitter: Emitter, node: Node) -> None:
    """Levels for what is no product of codes."""
    layout = emitter.layout(node.inputs[0])
    emitter.put(node.name, levels_of(emitter, node.inputs[0], layout), layout)


def level_product(emitter: Emitter, node: Node, scale: np.ndarray) -> None:
    """A product of float32 levels: exact, in the exact forms, however large its sums are."""
    layout, make = product_layout(node), emitter.make
    x = levels_of(emitter, node.inputs[0], layout)
    codes = turned(node, kernel_codes(emitter, node))
    if emitter.is_exact and node["largest_sum"] >= levels.EXACT:
        emitter.put(node.name, _digit_product(emitter, node, x, codes), layout)
        emitter.int32.add(node.name)
        return
    weight = _stored_levels(emitter, codes, node["weight"])
    if np.any(scale != 1):
        scale = matrices.columns(node, emitter.arrays[node.inputs[1]].shape, scale)
        scale = scale.reshape((-1, 1, 1, 1) if is_conv(node) else (-1,))
        weight = make("Mul", weight, make.constant(scale))
    emitter.put(node.name, multiplied(emitter, node, x, weight), layout)


def _stored_levels(emitter: Emitter, codes: np.ndarray, grid: tuple[int, float]) -> str:
    """The float32 levels of a kernel, which the file has as codes.

    Looked up in a table: of a cast and a product OpenVINO would make an int8 kernel that it takes
    to floats each time.
    """
    form, make = integers.form(*grid), emitter.make
    values = np.arange(2 ** grid[0]) * form.code_factor + form.code_shift
    table = make.constant((values * form.factor + form.shift).astype(np.float32))
    rows = make("Cast", make.constant(codes.astype(np.uint8)), to=INT32)
    return make("Gather", table, rows)


def _digit_product(emitter: Emitter, node: Node, x: str, codes: np.ndarray) -> str:
    """A product of levels as int32: of the kernel's digits, whose float32 sums are exact."""
    total, make = "", emitter.make
    for place, digits in kernel_digits(codes, node["weight"], node["largest_sum"]):
        digit = make("Cast", make.constant(digits), to=FLOAT)
        part = make("Cast", multiplied(emitter, node, x, digit), to=INT32)
        part = make("Mul", part, make.constant(np.int32(place)))
        total = make("Add", total, part) if total else part
    return total


def rescaled(emitter: Emitter, node: Node) -> str:
    """The product of integer sums with their scale, rounded once."""
    name, scale = node.inputs
    sums = emitter.read(name)
    if name in emitter.int32:
        sums = emitter.make("Cast", sums, to=FLOAT)
    factor = emitter.laid(emitter.arrays[scale], node.name, emitter.layout(name))
    return emitter.make("Mul", sums, factor)


def signed_sums(emitter: Emitter, node: Node) -> tuple[str, np.ndarray]:
    """Sums times the signs of their channels, and the thresholds (n, channels) of their dtype."""
    name, limits, signs = node.inputs
    sums, signs, limits = emitter.read(name), emitter.arrays[signs], emitter.arrays[limits]
    if name not in emitter.int32:
        signs = signs.astype(np.float32)
        # What all sums, or none, reach is just beyond what sums can be.
        end = emitter.by_name[name]["largest_sum"] + 1
        limits = np.clip(limits, -end, end).astype(np.float32)
    if np.any(signs < 0):
        sums = emitter.make("Mul", sums, emitter.laid(signs, name, emitter.layout(name)))
    return sums, limits


def encode_input(emitter: Emitter, node: Node) -> tuple[str, str]:
    """What the thresholds of an encode node are compared with, and its layout."""
    layout = emitter.common(node)
    x = emitter.read(node.inputs[0], layout)
    return emitter.make("Neg", x) if node["negate"] else x, layout


def put_even(emitter: Emitter, node: Node, x: str, step: np.float32, layout: str) -> None:
    """Codes of evenly spaced thresholds, exact: an odd code is guessed, and corrected.

    Threshold i is `step * (i - 1/2 - offset)`, and a number on it has the even code of the two
    (`uniq_jax.quantizers.uniform`): from an odd code on, the one below it is passed by what is
    larger, the one above it is reached by what is equal too.
    """
    bits, offset = node["grid"]
    make, constant = emitter.make, emitter.constant
    pair = make("Mul", x, constant(0.5 / float(step)))
    pair = make("Floor", make("Add", pair, constant(offset / 2)))
    pair = make("Clip", pair, constant(0), constant(2 ** (bits - 1) - 1))
    even = make("Mul", pair, constant(2))
    place = emitter.apart(make("Add", even, constant(0.5 - offset)))
    below = make("Mul", place, constant(step))
    place = emitter.apart(make("Add", place, constant(1)))
    above = make("Mul", place, constant(step))
    code = make("Add", even, make("Cast", make("Greater", x, below), to=FLOAT))
    code = make("Add", code, make("Cast", make("GreaterOrEqual", x, above), to=FLOAT))
    code = make("Min", code, constant(2**bits - 1), name=code_name(node.name, layout))
    emitter.put_codes(node, Codes(code, True, node["grid"]), layout)


def put_guessed(emitter: Emitter, node: Node, x: str, thresholds: np.ndarray, layout: str) -> None:
    """Codes of many, nearly even thresholds: a guess that the thresholds at its sides correct.

    As `uniq_jax.deploy.integers.count_below` has it.
    """
    make, count = emitter.make, thresholds.size
    per_step = (count - 1) / (thresholds[-1] - thresholds[0])
    guess = make("Sub", x, make.constant(thresholds[0]))
    guess = make("Floor", make("Mul", guess, make.constant(np.float32(per_step))))
    guess = make("Add", guess, emitter.constant(1))
    guess = make("Clip", guess, emitter.constant(0), emitter.constant(count))
    guess = make("Cast", guess, to=INT32)
    unreached, low = np.float32(np.nan), np.float32(-np.inf)
    above = make("Gather", make.constant(np.append(thresholds, unreached)), guess)
    below = make("Gather", make.constant(np.append(low, thresholds)), guess)
    up = make("Cast", make("GreaterOrEqual", x, above), to=INT32)
    down = make("Cast", make("Less", x, below), to=INT32)
    code = make("Sub", make("Add", guess, up), down)
    code = make("Cast", code, to=FLOAT, name=code_name(node.name, layout))
    emitter.put_codes(node, Codes(code, True, node["grid"]), layout)
