"""What devices send each other, read from the text of a compiled program; a part of `scaling.py`.

Each instruction names its arguments, and each argument's own line says where in the source it comes
from. Compilers join many small sums into one instruction, but not what those lines say.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

# One without a number holds no data.
_WIDTH = re.compile(r"(?:pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\(([^)]*)\)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a collective, as one device has it before.

    Attributes:
      shape: of the array.
      size: in bytes.
      sources: the Python files that it comes from, the innermost first; () where none is told.
    """

    shape: tuple[int, ...]
    size: int
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
      kind: of `KINDS`.
      groups: devices that work together, by their place in the program's devices; for a
        "collective-permute" source and target.
      parts: that it carries.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]

    def payload(self, part: Part) -> int:
        """Bytes of the whole array that is summed or gathered."""
        return part.size * (len(self.groups[0]) if self.kind == "all-gather" else 1)

    def sent(self, part: Part) -> float:
        """Bytes that each device sends where the devices of a group form a ring."""
        devices = len(self.groups[0])
        share = (devices - 1) / devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.payload(part)


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a program.

    Args:
      text: of a compiled program, `compiled.as_text()`.
      devices: that it runs on.

    Raises:
      ValueError: if a collective is part of a loop or branch (how often it runs isn't told), or its
        devices are written in an unknown way.
    """
    lines = text.splitlines()
    definitions = {m[1]: m[2] for m in map(_LINE.match, lines) if m}
    sources = _sources(text)
    found, inside, entry = [], "", True
    for line in lines:
        if started := _COMPUTATION.match(line):
            entry, inside = started[1] is not None, started[2]
        match = _COLLECTIVE.search(line)
        # Names of instructions hold these words too, but an assignment comes before the kind.
        if match is None or _LINE.match(line) is None:
            continue
        if not entry:
            raise ValueError(
                f"text (of {match[1]} in {inside}) must have its collectives in the entry "
                "computation: how often others run is not told"
            )
        names = re.findall(r"%([\w.-]+)", match[2])
        parts = tuple(p for n in names for p in _parts(definitions[n], sources))
        found.append(Collective(match[1], _groups(match[1], match[3], devices), parts))
    return found


def _parts(definition: str, sources: Mapping[int, tuple[str, ...]]) -> Iterator[Part]:
    """The arrays that a line makes."""
    kind = re.match(r"\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+", definition)
    assert kind is not None, definition
    frame = re.search(r"stack_frame_id=(\d+)", definition)
    files = sources.get(int(frame[1]), ()) if frame else ()
    for width, dimensions in _WIDTH.findall(kind[0]):
        shape = tuple(int(n) for n in dimensions.split(",") if n)
        yield Part(shape, math.prod(shape) * max(int(width or 8) // 8, 1), files)


def _sources(text: str) -> dict[int, tuple[str, ...]]:
    """The files of each stack frame's callers, the innermost first, from the program's tables."""

    def table(name: str) -> dict[int, str]:
        rows = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        pairs = (row.split(" ", 1) for row in rows[1].splitlines()) if rows else ()
        return {int(number): row for number, row in pairs}

    def numbers(rows: Mapping[int, str]) -> dict[int, dict[str, int]]:
        return {i: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", r)} for i, r in rows.items()}

    files, places = table("FileNames"), numbers(table("FileLocations"))
    frames = numbers(table("StackFrames"))
    # Some versions of XLA count parents from 1 where others have 0 for none: there the first frame
    # would be its own caller.
    first = frames.get(1, {}).get("parent_frame_id", 0)
    found: dict[int, tuple[str, ...]] = {}
    for i, frame in sorted(frames.items()):
        file = files[places[frame["file_location_id"]]["file_name_id"]].strip('"')
        found[i] = (file, *found.get(frame.get("parent_frame_id", 0) - first, ()))
    return found


def _groups(kind: str, rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that work together, from what follows an instruction's arguments."""
    name = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    written = rest.partition(f"{name}=")[2]
    if match := re.match(r"\{(\{[\d,{}]*\})?\}", written):
        listed = re.findall(r"\{([\d,]+)\}", match[1] or "")
        return tuple(_integers(group) for group in listed) or (tuple(range(devices)),)
    if match := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", written):
        return _rows(_devices(match[2]).reshape(_integers(match[1])))
    if match := re.match(
        r"mesh\[([^]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", written
    ):
        sizes = {n: int(size) for n, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        along = re.findall(r"'(\w+)'", match[3])
        if set(along) <= set(sizes) and ":" not in match[3]:
            order = _devices(match[2]) if match[2] else np.arange(math.prod(sizes.values()))
            axes = [list(sizes).index(name) for name in along]
            kept = [i for i in range(len(sizes)) if i not in axes]
            grid = order.reshape(tuple(sizes.values())).transpose([*kept, *axes])
            return _rows(grid.reshape(-1, math.prod(sizes[name] for name in along)))
    raise ValueError(f"{name} (={written[:80]!r}) must be lists, an iota or a mesh of devices")


def _devices(written: str) -> np.ndarray:
    """`[2,3]T(1,0)`: the numbers from 0, shaped, transposed, in a row."""
    shape, _, order = written.partition("T")
    shape = _integers(shape.strip("[]"))
    axes = _integers(order.strip("()")) if order else tuple(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)


def _integers(listed: str) -> tuple[int, ...]:
    return tuple(int(n) for n in listed.split(","))


def _rows(array: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in row) for row in array)
