"""What the devices of a mesh send each other in a training step, by what it is; nothing is timed.

python benchmarks/scaling.py   # runs/bench/scaling.json and scaling.md

The step is laid out and compiled as `uniq_jax.main` does it, for CPU devices that share this
machine, in a process for each case; it does not run. The compiled program tells which arrays are
summed or gathered among which devices. Other platforms join them into other numbers of messages.

A case that is done is not done again, unless the output is removed.
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from collectives import KINDS, Collective, Part, collectives
from steps import Case, jitted_on

from uniq_jax.train import sharding
from uniq_jax.train.network import quantizer_state

GROUPS = {
    "gradients": "sums of the gradients of kernels and biases",
    "batch norm": "sums of the batch, those of their gradients, and the gradients of batch norms",
    "quantizers": "gradients of learned steps, thresholds and scales; sums over weights",
    "metrics": "loss, accuracy, gradient norm",
    "parameters": "parts of kernels and biases, or of their updates",
    "activations": "layers' inputs and outputs, and their gradients",
}
"""What is sent; the last two only where a mesh has an axis "model"."""

# Of this batch, no device's part has as many examples as a layer has features.
_BATCH = 120
_R32 = "preact_resnet32"
_SMALL = [Case(_R32, batch=_BATCH), *(Case(_R32, m, 2, _BATCH) for m in ("uniq", "n2uq"))]
_LARGE = [Case(_R32, "uniq", 2, 2 * _BATCH), Case("resnet18", "uniq", 2, 40)]
CASES: list[tuple[Case, tuple[int, int]]] = [
    *((case, mesh) for case in _SMALL for mesh in ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2))),
    *((_LARGE[0], mesh) for mesh in ((4, 1), (4, 2))),
    (_LARGE[1], (8, 1)),
]
"""What is compiled, and for how many devices along "data" and "model"."""


def carried(part: Part, axis: str, local_batch: int) -> str:
    """What an array of a collective is: a key of `GROUPS`.

    Args:
      part: of the collective.
      axis: of the mesh, along which its devices lie.
      local_batch: examples on one device; nothing else has an axis of this size.
    """
    if local_batch in part.shape:
        return "activations"
    names = [pathlib.PurePath(source).name for source in part.sources]
    if "batch_norm.py" in names or "normalization.py" in names:
        return "batch norm"
    is_quantizers = "quantizers" in pathlib.PurePath(*part.sources[:1]).parts
    if is_quantizers and len(part.shape) < 2:
        return "quantizers"
    if not part.shape:
        return "metrics"
    return "gradients" if axis == "data" else "parameters"


def axis_of(collective: Collective, mesh: tuple[int, int]) -> str:
    """Along which axis of a mesh the devices of a collective lie."""
    rows = {divmod(device, mesh[1]) for device in collective.groups[0]}
    axes = [
        name for i, name in enumerate(("data", "model")) if len({place[i] for place in rows}) > 1
    ]
    return " and ".join(axes)


def measure(case: Case, mesh: tuple[int, int]) -> dict[str, Any]:
    """Compiles a case for the devices that there are, and reads what they send."""
    devices = sharding.create_mesh({"data": mesh[0], "model": mesh[1]})
    program = case.program()
    state, batch = case.shapes(program, devices)
    local_batch = case.batch_size // mesh[0]
    sizes = {n for array in jax.tree.leaves(state) for n in array.shape}
    # Of a batch norm two sums, or three, come from each device.
    if mesh != (1, 1) and local_batch in {*sizes, 2, 3, mesh[0]}:
        raise ValueError(
            f"case (={case} on {mesh[0]} devices) must have another batch: that of a device, "
            f"{local_batch}, is the size of something else too"
        )
    compiled = jitted_on(devices, program, state).lower(state, batch).compile()
    found = collectives(compiled.as_text(), devices.size)
    learned = quantizer_state(program.network.variables)
    return {
        "case": str(case),
        "batch": case.batch_size,
        "data": mesh[0],
        "model": mesh[1],
        "parameters": sum(a.size for p, a in state.params.items() if not learned[p]),
        "learned by quantizers": sum(a.size for p, a in state.params.items() if learned[p]),
        "batch-norm features": sum(a.size for p, a in state.statistics.items() if p[-4:] == "mean"),
        **totals(found, mesh, local_batch),
    }


def totals(found: Iterable[Collective], mesh: tuple[int, int], local_batch: int) -> dict[str, Any]:
    """Numbers of instructions by kind; and of arrays and bytes, by what they are and by axis."""
    instructions = collections.Counter(collective.kind for collective in found)
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for collective in found:
        axis = axis_of(collective, mesh)
        for part in collective.parts:
            key = (carried(part, axis, local_batch), collective.kind, axis)
            row = rows.setdefault(key, {"arrays": 0, "bytes": 0, "sent": 0.0})
            row["arrays"] += 1
            row["bytes"] += collective.payload(part)
            row["sent"] += collective.sent(part)
    named = [{"group": g, "kind": k, "axis": a, **row} for (g, k, a), row in rows.items()]
    return {"instructions": dict(instructions), "carried": named}


def markdown(results: Iterable[Mapping[str, Any]]) -> str:
    """The table."""
    head = ["step", "batch", "data x model", *KINDS[:2], *(f"{name}, bytes" for name in GROUPS)]
    head += ["a device sends, bytes"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for result in results:
        rows = result["carried"]
        unnamed = set(result["instructions"]) - set(KINDS[:2])
        assert not unnamed, unnamed  # They would need a column.
        sums = [sum(row["bytes"] for row in rows if row["group"] == name) for name in GROUPS]
        lines.append(
            [
                result["case"],
                str(result["batch"]),
                f"{result['data']} x {result['model']}",
                *(str(result["instructions"].get(kind, 0)) for kind in KINDS[:2]),
                *(f"{value:,}" for value in sums),
                f"{sum(row['sent'] for row in rows):,.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _in_a_process(index: int, devices: int) -> dict[str, Any]:
    flags = [
        *os.environ.get("XLA_FLAGS", "").split(),
        f"--xla_force_host_platform_device_count={devices}",
        # Of machine code, which nobody runs; what devices send is decided before.
        "--xla_backend_optimization_level=0",
    ]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, f"--case={index}"]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout)


def main() -> None:
    """Measures all cases, or in a process of its own one of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--case", type=int, help="only this one, printed as JSON")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(*CASES[arguments.case])))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "scaling.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    done = {(r["case"], r["batch"], r["data"], r["model"]): r for r in results}
    keys = [(str(case), case.batch_size, *mesh) for case, mesh in CASES]
    for index, (case, mesh) in enumerate(CASES):
        start = time.perf_counter()
        key = keys[index]
        if key not in done:
            done[key] = _in_a_process(index, mesh[0] * mesh[1])
        results = [done[key] for key in keys if key in done]
        for place, text in (
            (path.with_suffix(".md"), markdown(results)),
            (path, json.dumps(results, indent=1) + "\n"),
        ):
            partial = place.with_name(f"{place.name}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(place)
        seconds = time.perf_counter() - start
        print(
            f"{index + 1:2d}/{len(CASES)}  {case}, batch {case.batch_size}, {mesh[0]} x {mesh[1]} "
            f"devices: {sum(done[key]['instructions'].values())} collectives ({seconds:.0f} s)",
            flush=True,
        )
    print(f"\n{markdown(results)}\nWrote {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
