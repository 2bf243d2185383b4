"""Whether a workdir holds the run of a spec, or one of another."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uniq_jax.spec import RunSpec, differences, to_json
from uniq_jax.train.logs import METRICS_FILE
from uniq_jax.train.sources import CONFIG_FILE

# A run may go on on other devices, and where data lie elsewhere: batches, and their order, are
# those of all devices together, whoever decodes them. What is written beside the metrics, and what
# the network is exported to, may be decided at any time.
_FREE = re.compile(
    r"config\.(mesh|memory_limit_gib|export|tensorboard|data\.data_dir|data\.workers)[.:]"
)

# What a network was trained from is no longer read when it is evaluated or exported.
_FREE_WHEN_TRAINED = re.compile(r"config\.(init_from|phases\[\d+\]\.loss\.teacher):")


def changes(config: Mapping[str, Any], spec: RunSpec, *, trains: bool) -> list[str]:
    """What makes the spec another run's, as `differences` says it.

    Args:
      config: of the run that is there, as its config.json holds it.
      spec: what is to be done.
      trains: whether it is to be trained, not only evaluated or exported.
    """
    return [
        line
        for line in differences(config, to_json(spec))
        if not _FREE.match(line) and (trains or not _FREE_WHEN_TRAINED.match(line))
    ]


def check(spec: RunSpec, workdir: Path, *, trains: bool) -> None:
    """Raises a ValueError that names what differs where another run has begun in `workdir`."""
    path = workdir / CONFIG_FILE
    if not path.exists() or not has_begun(workdir):
        return
    changed = changes(json.loads(path.read_text()), spec, trains=trains)
    if changed:
        shown = "\n  ".join(changed[:10])
        raise ValueError(
            f"workdir (={str(workdir)!r}) holds a run of another config; give this one a directory "
            f"of its own, or remove that one. What differs:\n  {shown}"
        )


def has_begun(workdir: Path) -> bool:
    """Whether something was trained there: a run may have ended before, out of memory for one."""
    metrics = workdir / METRICS_FILE
    if metrics.exists() and metrics.stat().st_size:
        return True
    return any(path.name.isdigit() for path in workdir.glob("*/checkpoints/*"))
