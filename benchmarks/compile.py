"""How long a training step takes to trace and to compile, at first and from the kept program.

python benchmarks/compile.py [NAME …]   # of the steps; all without one

Each measurement is a process of its own. In every turn all steps are compiled with an empty cache
of compiled programs, into which JAX puts them, as in a first run; and then again from it, as in the
runs that follow.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from measure import RESULTS, Result, Times, keep
from steps import Case, jitted_on

from uniq_jax.train import sharding
from uniq_jax.train.compilation import compiler_options

CASES = {
    "r18_float": Case("resnet18"),
    "r18_uniq2": Case("resnet18", "uniq", 2),
    "r18_n2uq2": Case("n2uq_resnet18", "n2uq", 2),
    "r18_n2uq4": Case("n2uq_resnet18", "n2uq", 4),
    "r32_float": Case("preact_resnet32"),
    "r32_uniq2": Case("preact_resnet32", "uniq", 2),
    "r32_n2uq2": Case("preact_resnet32", "n2uq", 2),
    "r32_n2uq4": Case("preact_resnet32", "n2uq", 4),
}
FIGURES = {
    "trace": "tracing and lowering",
    "compile": "compiling, at first",
    "compile_kept": "compiling, from JAX's persistent cache",
}


def seconds(case: Case) -> dict[str, float]:
    """What this process takes to trace and to compile a step, whose arrays are not made."""
    mesh = sharding.create_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    compiler_options()  # Tries them out: JAX and XLA are awake by now.
    program = case.program()
    state, batch = case.shapes(program, mesh)
    step = jitted_on(mesh, program, state)
    start = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace": traced - start, "compile": time.perf_counter() - traced}


def measured(names: list[str], turns: int) -> dict[str, Times]:
    """Times of the figures, by the name of the step."""
    found: dict[str, dict[str, list[float]]] = {
        name: {figure: [] for figure in FIGURES} for name in names
    }
    for turn in range(turns):
        for name in names:
            with tempfile.TemporaryDirectory() as cache:
                first, again = (_in_a_process(name, cache) for _ in range(2))
            for figure, value in (*first.items(), ("compile_kept", again["compile"])):
                found[name][figure].append(value)
            print(
                f"turn {turn + 1} of {turns}  {name}: trace {first['trace']:.1f} s, compile "
                f"{first['compile']:.1f} s, then {again['compile']:.1f} s",
                flush=True,
            )
    return {
        name: Times({figure: np.asarray(values) for figure, values in figures.items()})
        for name, figures in found.items()
    }


def _in_a_process(name: str, cache: str) -> dict[str, float]:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",  # As `uniq_jax.main` sets it.
    }
    command = [sys.executable, __file__, f"--step={name}"]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout)


def main() -> None:
    """Measures the steps that the arguments name, or in a process of its own one of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--turns", type=int, default=5, help="of all steps")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a JSON file")
    parser.add_argument("--step", choices=CASES, help="only this one, once, printed as JSON")
    arguments = parser.parse_args()
    if arguments.step is not None:
        print(json.dumps(seconds(CASES[arguments.step])))
        return
    unknown = set(arguments.names) - set(CASES)
    if unknown:
        parser.error(f"NAME (={', '.join(sorted(unknown))}) must be of {', '.join(CASES)}")
    for name, times in measured(arguments.names or list(CASES), arguments.turns).items():
        keep(
            [
                Result(
                    f"{figure}_{name}",
                    times.median(figure),
                    "s",
                    spread=times.quartiles(figure),
                    detail=f"{CASES[name]}: {what}",
                )
                for figure, what in FIGURES.items()
            ],
            arguments.results,
        )


if __name__ == "__main__":
    main()
