"""The page of one run."""

from collections.abc import Mapping
from typing import Any

from uniq_jax import plots
from uniq_jax.report import findings, history, html, texts
from uniq_jax.report.files import RunFiles

# Titles, and what is drawn: the first of these that a layer has.
_OVER_TRAINING = (
    ("weights: entropy ÷ bits", ("weight_entropy",)),
    ("inputs: entropy ÷ bits", ("input_entropy",)),
    ("weights: share of codes that a step changes", ("weight_flip_rate",)),
    ("inputs: share above the highest level", ("input_clipped_high",)),
    ("weights: step (mean of the channels)", ("weight_step", "weight_step_mean")),
    ("inputs: last threshold", ("input_threshold_last",)),
    ("weights: norm of the step's gradient", ("weight_step_gradient",)),
    (
        "inputs: norm of the gradient",
        ("input_step_gradient", "input_clip_gradient", "input_intervals_gradient"),
    ),
)


def run_page(run: RunFiles) -> str:
    """The whole page, of a run finished or not."""
    title = _title(run)
    body = [
        "<header>",
        html.element("h1", title),
        html.element("p", _state(run), **{"class": "state"}),
        "</header>",
        html.section("Result", _result(run)),
        html.section("Curves", _curves(run)),
    ]
    for phase, table in run.layers.items():
        body.append(html.section(f"Layers of phase {phase}", *_layers(run, phase, table)))
    if not run.layers:
        text = (
            "No layer was measured: there is no quantized phase yet, or "
            "config.layer_metrics_every_steps is 0."
        )
        body.append(html.section("Layers", html.element("p", text)))
    body.append(html.section("Config and environment", *_config(run)))
    return html.page(f"{title} · uniq_jax", body)


def _title(run: RunFiles) -> str:
    config = run.config
    last = config["phases"][-1]
    widths = (
        "" if last["method"] == "float" else f" W{last['weight_bits']}A{last['activation_bits']}"
    )
    model, data = config["model"]["name"], config["data"]["name"]
    return f"{model}{widths} ({last['method']}) on {data}: {run.name}"


def _state(run: RunFiles) -> str:
    started = f"Started {run.environment['started']}. " if run.environment else ""
    seed = f"Seed {run.config['seed']}."
    if run.result:
        seconds, steps = run.result["seconds"], run.result["steps"]
        return f"Finished: {steps} steps in {texts.duration(seconds)}. {started}{seed}"
    begun = [phase for phase in run.phases if history.last_step(run, phase)]
    if not begun:
        return f"Not finished: no step is logged yet. {started}{seed}"
    step = history.last_step(run, begun[-1])
    return f"Not finished: phase {begun[-1]} is at step {step}. {started}{seed}"


def _result(run: RunFiles) -> str:
    result = run.result
    if result is None:
        rows = [
            (phase, texts.percent(history.last_accuracy(run, phase)), history.last_step(run, phase))
            for phase in run.phases
        ]
        return html.table("Phases so far", ["phase", "test accuracy", "steps"], rows)
    floats = result["float_accuracy"]
    points = "" if floats is None else f"{100 * (result['test_accuracy'] - floats):+.2f} points"
    ratio = result["float_bytes"] / result["packed_bytes"]
    return html.table(
        "The float network and the quantized one",
        ["", "float", "quantized", "difference"],
        [
            (
                "test accuracy",
                texts.percent(floats),
                texts.percent(result["test_accuracy"]),
                points,
            ),
            ("best at any evaluation", "", texts.percent(result["best_accuracy"]), ""),
            ("weight bits", "32", result["weight_bits"], ""),
            ("activation bits", "32", result["activation_bits"], ""),
            (
                "size",
                texts.size(result["float_bytes"]),
                texts.size(result["packed_bytes"]),
                f"{ratio:.1f}x smaller",
            ),
            *_frozen(result),
        ],
    )


def _frozen(result: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of the integer network, where the run has frozen one."""
    rows: list[tuple[Any, ...]] = []
    if (size := result.get("file_bytes")) is not None:
        ratio = result["float_bytes"] / size
        rows.append(("packed file", "", texts.size(size), f"{ratio:.1f}x smaller"))
    if (integer := result.get("integer_ms")) is not None:
        floats = result["float_ms"]
        times = f"{floats:.2f} ms", f"{integer:.2f} ms"
        rows.append(("one image in JAX", *times, f"{floats / integer:.1f}x as fast"))
    if (codes := result.get("codes")) is not None:
        found = f"{result['mismatching_codes']} of {codes}"
        rows.append(("mismatching codes", "", found, ""))
    if why := result.get("not_exported"):
        rows.append(("not exported", "", why, ""))
    return rows


def _curves(run: RunFiles) -> str:
    phases = history.curves(run)
    if not phases:
        return html.element("p", "Nothing is logged yet.")
    names = " and ".join(phase.name for phase in phases)
    label = f"Loss, test accuracy and learning rate over the steps of phase {names}"
    caption = "Each phase has its colour; a vertical line parts phases."
    return html.figure(plots.curves(phases, label), caption if len(phases) > 1 else "")


def _layers(run: RunFiles, phase: str, table: Mapping[str, Any]) -> list[str]:
    layers = table["layers"]
    found = [findings.findings(layer) for layer in layers]
    marked = [index for index, notes in enumerate(found) if notes]
    rows = [_layer_row(layer, notes) for layer, notes in zip(layers, found)]
    total = sum(layer["packed_bytes"] for layer in layers)
    rest = ("everything else", *[None] * 9, texts.size(table["other_packed_bytes"]), None)
    whole = ("total", *[None] * 9, texts.size(total + table["other_packed_bytes"]), None)
    header = [
        "layer",
        "weights",
        "bits W / A",
        "entropy W",
        "entropy A",
        "clipped W",
        "clipped A",
        "dead W",
        "dead A",
        "flips",
        "packed",
        "to look at",
    ]
    parts = [
        html.table(
            f"Measured at step {table['step']} on its training batch",
            header,
            [*rows, rest, whole],
            marked,
        ),
        html.element(
            "p",
            "W: weights; A: activations, the layer's inputs. Entropy of the codes, in bits. "
            "Clipped: beyond the outermost levels (inputs: above them, where the lowest level is "
            "zero). Dead: levels that nothing maps to. Flips: weight codes that this step changed. "
            + findings.EXPLANATION,
        ),
    ]
    steps, numbers = history.layer_history(run, phase)
    if steps:
        parts.append(_over_training(phase, steps, numbers, layers))
    pictures = [
        html.figure(plots.histograms(layer, _describe(phase, layer)), layer["path"])
        for layer in layers
    ]
    note = (
        "Histograms of what each layer gets (left) and of its weights (right). Lines are the "
        "learned thresholds of inputs, and the levels of weights; more than 32 are a shaded range. "
        "The bins at both ends hold all that lies beyond. A bin that towers above the others is "
        "cut off; its share stands below."
    )
    return [*parts, html.element("p", note), '<div class="layers">', *pictures, "</div>"]


def _over_training(
    phase: str,
    steps: list[int],
    numbers: dict[str, dict[str, list[Any]]],
    layers: list[dict[str, Any]],
) -> str:
    for layer in layers:
        for what in ("weight", "input"):
            name = f"{what}_entropy"
            if what in layer and name in numbers.get(layer["path"], {}):
                values = numbers[layer["path"]]
                bits = layer[what]["bits"]
                values[name] = [None if v is None else v / bits for v in values[name]]
    panels = [
        (title, names)
        for title, names in _OVER_TRAINING
        if any(name in have for have in numbers.values() for name in names)
    ]
    label = f"Measurements of all layers over the steps of phase {phase}"
    caption = (
        "A line for each layer, from the first of the table (dark blue) to the last (light green)."
    )
    return html.figure(plots.over_training(numbers, steps, panels, label), caption)


def _layer_row(layer: Mapping[str, Any], notes: list[str]) -> list[Any]:
    numbers = layer["numbers"]
    bits = [str(layer[what]["bits"]) if what in layer else "32" for what in ("weight", "input")]
    cells: list[Any] = [layer["path"], f"{layer['weights']:,}", " / ".join(bits)]
    for write in (
        lambda what: f"{numbers[f'{what}_entropy']:.2f}",
        lambda what: texts.percent(findings.clipped_share(layer, what), 1),
        lambda what: numbers[f"{what}_dead_levels"],
    ):
        cells += [write(what) if what in layer else None for what in ("weight", "input")]
    flips = numbers.get("weight_flip_rate")
    cells.append(None if flips is None else texts.percent(flips))
    return [*cells, texts.size(layer["packed_bytes"]), "; ".join(notes)]


def _describe(phase: str, layer: Mapping[str, Any]) -> str:
    parts = []
    if "input" in layer:
        numbers = layer["numbers"]
        first, last = (numbers[f"input_threshold_{end}"] for end in ("first", "last"))
        parts.append(f"inputs, thresholds from {texts.number(first)} to {texts.number(last)}")
    if "weight" in layer:
        parts.append(f"weights, {len(layer['weight']['levels'])} levels")
    return f"Histograms of {layer['path']} in phase {phase}: {'; '.join(parts)}"


def _config(run: RunFiles) -> list[str]:
    parts = []
    if run.environment:
        starts = [("Environment at the start", run.environment)]
        for change in run.environment["changes"]:
            starts.append((f"Another environment, from {change['started']} on", change))
        for caption, start in starts:
            rows = [(name, value or "–") for name, value in start["environment"].items()]
            parts.append(html.table(caption, ["what", "value"], rows, is_text=True))
    named = {phase["name"]: phase for phase in run.config["phases"]}
    config = {**run.config, "phases": ", ".join(named), **named}
    table = html.table("Config", ["key", "value"], texts.rows_of(config), is_text=True)
    return [*parts, html.details("Every key of the config", table)]
