"""What a run left in its directory."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of a run, finished or not.

    Attributes:
      name: of its directory.
      config: `config.json`.
      records: `metrics.jsonl`, line by line.
      result: `result.json`; None while the run is not finished.
      environment: `environment.json`; None where a run has none.
      layers: `PHASE/layers.json` of the phases that have one, in the phases' order.
    """

    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any] | None
    environment: dict[str, Any] | None
    layers: dict[str, dict[str, Any]]

    @property
    def phases(self) -> list[str]:
        """Names of the phases, in their order."""
        return [phase["name"] for phase in self.config["phases"]]


def read_run(workdir: Path) -> RunFiles:
    """Reads the files of a run.

    Raises:
      ValueError: if `workdir` is not a run's directory, or a file in it is not what it should be;
        the message holds the path.
    """
    if not workdir.is_dir():
        raise ValueError(f"{str(workdir)!r} is not a directory")
    config = _json(workdir / "config.json")
    if config is None:
        raise ValueError(f"{str(workdir)!r} is not the directory of a run: it has no config.json")
    if not isinstance(config.get("phases"), list):
        raise ValueError(f"{workdir / 'config.json'} is not the config of a run")
    names = [phase["name"] for phase in config["phases"]]
    layers = {name: _json(workdir / name / "layers.json") for name in names}
    return RunFiles(
        name=workdir.resolve().name,
        config=config,
        records=_records(workdir / "metrics.jsonl"),
        result=_json(workdir / "result.json"),
        environment=_json(workdir / "environment.json"),
        layers={name: found for name, found in layers.items() if found is not None},
    )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return _numbers(value)


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may still grow."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}, line {number}: not JSON") from None
        if not isinstance(record, dict) or not {"phase", "step"} <= record.keys():
            raise ValueError(f'{path}, line {number}: no object with "phase" and "step"')
        records.append(_numbers(record))
    return records


def _numbers(value: Any) -> Any:
    """The value with "nan", "inf" and "-inf", as logs spell them, as floats again."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
