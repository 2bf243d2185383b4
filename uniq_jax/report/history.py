"""The curves that a run's records hold."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uniq_jax.plots.curves import Curve, Phase
from uniq_jax.report.files import RunFiles

_CURVES = ("loss", "test_loss", "test_accuracy", "learning_rate")


def curves(run: RunFiles) -> list[Phase]:
    """The curves of the phases that have begun, over the steps of the run."""
    phases, start = [], 0
    for name in run.phases:
        records = [record for record in run.records if record["phase"] == name]
        if not records:
            continue
        found = {key: _curve(records, key, start) for key in _CURVES}
        present = {key: curve for key, curve in found.items() if curve.steps}
        phases.append(Phase(name, start, present))
        start += max(record["step"] for record in records)
    return phases


def layer_history(run: RunFiles, phase: str) -> tuple[list[int], dict[str, dict[str, list[Any]]]]:
    """The steps at which a phase's layers were measured, and their numbers at each.

    Returns:
      Steps, and by path and by name the numbers; None where a layer lacks one.
    """
    records = [r for r in run.records if r["phase"] == phase and "layers" in r]
    paths = dict.fromkeys(path for record in records for path in record["layers"])
    layers: dict[str, dict[str, list[Any]]] = {}
    for path in paths:
        each = [record["layers"].get(path, {}) for record in records]
        names = dict.fromkeys(name for numbers in each for name in numbers)
        layers[path] = {name: [numbers.get(name) for numbers in each] for name in names}
    return [record["step"] for record in records], layers


def last_accuracy(run: RunFiles, phase: str) -> float | None:
    """Of a phase, at its newest evaluation."""
    found = [r["test_accuracy"] for r in _of(run.records, phase) if "test_accuracy" in r]
    return found[-1] if found else None


def last_step(run: RunFiles, phase: str) -> int:
    """The newest step of a phase that left a record; 0 for none."""
    return max((record["step"] for record in _of(run.records, phase)), default=0)


def _of(records: Iterable[Mapping[str, Any]], phase: str) -> Iterable[Mapping[str, Any]]:
    return (record for record in records if record["phase"] == phase)


def _curve(records: Sequence[Mapping[str, Any]], key: str, start: int) -> Curve:
    points = [(start + record["step"], record[key]) for record in records if key in record]
    return Curve([step for step, _ in points], [value for _, value in points])
