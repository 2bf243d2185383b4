"""What a GPU and TPUs would read and write in quantizers and steps, from compiled programs.

python benchmarks/accelerators/compare.py [NAME …]   # of the figures; all without one
make accelerators   # the same, in an environment with the compilers

Compiled for one H100, and for four TPU v5e over which a batch is spread; nothing runs, and no
device is needed. Counted are the bytes of the arrays that each operation of one device's program
reads and writes, before what tiles and caches make of them. Quantizers are measured in arrays of
their input: value and gradients can be had for two read and two written. A step is the one that
`uniq_jax.main` jits, with SGD and momentum, and is compared with that of the same network in float:
ResNet-18 at 224 pixels, or the pre-activation ResNet-32 at 32, a batch of 128 on each device.
"""

import argparse
import functools
import importlib.metadata
import math
import os
import pathlib
import sys
from typing import Any

# Arrays of the host's are made on it, whatever else is installed.
os.environ["JAX_PLATFORMS"] = "cpu"

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import Result, keep
from programs import TARGETS, Compiled, Target, compiled, compiled_for
from quantizers import QUANTIZERS, both
from steps import NETWORKS, Case, jitted_on

from uniq_jax import calibrate, dequantize, freeze

RESULTS = pathlib.Path(__file__).parent / "results.json"
SIZE = (64, 56, 56, 64)
BATCH = 128

CASES = [
    Case("resnet18", "uniq", 2),
    Case("n2uq_resnet18", "n2uq", 2),
    Case("preact_resnet32", "uniq", 2),
    Case("preact_resnet32", "n2uq", 2),
    Case("preact_resnet32", "n2uq", 4),
]


def quantizer(target: Target, name: str) -> tuple[float, str]:
    """Arrays that value and gradients of a quantizer move, and beside them JAX's own gradients."""
    ours, plain, learned = QUANTIZERS[name]
    array = jax.ShapeDtypeStruct(SIZE, jnp.float32)
    learned = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in learned]
    programs = [
        compiled_for(target, both(function), array, array, *learned) for function in (ours, plain)
    ]
    moved = [program.moved / (4 * math.prod(SIZE)) for program in programs]
    kernels = " / ".join(str(len(program.operations)) for program in programs)
    return moved[0], f"arrays moved; by JAX's own gradients {moved[1]:.1f}; {kernels} operations"


@functools.cache
def step(target: Target, case: Case) -> Compiled:
    """The program of a training step."""
    mesh = target.mesh()
    program = case.program()
    state, batch = case.shapes(program, mesh)
    traced = jitted_on(mesh, program, state, tuned=False).trace(state, batch)
    return compiled(traced.lower(lowering_platforms=(target.platform,)))


def overhead(target: Target, case: Case) -> tuple[float, str]:
    """Bytes that a quantized step moves over those of the float step."""
    batch = BATCH * target.mesh().size
    quantized, floats = (
        step(target, Case(case.network, *form, batch=batch))
        for form in ((case.method, case.bits), ())
    )
    gigabytes = " / ".join(f"{program.moved / 1e9:.2f}" for program in (quantized, floats))
    mebibytes = " / ".join(f"{program.temporaries / 2**20:.0f}" for program in (quantized, floats))
    kernels = " / ".join(str(len(program.operations)) for program in (quantized, floats))
    return quantized.moved / floats.moved, (
        f"{case}: {gigabytes} GB; {kernels} operations; temporaries {mebibytes} MiB"
    )


def frozen(target: Target, case: Case) -> tuple[float, str]:
    """Bytes that an integer network moves over those of the float network, in evaluation."""
    _, size, _, _ = NETWORKS[case.network]
    model = case.create()
    images = np.random.default_rng(0).normal(size=(16, size, size, 3)).astype(np.float32)
    calibrate(model, [images])
    model.eval()
    floats = dequantize(nnx.clone(model))
    floats.eval()
    graphdef, state = nnx.split(floats)
    batch = jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.float32)
    integer, plain = (
        compiled_for(target, function, batch)
        for function in (freeze(model, (size, size, 3)), lambda x: nnx.merge(graphdef, state)(x))
    )
    megabytes = " / ".join(f"{program.moved / 1e6:.1f}" for program in (integer, plain))
    kernels = " / ".join(str(len(program.operations)) for program in (integer, plain))
    return integer.moved / plain.moved, (
        f"{case}, frozen: {megabytes} MB for {BATCH} images; {kernels} operations"
    )


def figures() -> dict[str, tuple[Target, Any]]:
    """What there is to measure, by name."""
    found: dict[str, tuple[Target, Any]] = {}
    for key, target in TARGETS.items():
        for name in QUANTIZERS:
            found[f"{key}_{name}_arrays"] = target, functools.partial(quantizer, target, name)
        for case in CASES:
            name = f"{key}_step_{case.method}{case.bits}_over_float_{case.network}"
            found[name] = target, functools.partial(overhead, target, case)
        name = f"{key}_frozen_uniq2_over_float_preact_resnet32"
        found[name] = target, functools.partial(frozen, target, Case("preact_resnet32", "uniq", 2))
    return found


def main() -> None:
    """Measures what the arguments name, as far as its compiler is installed."""
    known = figures()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"NAME (={min(unknown)!r}) must be one of: {', '.join(known)}")
    for name in arguments.names or known:
        target, measure = known[name]
        versions = [version(package) for package in target.packages]
        if None in versions:
            print(f"{name}: not measured without {' and '.join(target.packages)}", flush=True)
            continue
        value, detail = measure()
        packages = ", ".join(map(" ".join, zip(target.packages, versions)))
        unit = "arrays" if name.endswith("_arrays") else "ratio"
        about = f"{detail}; {target.title}, {packages}"
        keep([Result(name, value, unit, detail=about)], arguments.results)


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
