"""Whether what a run starts from, or learns from, is still what it was when the run began."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from uniq_jax.spec import RunSpec
from uniq_jax.train import start
from uniq_jax.train.logs import write_json

SOURCES_FILE = "sources.json"


def digests(spec: RunSpec) -> dict[str, str]:
    """A digest of all arrays of each source, by the key of the config that names it."""
    found = {}
    if spec.init_from:
        found["config.init_from"] = _digest(start.read_source(spec.init_from))
    for phase in spec.phases:
        if phase.loss.teacher:
            key = f"config.{phase.name}.loss.teacher"
            order = ("float", "quantized")
            found[key] = _digest(start.read_source(phase.loss.teacher, key=key, phases=order))
    return found


def check(spec: RunSpec, workdir: Path, now: Mapping[str, str]) -> None:
    """Raises a ValueError that names the key whose source has changed since the run began."""
    path = workdir / SOURCES_FILE
    if not path.exists():
        return
    places = {f"config.{phase.name}.loss.teacher": phase.loss.teacher for phase in spec.phases}
    places["config.init_from"] = spec.init_from
    for key, digest in json.loads(path.read_text()).items():
        if now.get(key) != digest:
            raise ValueError(
                f"{key} (={places[key]!r}) has other arrays now than when the run in "
                f"{workdir} began; put those back, or give the run with the new ones a workdir of "
                "its own"
            )


def write(workdir: Path, now: Mapping[str, str]) -> None:
    """Keeps the digests for `check`."""
    write_json(workdir / SOURCES_FILE, now)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        total.update(f"{name} {array.shape} {array.dtype}".encode())
        total.update(array.tobytes())
    return total.hexdigest()
