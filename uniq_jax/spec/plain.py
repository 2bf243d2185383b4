"""Specs as plain dicts and lists, and how two of them differ."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uniq_jax.spec.sections import RunSpec


def to_json(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain dicts and lists, for config.json."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple | list):
            return [plain(inner) for inner in value]
        return value

    return plain(dataclasses.asdict(spec))


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
