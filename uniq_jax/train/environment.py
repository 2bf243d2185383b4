"""What a run ran on: versions, devices and the commit of the code, in `environment.json`."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from uniq_jax import __version__
from uniq_jax.train.logs import write_json

ENVIRONMENT_FILE = "environment.json"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_GIT_TIMEOUT_S = 10


def record(workdir: Path, started: str) -> None:
    """Writes `WORKDIR/environment.json` when a run starts; notes what is new when it goes on.

    The file holds "started" (when), "environment" (of the first start), and "changes", a list of
    "started" and "environment" for each later start under another one than the start before.

    Args:
      workdir: of the run; must exist.
      started: the date and time, for readers.

    Raises:
      OSError: if the file cannot be written.
    """
    path, found = workdir / ENVIRONMENT_FILE, environment()
    known: dict[str, Any] | None = None
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = None
    if known is None:
        write_json(path, {"started": started, "environment": found, "changes": []})
        return
    latest = ([known] + known["changes"])[-1]["environment"]
    if latest != found:
        known["changes"].append({"started": started, "environment": found})
        write_json(path, known)


def environment() -> dict[str, Any]:
    """The versions, devices and commit of this process; nothing that names the machine."""
    devices = jax.devices()
    return {
        "uniq_jax": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in _PACKAGES},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
    }


def commit(directory: Path = Path(__file__).parent) -> str:
    """The git commit of the code in a directory, with "-dirty" where files differ from it.

    Empty without git, and for code that lies in a repository which does not track it, as that of an
    installed package may.
    """
    if not _git(directory, "ls-files", "--", "__init__.py"):
        return ""
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return f"{_git(directory, 'rev-parse', 'HEAD')}{'-dirty' if changed else ''}"


def _git(directory: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
