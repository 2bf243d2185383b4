"""Runs a config many times, as its `sweep(add)` says, and collects the results in one table.

    python launch/sweep.py --config=configs/digits_w2a2.py --workdir=runs/digits [-- ARGUMENTS]

A config file that has a sweep defines, beside `get_config`,

    def sweep(add):
        for seed in range(3):
            add(**{"seed": seed, "quantized.weight_bits": 1})

Each `add` is one run. A name with a dot is a key of the config, one without is an argument of the
config file. Each run has a directory of its own below --workdir, named by what it is given.
ARGUMENTS go to uniq_jax.main in all runs.

The runs are trained one after another, or --jobs at a time, whose output is in log.txt of each
directory. A finished one is skipped, an unfinished one goes on, and where one fails it is named at
the end, with the exit code 1; 75 says that runs were only stopped. A finished one of another config
is an error. `--slurm=FILE` writes a job array for `sbatch FILE` in place of that. WORKDIR/sweep.csv
and sweep.md hold the table; --collect only makes it anew. PYTHON names the interpreter of the runs,
by default this one.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import sweep_specs
from rich.console import Console
from rich.table import Table
from side_by_side import STOPPED, run_all

# Field of result.json → how it is printed.
COLUMNS = {
    "test_accuracy": lambda v: f"{100 * v:.2f}%",
    "best_accuracy": lambda v: f"{100 * v:.2f}%",
    "float_accuracy": lambda v: f"{100 * v:.2f}%",
    "packed_bytes": lambda v: f"{v:,}",
    "steps": lambda v: f"{v:,}",
    "seconds": lambda v: f"{v:.0f}",
}
LONGEST_NAME = 120


class SweepError(ValueError):
    """The sweep cannot be made into runs; the message says why."""


def load(path: str) -> ModuleType:
    """Imports a config file that has a sweep."""
    if not Path(path).is_file():
        raise SweepError(f"--config (={path!r}) is not a file")
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise SweepError(f"--config (={path!r}) has no sweep: def sweep(add): add(**{{…}})")
    return module


def overrides_of(module: ModuleType) -> list[dict[str, Any]]:
    """What each `add` of the sweep was given, in their order."""
    runs: list[dict[str, Any]] = []

    def add(**overrides: Any) -> None:
        if overrides in runs:
            raise SweepError(f"sweep adds {overrides} twice")
        runs.append(overrides)

    module.sweep(add)
    if not runs:
        raise SweepError("sweep adds no run")
    names = [name_of(run) for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise SweepError(f"sweep adds two runs that are both called {name!r}")
    return runs


def name_of(overrides: Mapping[str, Any]) -> str:
    """A readable directory name, another one for other overrides."""
    text = ",".join(f"{key}={value}" for key, value in overrides.items()) or "default"
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text).lstrip(".")
    if name != text or len(name) > LONGEST_NAME:
        digest = hashlib.blake2b(repr(dict(overrides)).encode(), digest_size=3).hexdigest()
        name = f"{name[:LONGEST_NAME]}-{digest}"
    return name


def command(config: str, overrides: Mapping[str, Any], workdir: Path, more: list[str]) -> list[str]:
    """The command of one run."""
    path, _, arg = config.partition(":")
    arguments = _argument(arg, overrides)
    return [
        os.environ.get("PYTHON", sys.executable),
        "-m",
        "uniq_jax.main",
        f"--config={path}:{arguments}" if arguments else f"--config={path}",
        f"--workdir={workdir}",
        *_words(overrides),
        *more,
    ]


def _words(overrides: Mapping[str, Any]) -> list[str]:
    """The arguments that override keys of the config."""
    return [f"--config.{key}={value}" for key, value in overrides.items() if "." in key]


def _argument(arg: str, overrides: Mapping[str, Any]) -> str:
    """What follows the colon of --config."""
    of_file = [f"{key}={value}" for key, value in overrides.items() if "." not in key]
    return ",".join(filter(None, [arg, *of_file]))


def is_finished(workdir: Path) -> bool:
    """Whether the run has its result."""
    return (workdir / "result.json").exists()


def slurm_script(commands: list[list[str]], output: Path) -> str:
    """A job array, one command each."""
    cases = "\n".join(f"    {i}) exec {shlex.join(c)} ;;" for i, c in enumerate(commands))
    return (
        "#!/usr/bin/env bash\n"
        f"#SBATCH --job-name=uniq_jax-sweep\n#SBATCH --array=0-{len(commands) - 1}\n"
        f'#SBATCH --chdir="{Path.cwd()}"\n#SBATCH --output="{output}/slurm-%A_%a.out"\n'
        f'case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac\n'
    )


def collect(workdirs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The results of the runs by name, empty where there is none yet."""
    rows = []
    for name, workdir in workdirs.items():
        path = workdir / "result.json"
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows.append({"run": name, **{column: values.get(column) for column in COLUMNS}})
    return rows


def write(rows: list[dict[str, Any]], directory: Path) -> None:
    """Writes sweep.csv, with all digits, and sweep.md."""
    with open(directory / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["run", *COLUMNS])
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"| run | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_texts(row))} |" for row in rows]
    (directory / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> Table:
    """The results for the terminal."""
    result = Table("run", box=None, pad_edge=False)
    for column in COLUMNS:
        result.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        result.add_row(*_texts(row))
    return result


def _texts(row: Mapping[str, Any]) -> list[str]:
    values = ((row[column], show) for column, show in COLUMNS.items())
    return [row["run"], *("-" if value is None else show(value) for value, show in values)]


def check(
    module: ModuleType, config: str, runs: Mapping[Path, Mapping[str, Any]], more: list[str]
) -> None:
    """Raises a SweepError that names the run whose config is wrong, before any is trained.

    So is a finished run of another config: its directory is named by what `add` was given alone.
    """
    _, _, arg = config.partition(":")
    for workdir, overrides in runs.items():
        try:
            built = module.get_config(_argument(arg, overrides) or None)
            spec = sweep_specs.overridden(built, [*_words(overrides), *more])
            changed = sweep_specs.changes(workdir, spec) if is_finished(workdir) else []
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SweepError(f"run {workdir.name}: {error}") from None
        if changed:
            shown = "\n  ".join(changed[:10])
            raise SweepError(
                f"run {workdir.name} is finished, but by another config; repeat the arguments of "
                f"that sweep, or give this one a --workdir of its own. What differs:\n  {shown}"
            )


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments of the runs behind `--`."""
    first, more = argv, []
    if "--" in argv:
        at = argv.index("--")
        first, more = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, with its arguments")
    parser.add_argument("--workdir", required=True, type=Path, help="directory of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with a log.txt")
    parser.add_argument("--dry-run", action="store_true", help="print the commands; run nothing")
    parser.add_argument("--slurm", metavar="FILE", type=Path, help="write a job array")
    parser.add_argument("--collect", action="store_true", help="only make the table")
    options = parser.parse_args(first)
    if options.jobs < 1:
        parser.error(f"--jobs (={options.jobs}) must be at least 1")
    return options, more


def main(argv: list[str]) -> int:
    """Does what the arguments say; returns the exit code."""
    options, more = parse(argv)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    directory = options.workdir.absolute()
    try:
        module = load(options.config.partition(":")[0])
        runs = {directory / name_of(overrides): overrides for overrides in overrides_of(module)}
        check(module, options.config, runs, more)
    except SweepError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    workdirs = {workdir.name: workdir for workdir in runs}
    commands = {
        workdir.name: command(options.config, overrides, workdir, more)
        for workdir, overrides in runs.items()
    }
    left = [name for name in commands if not is_finished(workdirs[name])]
    if options.dry_run:
        for name in commands:
            mark = "" if name in left else "  # finished: it is skipped"
            console.print(shlex.join(commands[name]) + mark)
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    if options.slurm is not None:
        if not left:
            console.print("every run is finished; there is nothing to submit")
            return 0
        script = slurm_script([commands[name] for name in left], directory)
        options.slurm.write_text(script, encoding="utf-8")
        console.print(f"wrote {len(left)} of {len(commands)} runs; now: sbatch {options.slurm}")
        return 0
    unfinished = {}
    if not options.collect:
        unfinished = train(console, commands, workdirs, left, options.jobs)
    rows = collect(workdirs)
    write(rows, directory)
    console.print(table(rows))
    for name, code in unfinished.items():
        what = "is not finished" if code == STOPPED else f"failed with exit code {code}"
        print(f"sweep.py: run {name} {what}", file=sys.stderr)
    if set(unfinished.values()) == {STOPPED}:
        print("sweep.py: was stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    return 1 if unfinished else 0


def train(
    console: Console,
    commands: Mapping[str, list[str]],
    workdirs: Mapping[str, Path],
    left: list[str],
    jobs: int,
) -> dict[str, int]:
    """Runs what is left, `jobs` at a time; exit codes of what is not finished, by name.

    What was not begun, as a signal came before, counts as stopped.
    """
    heads = {name: f"[{i}/{len(commands)}] {name}" for i, name in enumerate(commands, start=1)}
    for name in commands:
        if name not in left:
            console.print(f"{heads[name]}: finished")

    def log(name: str) -> Path | None:
        # Progress of several runs would be a muddle on one terminal.
        return workdirs[name] / "log.txt" if jobs > 1 else None

    def began(name: str) -> None:
        where = log(name)
        console.print(heads[name] if where is None else f"{heads[name]}: see {where}")

    def ended(name: str, status: int) -> None:
        if jobs > 1:
            word = {0: "done", STOPPED: "stopped"}.get(status, "failed")
            console.print(f"{heads[name]}: {word}")

    statuses = run_all(
        {name: commands[name] for name in left}, jobs=jobs, log=log, began=began, ended=ended
    )
    return {name: code for name in left if (code := statuses.get(name, STOPPED))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
