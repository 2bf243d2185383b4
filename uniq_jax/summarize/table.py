"""A network's layers and totals, as text and as a rich table."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from uniq_jax.summarize.rows import FLOAT_BITS, Row, rows
from uniq_jax.summarize.trace import Shape

_COLUMNS: tuple[str, ...] = (
    "path",
    "type",
    "in",
    "out",
    "parameters",
    "weights",
    "inputs",
    "MACs",
    "bit ops",
    "packed",
)
_LEFT = ("path", "type")
# What a terminal that is too narrow goes without, in this order.
_SPARE = ("type", "in", "out", "parameters", "bit ops")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a network is made of. `str()` makes an aligned table, and rich prints a bordered one.

    Attributes:
      rows: in the order of calls; layers that are never called come last.
      batch: examples in the input.
    """

    rows: list[Row]
    batch: int

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def bit_operations(self) -> int:
        return sum(row.bit_operations for row in self.rows)

    @property
    def float_bit_operations(self) -> int:
        """Bit operations of the same network in float32."""
        return self.macs * FLOAT_BITS**2

    @property
    def float_bytes(self) -> int:
        return sum(row.float_bytes for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        return sum(row.packed_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [list(_COLUMNS), *self._cells(), self._total_cells()]
        widths = self._widths()
        padded = [
            "  ".join(
                cell.ljust(widths[name]) if name in _LEFT else cell.rjust(widths[name])
                for name, cell in zip(_COLUMNS, line)
            )
            for line in lines
        ]
        rule = "-" * len(padded[0])
        return "\n".join([padded[0], rule, *padded[1:-1], rule, padded[-1], *self._notes()])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table of as many columns as the terminal has room for."""
        widths = self._widths()
        for name in _SPARE:
            if sum(widths.values()) + 3 * (len(widths) - 1) <= options.max_width:
                break
            del widths[name]
        table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, pad_edge=False)
        totals: dict[str, str] = dict(zip(_COLUMNS, self._total_cells()))
        for name in widths:
            # Text, as a path may hold what rich takes for markup.
            table.add_column(
                name,
                Text(totals[name]),
                justify="left" if name in _LEFT else "right",
                no_wrap=name != "path",
                overflow="fold",
            )
        for cells in self._cells():
            table.add_row(*(Text(cell) for name, cell in zip(_COLUMNS, cells) if name in widths))
        yield table
        for note in self._notes():
            yield Text(note)

    def _widths(self) -> dict[str, int]:
        lines = [_COLUMNS, *self._cells(), self._total_cells()]
        return {name: max(map(len, column)) for name, column in zip(_COLUMNS, zip(*lines))}

    def _cells(self) -> Iterator[list[str]]:
        for row in self.rows:
            yield [
                row.path or "(model)",
                row.type,
                _shape(row.input_shape, self.batch),
                _shape(row.output_shape, self.batch),
                f"{row.parameters:,}",
                _width(row.weight_bits, row.weight_method),
                _width(row.activation_bits, row.activation_method),
                _scaled(row.macs),
                _scaled(row.bit_operations),
                _bytes(row.packed_bytes),
            ]

    def _total_cells(self) -> list[str]:
        costs = [_scaled(self.macs), _scaled(self.bit_operations), _bytes(self.packed_bytes)]
        return ["total", "", "", "", f"{self.parameters:,}", "", "", *costs]

    def _notes(self) -> list[str]:
        more_bytes = _times(self.float_bytes, self.packed_bytes)
        more_operations = _times(self.float_bit_operations, self.bit_operations)
        return [
            "Shapes, MACs and bit operations are for one example.",
            f"In float32: {_bytes(self.float_bytes)} ({more_bytes} as many) and "
            f"{_scaled(self.float_bit_operations)} bit operations ({more_operations} as many).",
        ]


def summary(model: nnx.Module, input: Any) -> Summary:
    """Describes a network layer by layer; computes nothing and leaves the model as it is.

    Shapes and multiplications are found by tracing a call in evaluation mode. MACs are those of all
    matrix products and convolutions; what no layer's kernel takes part in, as in attention, counts
    in float, for the innermost module. A layer that is called twice counts twice, and its
    parameters once. They are counted for the whole batch and divided by its size, so that a product
    without images is shared out among them; and a `while_loop`, whose length is not known, counts
    its body once.

    Args:
      model: any NNX module, quantized or not, also one of ShapeDtypeStructs (`nnx.eval_shape`).
      input: what the model is called with: an array or a ShapeDtypeStruct, whose first axis is the
        batch, or a tuple of positional arguments, the first array among them likewise.

    Raises:
      TypeError: if `model` is no NNX module.
      ValueError: if there is no array with a first axis in `input`.

    Example:
      >>> import jax, uniq_jax
      >>> from flax import nnx
      >>> from uniq_jax import rules
      >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> model = uniq_jax.quantize(model, rules.uniq(2)[-1:])
      >>> row, = uniq_jax.summary(model, jax.ShapeDtypeStruct((1, 64), "float32")).rows
      >>> row.path, row.macs, row.bit_operations, row.packed_bytes
      ('layers/0', 2048, 8192, 648)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model (={model!r}) must be an nnx.Module")
    arguments = input if isinstance(input, tuple) else (input,)
    shapes = [leaf.shape for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    if not shapes or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            f"input (={input!r}) must be an array with a batch axis, or a tuple of positional "
            "arguments that has one"
        )
    batch = shapes[0][0]
    return Summary(rows(model, arguments, batch), batch)


def _shape(shape: Shape | None, batch: int) -> str:
    """Without the batch axis, as in 32x32x3."""
    if shape is None:
        return "-"
    if len(shape) > 1 and shape[0] == batch:
        shape = shape[1:]
    return "x".join(map(str, shape))


def _width(bits: int, method: str) -> str:
    return method if method == "float" else f"{bits} {method}"


def _scaled(count: int) -> str:
    """Four digits and a decimal prefix, as in 1.814 G."""
    value, prefixes = float(count), ["", " k", " M", " G", " T", " P", " E"]
    while value >= 999.95 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{count}" if value == count else f"{value:#.4g}{prefixes[0]}"


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} KB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def _times(large: int, small: int) -> str:
    return f"{large / small:.1f} times" if small else "0 times"
