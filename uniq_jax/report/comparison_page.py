"""The page that compares runs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uniq_jax import plots
from uniq_jax.plots.comparison import Point
from uniq_jax.plots.curves import Curve
from uniq_jax.report import history, html, texts
from uniq_jax.report.files import RunFiles

_CURVES = (("loss", "training loss", 1), ("test_accuracy", "test accuracy, %", 100))


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """A name for each run: that of its directory, with as much before it as tells them apart.

    Example:
      >>> names_of([Path("a/x/run"), Path("b/x/run")])
      ['a/x/run', 'b/x/run']
      >>> names_of([Path("runs/one"), Path("runs/two")])
      ['one', 'two']
    """
    parts = [workdir.absolute().parts for workdir in workdirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{workdir} ({number})" for number, workdir in enumerate(workdirs, start=1)]


def comparison_page(runs: Sequence[tuple[str, RunFiles]]) -> str:
    """The whole page of several runs, each with its name; finished or not."""
    body = [
        "<header>",
        html.element("h1", f"{len(runs)} runs compared"),
        html.element("p", ", ".join(name for name, _ in runs)),
        "</header>",
        html.section("Results", html.table("The runs", _HEADER, [_row(*run) for run in runs])),
    ]
    points = [
        Point(name, run.result["packed_bytes"], run.result["test_accuracy"])
        for name, run in runs
        if run.result is not None
    ]
    if points:
        label = f"Test accuracy against packed size of {', '.join(p.name for p in points)}"
        picture = html.figure(plots.accuracy_against_size(points, label))
    else:
        picture = html.element("p", "No run is finished.")
    body.append(html.section("Accuracy against size", picture))
    drawn = [(name, _curves_of(run)) for name, run in runs]
    if any(curves for _, curves in drawn):
        label = f"Training loss and test accuracy of {', '.join(name for name, _ in runs)}"
        body.append(html.section("Curves", html.figure(plots.overlay(drawn, label))))
    different = _different_keys(runs)
    if different:
        header = ["key", *(name for name, _ in runs)]
        caption = "Keys of all configs whose values differ"
        table = html.table(caption, header, different, is_text=True)
        body.append(html.section("Configs", table))
    return html.page(f"{len(runs)} runs · uniq_jax", body)


_HEADER = [
    "run",
    "model",
    "data",
    "method",
    "bits W / A",
    "seed",
    "float",
    "quantized",
    "size",
    "time",
]


def _row(name: str, run: RunFiles) -> list[Any]:
    config, last, result = run.config, run.config["phases"][-1], run.result
    known = [name, config["model"]["name"], config["data"]["name"], last["method"]]
    known += [f"{last['weight_bits']} / {last['activation_bits']}", config["seed"]]
    if result is None:
        accuracy = history.last_accuracy(run, last["name"])
        return [*known, None, f"{texts.percent(accuracy)}, not finished", None, None]
    return [
        *known,
        texts.percent(result["float_accuracy"]),
        texts.percent(result["test_accuracy"]),
        texts.size(result["packed_bytes"]),
        texts.duration(result["seconds"]),
    ]


def _curves_of(run: RunFiles) -> list[tuple[str, Curve]]:
    phases = history.curves(run)
    found = []
    for key, title, scale in _CURVES:
        curves = [phase.curves[key] for phase in phases if key in phase.curves]
        steps = [step for curve in curves for step in curve.steps]
        if steps:
            values = [scale * value for curve in curves for value in curve.values]
            found.append((title, Curve(steps, values)))
    return found


def _different_keys(runs: Sequence[tuple[str, RunFiles]]) -> list[list[str]]:
    configs = []
    for _, run in runs:
        phases = {phase["name"]: phase for phase in run.config["phases"]}
        configs.append(dict(texts.rows_of({**run.config, "phases": ", ".join(phases), **phases})))
    keys = [key for key in configs[0] if all(key in config for config in configs)]
    rows = [[key, *(config[key] for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
