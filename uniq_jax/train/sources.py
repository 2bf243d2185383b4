"""Where on disk parameters to start from lie, and which phase of which run trained them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"


def locate(path: str, *, key: str, phases: Sequence[str] = ()) -> Path:
    """The file, or the directory of checkpoints, that a key of the config names.

    Args:
      path: a file; or a workdir, of whose phases one's best checkpoints are found; or a directory
        of checkpoints, or one whose `best` has some.
      key: for messages.
      phases: of a workdir, those to look in first; then its phases from the last to the first.

    Raises:
      FileNotFoundError: if there is nothing there.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{key} (={path!r}) does not exist")
    if place.is_file():
        return place
    names = (*phases, *reversed(list(_recorded(place))), "quantized", "float")
    for directory in (place, place / "best", *(place / name / "best" for name in names)):
        if directory.is_dir() and any(p.name.isdigit() for p in directory.iterdir()):
            return directory
    raise FileNotFoundError(
        f"{key} (={path!r}) must be a .pth, .safetensors or .npz file, a workdir "
        "with a checkpoint in PHASE/best, or a directory of checkpoints"
    )


def trained_by(place: Path) -> Mapping[str, Any] | None:
    """The section of the phase whose checkpoints lie in a directory; None where none is known.

    Args:
      place: as from `locate`; known are directories below a workdir.
    """
    place = place.absolute()
    for root in place.parents:
        phase = _recorded(root).get(place.relative_to(root).parts[0])
        if phase is not None:
            return phase
    return None


def _recorded(workdir: Path) -> dict[str, Mapping[str, Any]]:
    """The phases that a workdir's config.json lists, by name; none where it is none."""
    path = workdir / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        return {phase["name"]: phase for phase in json.loads(path.read_text())["phases"]}
    except (ValueError, KeyError, TypeError):
        # Another program's file of that name.
        return {}
