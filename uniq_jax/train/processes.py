"""One process or many: how they agree, and end together.

Every process runs the same program on the same global arrays. Process 0 alone prints and writes;
all of them read the workdir.
"""

import contextlib
import itertools
import json
import os
import secrets
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

T = TypeVar("T")

LOST_PROCESS_EXIT_CODE = 69
"""Exit code of a process that ends because another one did (EX_UNAVAILABLE of sysexits.h).

Where JAX's runtime notices first, it aborts the process, which is exit code 134 in a shell."""

# For what one process does alone: compile, freeze a network.
_LONGEST_WAIT_S = 3600
_barriers = itertools.count()

# Network file systems show a new file to other machines only after a while.
_SEEN_WITHIN_S = 30.0

# What the runtime says, on the platforms that have such words, when a process can't be reached.
_WORDS_OF_LOSS = (
    "closed by peer",
    "reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "timed out",
    "timeout",
    "heartbeat",
    "coordination service",
    "unavailable:",
    "deadline_exceeded",
    "aborted:",
    "nccl",
)


def is_first() -> bool:
    """Whether this process prints and writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def check_mesh(mesh: Mesh) -> None:
    """Raises a ValueError unless every process holds whole rows of the batch."""
    parts, local = mesh.shape["model"], jax.local_device_count()
    if jax.process_count() > 1 and local % parts:
        raise ValueError(
            f"config.mesh.model (={parts}) must divide the number of devices of each process, "
            f"which is {local}"
        )


def barrier(name: str) -> None:
    """Waits until every process is here, which may take one of them minutes longer than another.

    A message between devices is no way to wait: on CPUs it is given up after 30 seconds.
    """
    if jax.process_count() > 1:
        # The service that processes meet at takes each name once; all come here in one order.
        key = f"{name}-{next(_barriers)}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * _LONGEST_WAIT_S)


def connect_devices(mesh: Mesh) -> None:
    """Sends a first message between all devices, for which the library on CPUs waits 30 seconds.

    Later, one process may compile that much longer than another.
    """
    if jax.process_count() == 1:
        return
    barrier("mesh")
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ones = jax.make_array_from_callback((mesh.size,), spread, lambda index: np.ones(1, np.int32))
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)
    assert int(total) == mesh.size


def all_true(value: bool) -> bool:
    """Whether the value is true on every process; all of them must ask."""
    return bool(np.all(_gathered(int(value))))


def together(function: Callable[[], T]) -> T:
    """Calls the function on every process; where it fails on one, it fails on all.

    Raises:
      OSError: on the processes where the function did not fail itself.
      jax.errors.JaxRuntimeError: there, if it failed for want of memory or of another process.
    """
    if jax.process_count() == 1:
        return function()
    failure, result = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    wanting = isinstance(failure, MemoryError | jax.errors.JaxRuntimeError)
    states = _gathered(int(failure is not None) + int(wanting))
    if failure is not None:
        raise failure
    if np.any(states == 2):
        raise jax.errors.JaxRuntimeError(
            f"process {_numbers(np.flatnonzero(states == 2))} lacked memory, or another process"
        )
    failed = np.flatnonzero(states)
    if failed.size:
        raise OSError(f"process {_numbers(failed)} failed to read it")
    return result  # pyright: ignore[reportReturnType]


def on_first(function: Callable[..., Any], *args: Any) -> None:
    """Calls the function on process 0; the others go on after it is done."""
    if is_first():
        function(*args)
    barrier("on_first")


def make_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the workdir where it is missing; all processes must see the same one.

    Process 0 writes a file there, which the others must find.

    Args:
      workdir: of the run.
      config: as `spec.to_json` gives it, which must be one for all.

    Raises:
      ValueError: if the processes have different configs, or see different directories.
      OSError: if it cannot be written.
    """
    if jax.process_count() == 1:
        workdir.mkdir(parents=True, exist_ok=True)
        return
    digest = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    others = np.flatnonzero(_gathered(digest) != _gathered(digest)[0])
    if others.size:
        raise ValueError(
            f"all processes must have one config; that of process {_numbers(others)} differs from "
            "that of process 0"
        )
    nonce = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    sign = workdir / f".processes-{nonce:08x}.tmp"
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        sign.touch()
    barrier("workdir")
    seen = _is_seen(sign)
    barrier("looked")  # One may look for longer than a message between devices may take.
    blind = np.flatnonzero(_gathered(int(not seen)))
    on_first(sign.unlink)
    if blind.size:
        raise ValueError(
            f"workdir (={str(workdir)!r}) must be a directory that all processes share, on a "
            f"network file system for example; process {_numbers(blind)} does not see what process "
            "0 wrote there"
        )


def _is_seen(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        # Listing the directory makes a network file system look again.
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.2)
    return True


def _gathered(value: int) -> np.ndarray:
    """The value of every process, by its number."""
    if jax.process_count() == 1:
        return np.asarray([value])
    return np.asarray(multihost_utils.process_allgather(np.uint32(value))).reshape(-1)


def _numbers(indices: np.ndarray) -> str:
    return ", ".join(map(str, indices.tolist()))


@contextlib.contextmanager
def ends_when_one_is_lost() -> Iterator[None]:
    """Ends this process at once, with a message, when the block fails as another process is gone.

    What else would be done on the way out waits for the others, which are gone.
    """
    try:
        yield
    except Exception as error:
        if jax.distributed.is_initialized() and is_loss(error):
            _end_as_one_is_lost(error)
        raise


@contextlib.contextmanager
def ends_together(*, shows_traceback: bool = False) -> Iterator[None]:
    """Ends this process with a message on any error, where it is one of several.

    The usual way out of Python would wait for the other processes, which wait for this one.

    Args:
      shows_traceback: whether to print where an error came from, too.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            _end("", error.code if isinstance(error.code, int) else 1)
        expected = isinstance(error, ValueError | TypeError | OSError | RuntimeError)
        if shows_traceback or not expected:
            traceback.print_exc()
        if is_loss(error):
            _end_as_one_is_lost(error)
        _end(f"error: {str(error) or type(error).__name__}", 1)


def is_loss(error: BaseException) -> bool:
    """Whether the runtime raised the error, or what caused it, because a process is gone."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, jax.errors.JaxRuntimeError) and any(
            words in text for words in _WORDS_OF_LOSS
        ):
            return True
        error = error.__cause__  # pyright: ignore[reportAssignmentType]
    return False


def _end_as_one_is_lost(error: BaseException) -> NoReturn:
    reason = str(error).splitlines()[0][:300]
    _end(
        f"error: another process of this job (of {jax.process_count()}) has ended or cannot be "
        "reached, and this one ends too; what the other one printed says why. The same command, "
        f"given to all processes, goes on from the newest checkpoint. ({reason})",
        LOST_PROCESS_EXIT_CODE,
    )


def _end(message: str, code: int) -> NoReturn:
    """Ends without the handlers at exit, of which JAX's waits for the other processes."""
    if message:
        print(f"process {jax.process_index()}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
