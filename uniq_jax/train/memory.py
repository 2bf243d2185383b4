"""What a compiled step takes of a device's memory, known before it runs."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from uniq_jax.spec import PhaseSpec, RunSpec

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on each device, as the compiler plans them.

    Attributes:
      arguments: the state, a batch, and the teacher where there is one.
      outputs: the next state and the metrics.
      temporaries: the most that is held in between, activations above all.
      aliased: outputs that lie where donated arguments lay.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "StepMemory | None":
        """That of a compiled function; None where the platform's compiler does not tell."""
        found: Any = compiled.memory_analysis()
        if found is None:
            return None
        return cls(
            arguments=found.argument_size_in_bytes,
            outputs=found.output_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            aliased=found.alias_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """Arguments + outputs + temporaries - aliased."""
        return self.arguments + self.outputs + self.temporaries - self.aliased

    def __str__(self) -> str:
        kept = self.arguments + self.outputs - self.aliased
        return f"{_size(self.total)} ({_size(kept)} kept, {_size(self.temporaries)} for a step)"


class MemoryShortage(ValueError):
    """A device cannot hold what a program takes; the message has both, and advice."""


def compile_step(
    step: Any,
    arguments: Sequence[Any],
    *,
    limit_gib: float,
    advice: str,
    what: str = "a training step",
) -> tuple[jax.stages.Compiled, str]:
    """Compiles a jitted step ahead of time, if a device can hold what it takes.

    Args:
      step: from `jax.jit`.
      arguments: to call it with: arrays that are on the devices, or ShapeDtypeStructs with
        shardings.
      limit_gib: memory of each device that it may take; 0 for what `available` finds.
      advice: what takes less memory, for the message.
      what: the step's name there.

    Returns:
      The compiled step, which is called with such arguments; and a line on what it takes.

    Raises:
      MemoryShortage: if it takes more than there is, or the compiler runs out of memory.
    """
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise MemoryShortage(f"{what} does not fit: {reason[:200]}. {advice}") from error
    needed = StepMemory.of(compiled)
    if needed is None:
        return compiled, "a step takes an unknown part of each device's memory"
    limit = round(limit_gib * _GIB) or available(held=needed.arguments)
    if needed.total > limit:
        source = f"config.memory_limit_gib (={limit_gib}) allows" if limit_gib else "there are"
        raise MemoryShortage(
            f"{what} takes {needed} of each device, of which {source} {_size(limit)}. {advice}"
        )
    return compiled, f"a step takes {needed} of each device's {_size(limit)}"


def available(*, held: int) -> int:
    """Bytes that a step may take of each device of this process.

    An accelerator tells. CPU devices share what is free of the machine's memory, or of that of
    this process's container, beside what is held already.

    Args:
      held: bytes on each device that are in use and count as the step's own.
    """
    devices = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    if min(limits) > 0:
        return min(limits)
    return _free_host_bytes() // len(devices) + held


def advice(spec: RunSpec, phase: PhaseSpec) -> str:
    """A sentence on the keys of a config that decide what a phase's steps take."""
    return (
        f"Less memory take: a smaller config.data.batch_size (={spec.data.batch_size}); a larger "
        f"config.{phase.name}.accumulation_steps (={phase.accumulation_steps}), which cuts the "
        f"batch; config.model.remat (={spec.model.remat!r}) 'convolutions' or 'blocks'; "
        f"config.model.dtype (={spec.model.dtype!r}) 'bfloat16'; and, for the parameters, "
        f"config.mesh (={spec.mesh}) with more devices along 'model'"
    )


def _free_host_bytes(root: Path = Path("/")) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
        free = 1024 * int(sizes["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        cache = {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):  # There is no such group, or its limit is "max".
        return free
    return min(free, limit - used + cache["inactive_file"])


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.2f} MiB"
