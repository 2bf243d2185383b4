"""One process or many: how they find each other, agree, and end together.

Every process runs the same program on the same global arrays. Process 0 alone prints and writes;
all of them read the workdir.
"""

import contextlib
import dataclasses
import faulthandler
import importlib.util
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
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

T = TypeVar("T")

LOST_PROCESS_EXIT_CODE = 69
"""Exit code of a process that ends because another one did (EX_UNAVAILABLE of sysexits.h).

Where JAX's runtime notices first, it aborts the process, which is exit code 134 in a shell."""

# Network file systems show a new file to other machines only after a while.
_SEEN_WITHIN_S = 30.0

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

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


@dataclasses.dataclass(frozen=True)
class Job:
    """How the processes of a job find each other.

    Attributes:
      coordinator: HOST:PORT of process 0; None where JAX finds it out.
      num_processes: how many there are; None where JAX finds it out.
      process_id: which one this is; None where JAX finds it out.
      cluster: whose variables JAX reads for the rest: one of its cluster detection methods.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    cluster: str = "deactivate"


def find_job(
    environment: Mapping[str, str],
    *,
    mode: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    has_libtpu: bool = False,
) -> Job | None:
    """Finds out whether this process is one of several.

    Explicit arguments go first; then the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, which `launch/jobset.yaml` sets; then what SLURM, Open MPI, GKE and TPU VMs say.

    Args:
      environment: variables, after JAX was imported.
      mode: "auto", or "off", which takes no notice of the environment.
      coordinator: as in `Job`.
      num_processes: with a coordinator.
      process_id: with a coordinator.
      has_libtpu: whether the TPU library is installed.

    Returns:
      None for a process on its own.

    Raises:
      ValueError: if the arguments, or the variables, are incomplete or out of range.

    Example:
      >>> from uniq_jax.train.processes import find_job
      >>> find_job({}) is None
      True
      >>> find_job({}, coordinator="host:1234", num_processes=2, process_id=1).process_id
      1
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if any(value is not None for value in given.values()):
        if mode == "off":
            named = next(name for name, value in given.items() if value is not None)
            raise ValueError(f"{named} must not be given with --distributed=off")
        return _explicit(given)
    if mode == "off":
        return None
    # JAX honours the first one alone, with what a cluster says about the rest.
    if any(name in environment for name in _VARIABLES[1:]):
        found: dict[str, Any] = {name: environment.get(name) for name in _VARIABLES}
        for name in _VARIABLES[1:]:
            if found[name] is not None:
                found[name] = _integer(name, found[name])
        return _explicit(found)
    if all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1:
        return Job(cluster="slurm")
    if (
        "OMPI_MCA_orte_hnp_uri" in environment
        and int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    ):
        return Job(cluster="ompi")
    # JAX sets this variable on machines without TPUs.
    if has_libtpu and "TPU_SKIP_MDS_QUERY" not in environment:
        hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
        if hosts is None:
            return Job(cluster="gcetpu")
        slices = int(environment.get("MEGASCALE_NUM_SLICES", 1))
        return Job(cluster="gketpu") if len(hosts.split(",")) * slices > 1 else None
    return None


def _explicit(given: Mapping[str, Any]) -> Job | None:
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"{', '.join(given)} must be given together; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    (named, coordinator), (named_count, count), (named_id, process_id) = given.items()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{named} (={coordinator!r}) must be HOST:PORT, of process 0")
    if count < 1:
        raise ValueError(f"{named_count} (={count}) must be at least 1")
    if not 0 <= process_id < count:
        raise ValueError(f"{named_id} (={process_id}) must be in 0..{count - 1}")
    return None if count == 1 else Job(coordinator, count, process_id)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} (={text!r}) must be an integer") from None


def connect(job: Job | None, *, heartbeat_timeout_s: int = 60) -> None:
    """Joins the other processes of the job; to be called before JAX touches any device.

    Args:
      job: None does nothing.
      heartbeat_timeout_s: a process that wasn't heard of for so long counts as lost.

    Raises:
      ValueError: if `heartbeat_timeout_s` is too short.
      ConnectionError: if they don't find each other.
    """
    if heartbeat_timeout_s < 10:
        raise ValueError(f"--heartbeat_timeout_s (={heartbeat_timeout_s}) must be at least 10")
    if job is None:
        return
    # Where JAX ends the process, the traces of all threads would hide what it says.
    if faulthandler.is_enabled():
        faulthandler.enable(all_threads=False)
    try:
        jax.distributed.initialize(
            coordinator_address=job.coordinator,
            num_processes=job.num_processes,
            process_id=job.process_id,
            cluster_detection_method=job.cluster,
            heartbeat_timeout_seconds=heartbeat_timeout_s,
        )
    except (RuntimeError, ValueError, OSError) as error:
        where = job.coordinator or f"the coordinator, as {job.cluster!r} names it"
        raise ConnectionError(f"the processes did not meet at {where}: {error}") from error


def has_libtpu() -> bool:
    """Whether the TPU library is installed; nothing is imported."""
    return importlib.util.find_spec("libtpu") is not None


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
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_true(value: bool) -> bool:
    """Whether the value is true on every process; all of them must ask."""
    return bool(np.all(_gathered(int(value))))


def together(function: Callable[[], T]) -> T:
    """Calls the function on every process; where it fails on one, it fails on all.

    Raises:
      OSError: on the processes where the function did not fail itself.
    """
    if jax.process_count() == 1:
        return function()
    failure, result = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    failed = np.flatnonzero(_gathered(int(failure is not None)))
    if failure is not None:
        raise failure
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
    blind = np.flatnonzero(_gathered(int(not _is_seen(sign))))
    if is_first():
        sign.unlink()
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
def ends_together() -> Iterator[None]:
    """Ends this process with a message on any error, where it is one of several.

    The usual way out of Python would wait for the other processes, which wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if is_loss(error):
            _end_as_one_is_lost(error)
        if isinstance(error, SystemExit):
            _end("", error.code if isinstance(error.code, int) else 1)
        if not isinstance(error, ValueError | TypeError | OSError | RuntimeError):
            traceback.print_exc()
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
