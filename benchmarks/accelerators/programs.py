"""Programs for a GPU and a TPU, compiled without one, and what their operations read and write.

XLA's compilers for both are in packages that need no device to compile for one. Nothing is run.
"""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Before the compiler for TPUs is loaded, which otherwise asks the network what machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What programs are compiled for.

    Attributes:
      title: for people.
      platform: JAX's name of it.
      packages: that hold the compiler.
      topology: further arguments of `jax.experimental.topologies.get_topology_desc`.
      topology_name: its argument of this name.
    """

    title: str
    platform: str
    packages: tuple[str, ...]
    topology_name: str
    topology: dict[str, str]

    def devices(self) -> Any:
        """Descriptions of the devices of one host, an array."""
        described = topologies.get_topology_desc(
            platform=self.platform, topology_name=self.topology_name, **self.topology
        )
        return topologies.make_mesh(described, (len(described.devices),), ("data",)).devices

    def mesh(self) -> Mesh:
        """All devices along the axis "data"."""
        return Mesh(self.devices().reshape(-1, 1), ("data", "model"))


TARGETS = {
    "h100": Target(
        "one H100",
        "cuda",
        ("jax-cuda12-plugin", "jax-cuda12-pjrt"),
        "h100",
        {
            "topology": "1x1x1",
            # Limits of compute capability 9.0, and what the vendor's data sheet says of the chip.
            "target_config": (pathlib.Path(__file__).parent / "h100.txtpb").read_text("utf-8"),
        },
    ),
    "v5e": Target("four TPU v5e", "tpu", ("libtpu",), "v5e:2x2", {}),
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, as one device has it.

    Attributes:
      kind: "fusion" or "custom-call", for example.
      name: in the program.
      written: bytes of its results.
      read: bytes of its operands.
    """

    kind: str
    name: str
    written: int
    read: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one device does in a compiled program.

    Attributes:
      operations: one after another.
      temporaries: bytes that it needs besides arguments and results.
    """

    operations: tuple[Operation, ...]
    temporaries: int

    @property
    def moved(self) -> int:
        """Bytes that all operations read and write."""
        return sum(operation.read + operation.written for operation in self.operations)


def compiled(lowered: Any) -> Compiled:
    """Compiles what `jax.jit(…).trace(…).lower(lowering_platforms=…)` gives."""
    program = lowered.compile()
    return Compiled(operations(program.as_text()), program.memory_analysis().temp_size_in_bytes)


def compiled_for(target: Target, function: Callable[..., Any], *arguments: Any) -> Compiled:
    """A function of whole arrays, on every device alike."""
    everywhere = NamedSharding(target.mesh(), PartitionSpec())
    traced = jax.jit(function, in_shardings=everywhere).trace(*arguments)
    return compiled(traced.lower(lowering_platforms=(target.platform,)))


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
# Comments in tuples, as in /*index=5*/; layouts, metadata.
_ASIDES = re.compile(r"/\*.*?\*/|\{[^{}]*\}")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)")

# What moves nothing; and copies to and from a TPU's fast memory, whose reader is counted.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"}
_ASYNCHRONOUS = ("-start", "-done")


def operations(text: str) -> tuple[Operation, ...]:
    """The operations of a program's text.

    Raises:
      ValueError: if it has a loop or a branch, whose operations would not be counted.
    """
    found, sizes = [], {}
    lines = text[text.index("\nENTRY ") :].splitlines()[2:]
    for line in lines:
        match = _INSTRUCTION.match(_ASIDES.sub("", line))
        if match is None:
            continue
        name, shape, kind, operands = match.groups()
        sizes[name] = _size(shape)
        if kind in _FREE or kind.endswith(_ASYNCHRONOUS):
            continue
        if kind in ("while", "conditional", "call"):
            raise ValueError(f"the program has a {kind}, {name}: what is in it is not counted")
        read = sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands))
        found.append(Operation(kind, name, sizes[name], read))
    return tuple(found)


def _size(shape: str) -> int:
    return sum(
        _BYTES[dtype] * math.prod(map(int, filter(None, lengths.split(","))))
        for dtype, lengths in _ARRAY.findall(shape)
    )
