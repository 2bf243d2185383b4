"""Figures as a table, and as lines beside their goals.

python benchmarks/table.py   # prints those of benchmarks/results.json that have a goal
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def markdown(rows: Iterable[Row]) -> str:
    """The table of `rows`, in their order; machines have letters, which are told below it."""
    rows = list(rows)
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    letters = {machine: _letter(i) for i, machine in enumerate(machines)}
    lines = [
        "| figure | value | quartiles | goal | met | compared | machine |",
        "|---|---:|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            f"`{row['name']}`",
            f"{number(row['value'])} {row['unit']}",
            _spread(row),
            "" if row["goal"] is None else f"{'≥' if row['least'] else '≤'} {row['goal']:g}",
            {None: "", True: "yes", False: "**no**"}[row["met"]],
            row["detail"].replace("|", "\\|"),
            letters[row["machine"]],
        )
        lines.append(f"| {' | '.join(cells)} |")
    below = [f"{letter}: {machine}." for machine, letter in letters.items()]
    return "\n".join([*lines, "", "  \n".join(below)]) + "\n"  # Two spaces break a line.


def line(row: Row) -> str:
    """A figure beside its goal."""
    text = f"{row['name']:28s}{number(row['value']):>10s} {row['unit']}"
    if row["spread"]:
        text += f" ({_spread(row)})"
    if row["goal"] is not None:
        sign = "at least" if row["least"] else "at most"
        text += f"   goal: {sign} {row['goal']:g}   {'met' if row['met'] else 'NOT MET'}"
    return f"{text}   {row['detail']}"


def number(value: float) -> str:
    """Three digits, or all of a thousand and more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(row: Row) -> str:
    return " to ".join(map(number, row["spread"]))


def _letter(index: int) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return letters[index] if index < len(letters) else str(index + 1)


def main() -> None:
    """Prints the figures that have a goal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = pathlib.Path(__file__).parent / "results.json"
    parser.add_argument("results", nargs="?", type=pathlib.Path, default=default)
    parser.add_argument("--without", nargs="*", default=(), help="figures that were not measured")
    arguments = parser.parse_args()
    path = arguments.results
    if not path.is_file():
        sys.exit(f"results (={path}) must be a file that a benchmark wrote, as by: make bench")
    rows = [r for r in json.loads(path.read_text(encoding="utf-8")) if r["goal"] is not None]
    rows = [row for row in rows if row["name"] not in arguments.without]
    for row in rows:
        print(line(row))
    print(f"{sum(row['met'] for row in rows)} of {len(rows)} goals are met")


if __name__ == "__main__":
    main()
