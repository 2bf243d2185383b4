"""What quantizers cost: against the copy of an array, and against automatic differentiation.

python benchmarks/quantizers.py [NAME …]   # of the quantizers; all without one

Forward, and forward and backward together, of an array of 3.2 million float32 numbers. The plain
form is written with `jax.lax.stop_gradient`, as most programs have it; JAX derives its gradients.
A negation of the array is the least that an operation on all of it can cost.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from measure import RESULTS, Result, alternately, keep

from uniq_jax import quantizers
from uniq_jax.train.compilation import compiler_options

SIZE = (16, 56, 56, 64)


def _rounded(x: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def uniform(x: jax.Array, step: jax.Array, *, bits: int, signed: bool) -> jax.Array:
    """UniQ's forward with a straight-through gradient, without the gradient scale of its step."""
    n = 2**bits - 1
    offset = n / 2 if signed else 0.0
    code = _rounded(jnp.clip(x / step + offset, 0, n))
    return step * (code - offset)


def thresholds(
    x: jax.Array,
    start: jax.Array,
    intervals: jax.Array,
    input_scale: jax.Array,
    output_scale: jax.Array,
) -> jax.Array:
    """N2UQ's forward with the gradient of a piecewise linear function."""
    intervals = jnp.maximum(intervals, 1e-3)
    ends = start + jnp.cumsum(intervals)
    u = input_scale * x
    line = jnp.zeros_like(u)
    code = jnp.zeros_like(u)
    for end, width in zip(ends, intervals):
        line = line + jnp.clip((u - end + width) / width, 0, 1)
        code = code + (u > end - width / 2)
    return output_scale * (2 / intervals.size) * (line + jax.lax.stop_gradient(code - line))


def _n2uq(bits: int) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array], tuple[Any, ...]]:
    n = 2**bits - 1
    learned = jnp.zeros(()), jnp.full(n, 2 / n), jnp.ones(()), jnp.ones(())
    return lambda x, *p: quantizers.n2uq_activation(x, *p), thresholds, learned


def _uniq(bits: int, *, signed: bool) -> tuple[Any, Any, tuple[Any, ...]]:
    quantize = quantizers.uniq_weight if signed else quantizers.uniq_activation
    plain = functools.partial(uniform, bits=bits, signed=signed)
    return functools.partial(quantize, bits=bits), plain, (jnp.asarray(0.4),)


QUANTIZERS: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "uniq_weight2": _uniq(2, signed=True),
    "uniq_activation2": _uniq(2, signed=False),
    "n2uq_activation2": _n2uq(2),
    "n2uq_activation3": _n2uq(3),
    "n2uq_activation4": _n2uq(4),
}


def both(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The value, and the gradients of all arguments."""

    def run(cotangent: jax.Array, *arguments: jax.Array) -> Any:
        value, pull = jax.vjp(function, *arguments)
        return value, pull(cotangent)

    return run


def measured(name: str, turns: int) -> list[Result]:
    """Four figures of one quantizer."""
    ours, plain, learned = QUANTIZERS[name]
    keys = jax.random.split(jax.random.key(0))
    x, cotangent = (jax.random.normal(key, SIZE) for key in keys)
    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    forward = {"ours": jit(ours), "plain": jit(plain)}
    pairs = {name: jit(both(function)) for name, function in (("ours", ours), ("plain", plain))}
    negation = jit(lambda x: -x)
    functions = {"negation": lambda: jax.block_until_ready(negation(x))}
    for side in ("ours", "plain"):
        functions[f"forward_{side}"] = functools.partial(_call, forward[side], x, *learned)
        functions[f"both_{side}"] = functools.partial(_call, pairs[side], cotangent, x, *learned)
    times = alternately(functions, turns=turns)
    results = []
    for what in ("forward", "both"):
        for other in ("plain", "negation"):
            slow, fast = f"{what}_ours", f"{what}_plain" if other == "plain" else other
            value, spread = times.ratio(slow, fast)
            ms = f"{times.median(slow) * 1e3:.2f} / {times.median(fast) * 1e3:.2f} ms"
            figure = f"{name}_{what}_over_{other}"
            results.append(Result(figure, value, "ratio", spread=spread, detail=ms))
    return results


def _call(function: Callable[..., Any], *arguments: jax.Array) -> None:
    jax.block_until_ready(function(*arguments))


def main() -> None:
    """Measures the quantizers that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(QUANTIZERS))
    parser.add_argument("--turns", type=int, default=11, help="of all forms")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(QUANTIZERS)
    if unknown:
        parser.error(f"NAME (={', '.join(sorted(unknown))}) must be of {', '.join(QUANTIZERS)}")
    for name in arguments.names or QUANTIZERS:
        keep(measured(name, arguments.turns), arguments.results)


if __name__ == "__main__":
    main()
