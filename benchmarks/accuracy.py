"""What trained networks reach, and their integer forms: runs, kept small in `results/`.

python benchmarks/accuracy.py train NAME …     # runs of accuracy_runs.py, in runs/results
python benchmarks/accuracy.py keep WORKDIR …   # finished runs, frozen, to results/
python benchmarks/accuracy.py table            # results/README.md, and the table in README.md

What is kept of a run is its config, environment, metrics and result, and `frozen.json`: the
accuracy of the network as training evaluates it, and of its integer network as it is read from its
packed file, on the whole test set, here, whatever the run was trained on.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from accuracy_runs import RUNS, train

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "results"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_KEPT = ("config.json", "environment.json", "metrics.jsonl", "result.json")


def keep(workdir: pathlib.Path, results: pathlib.Path = RESULTS) -> dict[str, Any]:
    """Puts the small files of a finished run in `results`, and `frozen.json` beside them.

    Returns:
      What `frozen.json` holds; {} for a float run.

    Raises:
      FileNotFoundError: if the run is not finished.
    """
    if not (workdir / "result.json").is_file():
        raise FileNotFoundError(f"{workdir} holds no finished run: it has no result.json")
    directory = results / workdir.name
    result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    # Takes long, and may fail: what is kept stays whole until it is there.
    found = {} if result["method"] == "float" else frozen(workdir)
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in _KEPT:
        shutil.copyfile(workdir / name, partial / name)
    shorten(partial / "metrics.jsonl")
    del result["files"]  # They are not here.
    written = {"result.json": result} | ({"frozen.json": found} if found else {})
    for name, content in written.items():
        (partial / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    partial.replace(directory)
    return found


def shorten(metrics: pathlib.Path) -> None:
    """Leaves loss, accuracy and rate: measurements of layers are nine tenths of the file."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if "layers" not in json.loads(line)]
    metrics.write_text("".join(kept), encoding="utf-8")


def frozen(workdir: pathlib.Path) -> dict[str, Any]:
    """Freezes a run's network, and compares both on the whole test set."""
    # Not for a table.
    import jax
    import jax.numpy as jnp
    import numpy as np
    from rich.console import Console

    from uniq_jax import deploy
    from uniq_jax.spec import from_json
    from uniq_jax.train import environment, exports, loop
    from uniq_jax.train import frozen as freezing
    from uniq_jax.train.run import Run

    spec = from_json(json.loads((workdir / "config.json").read_text(encoding="utf-8")))
    everything = dataclasses.replace(spec.export, formats="packed", check_images=10**9)
    run = Run(dataclasses.replace(spec, export=everything))
    phase, step, state = loop.newest(run, workdir, Console(quiet=True))
    both = freezing.freeze(run, phase, state)
    exported = exports.write(run, phase, step, both, workdir)
    network = deploy.load(exported.directory / exports.PACKED_FILE)
    program = run.program(phase)
    normalize, classes = jax.jit(program.normalize), jax.jit(lambda x: jnp.argmax(network(x), -1))
    correct = sum(
        int(np.sum(np.asarray(classes(normalize(batch["image"]))) == batch["label"]))
        for batch in run.test_batches(10**9)
    )
    float_ms, integer_ms = freezing.milliseconds(both)
    return {
        "images": both.check.images,
        "accuracy": run.evaluator(program)(*state.evaluated)["test_accuracy"],
        "integer_accuracy": correct / both.check.images,
        "class_mismatches": both.check.class_mismatches,
        "codes": both.check.codes,
        "mismatching_codes": both.check.mismatches,
        "file_bytes": exported.files["packed"][exports.PACKED_FILE],
        "float_ms": float_ms,
        "integer_ms": integer_ms,
        "environment": environment.environment(),
    }


@dataclasses.dataclass(frozen=True)
class Kept:
    """A run in `results/`."""

    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    devices: tuple[str, ...]
    frozen: dict[str, Any]

    @classmethod
    def read(cls, directory: pathlib.Path) -> "Kept":
        """A directory that `keep` wrote."""

        def section(name: str) -> dict[str, Any]:
            return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))

        recorded = section("environment")
        # A run may have gone on elsewhere.
        parts = [recorded, *recorded.get("changes", ())]
        devices = tuple(dict.fromkeys(part["environment"]["devices"] for part in parts))
        return cls(directory.name, section("config"), section("result"), devices, section("frozen"))

    @property
    def group(self) -> tuple[Any, ...]:
        """What runs share that differ by their seed alone."""
        config = {**self.config, "seed": 0, "data": {**self.config["data"], "data_dir": ""}}
        # How often something is logged, and what is exported, changes no network.
        shown = ("data", "model", "phases", "init_from")
        return tuple(json.dumps(config[key], sort_keys=True) for key in shown)


def rows(runs: Iterable[Kept], *, best: bool = False) -> list[str]:
    """The table's lines, in Markdown, from the most bits and the most accurate on.

    Args:
      runs: of which those that differ by their seed alone share a line.
      best: of each network, width and method only the most accurate one.
    """
    groups: dict[tuple[Any, ...], list[Kept]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)

    def width(group: list[Kept]) -> tuple[Any, ...]:
        result = group[0].result
        bits = -result["weight_bits"], -result["activation_bits"]
        return result["dataset"], result["model"], *bits

    def accuracy(group: list[Kept]) -> float:
        return statistics.mean(run.frozen["accuracy"] for run in group)

    ordered = sorted(groups.values(), key=lambda group: (*width(group), -accuracy(group)))
    firsts: dict[Any, list[Kept]] = {}
    for group in ordered:
        firsts.setdefault((*width(group), group[0].result["method"] if best else id(group)), group)
    head = (
        "data, network | bits | method | starts from | learns from | epochs | seeds | float | "
        "quantized | points | integer network | bytes on disk | ms, float / integer"
    )
    lines = [f"| {head} |", f"|{'---|' * (head.count('|') + 1)}"]
    most: set[tuple[Any, ...]] = set()
    for group in firsts.values():
        lines.append(_row(group, is_best=width(group) not in most))
        most.add(width(group))
    return lines


def _row(group: list[Kept], *, is_best: bool) -> str:
    first = group[0]
    last = first.config["phases"][-1]
    quantized = [phase for phase in first.config["phases"] if phase["method"] != "float"]
    epochs = " + ".join(f"{phase['total_epochs']:g}" for phase in quantized)
    loss = last["loss"]
    teacher = loss["teacher_model"] if loss["teacher"] else "labels"
    if loss["teacher"] and loss["teacher_temperature"] != 1:
        teacher += f", T={loss['teacher_temperature']:g}"
    before = _before(first)
    floats = [run.result["float_accuracy"] for run in (group if before is None else [before])]
    accuracies = [run.frozen["accuracy"] for run in group]
    same = all(
        run.frozen["class_mismatches"] == 0
        and run.frozen["mismatching_codes"] == 0
        and run.frozen["integer_accuracy"] == run.frozen["accuracy"]
        for run in group
    )
    times = [
        statistics.median(run.frozen[key] for run in group) for key in ("float_ms", "integer_ms")
    ]
    quantized_percent = _percent(accuracies)
    points = ""
    if None not in floats:
        points = f"{100 * (statistics.mean(accuracies) - statistics.mean(floats)):+.2f}"
    cells = (
        f"{first.result['dataset']}, {first.result['model']}",
        _bits(last),
        last["method"],
        f"{before.result['method']} {_bits(before.config['phases'][-1])}" if before else "float",
        teacher,
        epochs,
        str(len(group)),
        _percent(floats) if None not in floats else "",
        f"**{quantized_percent}**" if is_best else quantized_percent,
        points,
        "the same classes" if same else "**differs**",
        f"{first.frozen['file_bytes']:,}",
        f"{times[0]:.2f} / {times[1]:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _bits(phase: dict[str, Any]) -> str:
    return f"W{phase['weight_bits']}A{phase['activation_bits']}"


def _before(run: Kept) -> Kept | None:
    """The run of these results that another one starts from; None where that is a float network."""
    directory = RESULTS / pathlib.Path(run.config["init_from"]).name
    return Kept.read(directory) if (directory / "frozen.json").is_file() else None


def _percent(values: Sequence[float]) -> str:
    """The mean; of several the smallest and the largest too."""
    mean = f"{100 * statistics.mean(values):.2f}"
    if len(values) == 1 or min(values) == max(values):
        return f"{mean}%"
    return f"{mean}% ({100 * min(values):.2f} to {100 * max(values):.2f})"


def write_table(results: pathlib.Path = RESULTS, readme: pathlib.Path = ROOT / "README.md") -> None:
    """Puts the table between the marks of a README, and in that of `results`."""
    runs = [Kept.read(path.parent) for path in sorted(results.glob("*/frozen.json"))]
    table, best = "\n".join(rows(runs)), "\n".join(rows(runs, best=True))
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} must have {BEGIN!r} and, later, {END!r}")
    trained: dict[str, list[str]] = {}
    for run in runs:
        trained.setdefault(", then ".join(run.devices), []).append(run.name)
    devices = "\n".join(f"- {where}: {', '.join(names)}" for where, names in trained.items())
    page = (
        "# Results\n\n`python benchmarks/accuracy.py table` writes this page. Each directory has "
        "what `python benchmarks/accuracy.py keep` left of one run: config.json, environment.json, "
        "metrics.jsonl and result.json of the training, and frozen.json of the integer network.\n\n"
        f"{table}\n\nAccuracies and times of the table are of evaluations on a CPU. Trained on\n\n"
        f"{devices}\n"
    )
    for path, content in (
        (readme, f"{before}{BEGIN}\n{best}\n{END}{after}"),
        (results / "README.md", page),
    ):
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)


def main() -> None:
    """Does what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="trains runs, or goes on with them")
    training.add_argument("names", nargs="+", metavar="NAME", help=", ".join(RUNS))
    training.add_argument("--jobs", type=int, default=1, help="runs at a time")
    keeping = commands.add_parser("keep", help="keeps what is small of finished runs")
    keeping.add_argument("workdirs", nargs="+", metavar="WORKDIR", type=pathlib.Path)
    commands.add_parser("table", help="writes the tables")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.command == "train":
        if arguments.jobs < 1:
            parser.error(f"--jobs (={arguments.jobs}) must be at least 1")
        unknown = set(arguments.names) - set(RUNS)
        if unknown:
            parser.error(f"NAME (={min(unknown)!r}) must be one of: {', '.join(RUNS)}")
        sys.exit(train(arguments.names, arguments.jobs))
    if arguments.command == "table":
        write_table()
        return
    for workdir in arguments.workdirs:
        found = keep(workdir)
        print(f"{workdir}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
