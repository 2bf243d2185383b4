"""How the processes of a job find each other."""

import dataclasses
import faulthandler
import importlib.util
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

# JAX tries for minutes to meet the others, and says nothing.
_NOTICE_AFTER_S = 10.0

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


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
      >>> from uniq_jax.train.jobs import find_job
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
    where = job.coordinator or f"the address that {job.cluster!r} gives"
    who = "a process" if job.process_id is None else f"process {job.process_id}"
    line = f"{who}: waits for the other processes of the job, to meet them at {where}"
    notice = threading.Timer(_NOTICE_AFTER_S, print, [line], {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(
            coordinator_address=job.coordinator,
            num_processes=job.num_processes,
            process_id=job.process_id,
            cluster_detection_method=job.cluster,
            heartbeat_timeout_seconds=heartbeat_timeout_s,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConnectionError(f"the processes did not meet at {where}: {error}") from error
    finally:
        notice.cancel()


def has_libtpu() -> bool:
    """Whether the TPU library is installed; nothing is imported."""
    return importlib.util.find_spec("libtpu") is not None
