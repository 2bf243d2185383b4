"""The modules of `benchmarks/`, which is no package: scripts import each other by their names."""

import importlib
import pathlib
import sys

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"

# Not for longer: they have names such as "input" and "compile".
sys.path.insert(0, str(BENCHMARKS))
try:
    measure, table, collectives, scaling, steps, exact_cases = map(
        importlib.import_module,
        ("measure", "table", "collectives", "scaling", "steps", "exact_cases"),
    )
finally:
    sys.path.remove(str(BENCHMARKS))
