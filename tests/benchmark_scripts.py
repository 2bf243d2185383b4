"""The modules of `benchmarks/`, which is no package: scripts import each other by their names."""

import importlib
import pathlib
import sys

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"

# Not for longer: they have names such as "input" and "compile".
_DIRECTORIES = [str(BENCHMARKS), str(BENCHMARKS / "accelerators")]
sys.path[:0] = _DIRECTORIES
try:
    first = ["measure", "table", "collectives", "scaling", "steps", "programs"]
    measure, table, collectives, scaling, steps, programs = map(importlib.import_module, first)
    others = ("exact_cases", "exact_foundation", "accuracy", "accuracy_runs")
    exact_cases, exact_foundation, accuracy, accuracy_runs = map(importlib.import_module, others)
finally:
    for directory in _DIRECTORIES:
        sys.path.remove(directory)
