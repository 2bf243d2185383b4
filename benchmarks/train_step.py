"""What quantizers add to a training step, and what the float step gains over JAX's own defaults.

python benchmarks/train_step.py [NAME …]   # of the figures; all without one

The step is the one that `uniq_jax.main` jits: forward, backward, batch norm, SGD with momentum. A
quantized step and the float step of the same network run in turns. ResNet-18 at 224 pixels has a
batch of 16, the pre-activation ResNet-32 at 32 pixels one of 128. Data are random.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from measure import RESULTS, Result, alternately, keep
from steps import Case, jitted

from uniq_jax.nn import N2uqActivation, N2uqWeight, QuantConv, UniqActivation, UniqWeight
from uniq_jax.train.compilation import compiler_options
from uniq_jax.train.memory import StepMemory

# Figure: goal, and the quantized step.
OVERHEADS: dict[str, tuple[float, Case]] = {
    "step_uniq2_over_float_r18": (1.10, Case("resnet18", "uniq", 2)),
    "step_uniq2_over_float_r32": (1.10, Case("preact_resnet32", "uniq", 2)),
    "step_n2uq2_over_float_r18": (1.10, Case("n2uq_resnet18", "n2uq", 2)),
    "step_n2uq2_over_float_r32": (1.10, Case("preact_resnet32", "n2uq", 2)),
    "step_n2uq4_over_float_r18": (1.25, Case("n2uq_resnet18", "n2uq", 4)),
    "step_n2uq4_over_float_r32": (1.25, Case("preact_resnet32", "n2uq", 4)),
}
STOCK = {
    "float_step_over_stock_r18": Case("resnet18"),
    "float_step_over_stock_r32": Case("preact_resnet32"),
}


class Step:
    """A compiled step with the state that it advances; calling it takes one step."""

    def __init__(self, case: Case, *, tuned: bool = True):
        program = case.program()
        self.state, self.batch = case.state(program), case.examples()
        self._compiled = jitted(program, tuned=tuned).lower(self.state, self.batch).compile()
        memory = StepMemory.of(self._compiled)
        self.temporaries = 0 if memory is None else memory.temporaries
        self.operations = self._compiled.cost_analysis()["flops"]

    def __call__(self) -> None:
        self.state, metrics = self._compiled(self.state, self.batch)
        jax.block_until_ready(metrics["loss"])


def overhead(name: str, turns: int) -> Result:
    """A quantized step over the float step of the same network."""
    goal, case = OVERHEADS[name]
    steps = {"quantized": Step(case), "float": Step(Case(case.network))}
    times = alternately(steps, turns=turns, least_seconds=0)
    value, spread = times.ratio("quantized", "float")
    both = ("quantized", "float")
    ms = " / ".join(f"{times.median(side) * 1e3:.0f}" for side in both)
    mib = " / ".join(f"{steps[side].temporaries / 2**20:.0f}" for side in both)
    detail = f"{case}: {ms} ms; temporaries {mib} MiB"
    return Result(name, value, "ratio", goal, least=False, spread=spread, detail=detail)


def over_stock(name: str, turns: int) -> Result:
    """The float step over the same one without this package's compiler options."""
    case = STOCK[name]
    ours, stock = Step(case), Step(case, tuned=False)
    size = 2048
    square = jnp.ones((size, size))
    matmul = jax.jit(jnp.matmul, compiler_options=compiler_options())
    functions: dict[str, Callable[[], object]] = {
        "ours": ours,
        "stock": stock,
        "product": lambda: jax.block_until_ready(matmul(square, square)),
    }
    times = alternately(functions, turns=turns, least_seconds=0)
    value, spread = times.ratio("ours", "stock")
    # No form of the step takes less than its multiplications.
    bound = ours.operations / (2 * size**3) * times.median("product")
    detail = (
        f"{case}: {times.median('ours') * 1e3:.0f} / "
        f"{times.median('stock') * 1e3:.0f} ms with XLA's defaults; as many operations in a large "
        f"matrix product: {bound * 1e3:.0f} ms"
    )
    return Result(name, value, "ratio", 0.60, least=False, spread=spread, detail=detail)


def residual_bytes() -> Result:
    """Bytes that a quantized convolution keeps for its gradients beyond a float one's."""
    pairs = {
        "uniq": (UniqWeight(2), UniqActivation(2)),
        "n2uq": (N2uqWeight(4), N2uqActivation(4)),
    }
    x = jax.ShapeDtypeStruct((8, 32, 32, 16), jnp.float32)

    def kept(weight: Any, activation: Any) -> int:
        layer = QuantConv(16, 16, (3, 3), weight=weight, activation=activation, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(layer)

        def residuals(state: Any, x: Any) -> Any:
            # Of a product with something, as in a network: its input is kept for the factor.
            return jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x), state, x)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, state, x))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.size >= x.size)

    base = kept(None, None)
    extra = {name: (kept(*methods) - base) / x.size for name, methods in pairs.items()}
    detail = ", ".join(f"{name} {value:.2g}" for name, value in extra.items())
    return Result(
        "residual_bytes",
        max(extra.values()),
        "bytes",
        4.0,
        least=False,
        detail=f"worst of {detail}",
    )


def main() -> None:
    """Measures the figures that the arguments name."""
    figures: dict[str, Callable[[int], Result]] = {
        **{name: functools.partial(overhead, name) for name in OVERHEADS},
        **{name: functools.partial(over_stock, name) for name in STOCK},
        "residual_bytes": lambda turns: residual_bytes(),
    }
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(figures))
    parser.add_argument("--turns", type=int, default=9, help="of both sides of a figure")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(figures)
    if unknown:
        parser.error(f"NAME (={', '.join(sorted(unknown))}) must be of {', '.join(figures)}")
    for name in arguments.names or figures:
        keep([figures[name](arguments.turns)], arguments.results)


if __name__ == "__main__":
    main()
