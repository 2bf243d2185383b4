"""Specs as plain dicts and lists, and how two of them differ."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uniq_jax.spec.sections import (
    DataSpec,
    ExportSpec,
    LossSpec,
    ModelSpec,
    OptimizerSpec,
    OscillationSpec,
    PhaseSpec,
    RunSpec,
)


def to_json(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain dicts and lists, for config.json."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple | list):
            return [plain(inner) for inner in value]
        return value

    return plain(dataclasses.asdict(spec))


def from_json(values: Mapping[str, Any]) -> RunSpec:
    """The spec that `to_json` gave, as read from a run's config.json.

    Raises:
      TypeError: if a key is missing or unknown, as in a file of another version.
    """

    def phase(section: Mapping[str, Any]) -> PhaseSpec:
        inner = {
            "optimizer": OptimizerSpec(**section["optimizer"]),
            "loss": LossSpec(**section["loss"]),
            "oscillation": OscillationSpec(**section["oscillation"]),
        }
        return PhaseSpec(**{**section, **inner})

    data = values["data"]
    data = {**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])}
    sections = {
        "data": DataSpec(**data),
        "model": ModelSpec(**values["model"]),
        "phases": tuple(map(phase, values["phases"])),
        "export": ExportSpec(**values["export"]),
    }
    return RunSpec(**{**values, **sections})


def differences(old: Any, new: Any, prefix: str = "config") -> list[str]:
    """The keys whose values differ between two results of `to_json`, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(
                old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}"
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for i, (a, b) in enumerate(zip(old, new))
            for line in differences(a, b, f"{prefix}[{i}]")
        ]
    return [] if old == new else [f"{prefix}: {old!r} there, {new!r} now"]
