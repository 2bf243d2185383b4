"""What training takes here and with other libraries: one layer, and one network.

python benchmarks/peers/compare.py [NAME …]   # of the comparisons; all without one
make peers                                    # the same, in an environment that has the others

Brevitas (PyTorch) has learned scales of weights and activations, as UniQ has steps; qwix has scales
that follow the data. Each quantized form is compared with the same thing here, and with the float
layer or network of its own library. A layer is a 3x3 convolution of 64 channels at 56x56 pixels,
batch 16, forward and backward, with the gradients of its input and all that it learns. A network is
the pre-activation ResNet-32 at 32x32 pixels, batch 128, with 8-bit ends: one step of SGD with
momentum. JAX compiles what it runs, PyTorch runs operation by operation, as most users have it;
both have all cores of the process.
"""

import os

# PyTorch's threads would wait for their next work on the cores that the other side runs on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import functools
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from measure import Result, Times, alternately, keep

from uniq_jax import calibrate
from uniq_jax.nn import QuantConv, UniqActivation, UniqWeight
from uniq_jax.train.compilation import compiler_options

RESULTS = pathlib.Path(__file__).parent / "results.json"


def our_layer(shape: tuple[int, ...], bits: int | None) -> Callable[[], Any]:
    """A convolution with UniQ's quantizers, or a float one."""
    x, cotangent = _arrays(shape)
    channels = shape[-1]
    options: dict[str, Any] = {"use_bias": False, "rngs": nnx.Rngs(0)}
    if bits is not None:
        options |= {"weight": UniqWeight(bits), "activation": UniqActivation(bits)}
    layer = (nnx.Conv if bits is None else QuantConv)(channels, channels, (3, 3), **options)
    if bits is not None:
        calibrate(layer, [x])
        layer.train()
    graphdef, state = nnx.split(layer)
    return _with_gradients(lambda state, x: nnx.merge(graphdef, state)(x), state, x, cotangent)


def qwix_layer(shape: tuple[int, ...], bits: int) -> Callable[[], Any]:
    """A convolution that qwix quantizes, in training.

    Raises:
      RuntimeError: what XLA says of a width that qwix cannot train at on this platform.
    """
    import qwix

    x, cotangent = _arrays(shape)
    kind = f"int{bits}"
    rule = qwix.QtRule(module_path=".*", weight_qtype=kind, act_qtype=kind)
    layer = linen.Conv(shape[-1], (3, 3), use_bias=False)
    model = qwix.quantize_model(layer, qwix.QtProvider([rule]))
    variables = model.init(jax.random.key(0), x)
    return _with_gradients(model.apply, variables, x, cotangent)


def _with_gradients(
    function: Callable[..., jax.Array], learned: Any, x: jax.Array, cotangent: jax.Array
) -> Callable[[], Any]:
    def run(learned: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        value, pull = jax.vjp(function, learned, x)
        return value, pull(cotangent)

    compiled = jax.jit(run, compiler_options=compiler_options())
    return lambda: jax.block_until_ready(compiled(learned, x, cotangent))


def our_network(batch: int, bits: int | None) -> Callable[[], Any]:
    """The training step that `uniq_jax.main` jits."""
    import steps
    import train_step

    method = {} if bits is None else {"method": "uniq", "bits": bits}
    return train_step.Step(steps.Case("preact_resnet32", batch=batch, **method))


def _arrays(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    return jnp.abs(x), jnp.asarray(cotangent)


def brevitas_layer(turns: int, shape: tuple[int, ...]) -> list[Result]:
    """W4A4 in Brevitas and here."""
    import brevitas_forms

    x, cotangent = _arrays(shape)
    times = alternately(
        {
            "ours": our_layer(shape, 4),
            "our float": our_layer(shape, None),
            "theirs": brevitas_forms.layer(np.asarray(x), np.asarray(cotangent), 4),
            "their float": brevitas_forms.layer(np.asarray(x), np.asarray(cotangent), None),
        },
        turns=turns,
    )
    return _results("brevitas_layer_w4a4", times, "brevitas", "torch")


def brevitas_network(turns: int, batch: int) -> list[Result]:
    """W4A4 in Brevitas and here."""
    import brevitas_forms

    times = alternately(
        {
            "ours": our_network(batch, 4),
            "our float": our_network(batch, None),
            "theirs": brevitas_forms.network(batch, 4),
            "their float": brevitas_forms.network(batch, None),
        },
        turns=turns,
    )
    return _results("brevitas_network_w4a4", times, "brevitas", "torch")


def qwix_comparison(turns: int, shape: tuple[int, ...], bits: int) -> list[Result]:
    """One width in qwix and here; nothing where qwix has no program for it."""
    try:
        theirs = qwix_layer(shape, bits)
        theirs()
    except RuntimeError as error:  # XLA's errors are.
        print(f"qwix_layer_w{bits}a{bits}: qwix does not run: {str(error).splitlines()[0][:200]}")
        return []
    unquantized = our_layer(shape, None)
    functions = {
        "ours": our_layer(shape, bits),
        "our float": unquantized,
        "theirs": theirs,
        "their float": unquantized,
    }
    return _results(f"qwix_layer_w{bits}a{bits}", alternately(functions, turns=turns), "qwix")


def _results(name: str, times: Times, *libraries: str) -> list[Result]:
    """Theirs over ours, and each over the float form of its library."""
    versions = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in libraries)
    pairs = {
        f"{name}_over_ours": ("theirs", "ours"),
        f"{name}_over_float": ("theirs", "their float"),
        f"{name}_ours_over_float": ("ours", "our float"),
    }
    results = []
    for figure, (slow, fast) in pairs.items():
        value, spread = times.ratio(slow, fast)
        ms = " / ".join(f"{times.median(side) * 1e3:.0f}" for side in (slow, fast))
        detail = f"{slow} / {fast}: {ms} ms; {versions}"
        results.append(Result(figure, value, "ratio", spread=spread, detail=detail))
    return results


def main() -> None:
    """Makes the comparisons that the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("brevitas_layer", "brevitas_network", "qwix_layer")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--turns", type=int, default=9, help="of all forms")
    parser.add_argument("--pixels", type=int, default=56, help="of the layer, either way")
    parser.add_argument("--layer_batch", type=int, default=16, help="images of the layer")
    parser.add_argument("--batch", type=int, default=128, help="images of the network")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names)
    if unknown:
        parser.error(f"NAME (={', '.join(sorted(unknown))}) must be of {', '.join(names)}")
    shape = (arguments.layer_batch, arguments.pixels, arguments.pixels, 64)
    comparisons: dict[str, list[Callable[[], list[Result]]]] = {
        "brevitas_layer": [functools.partial(brevitas_layer, arguments.turns, shape)],
        "brevitas_network": [functools.partial(brevitas_network, arguments.turns, arguments.batch)],
        "qwix_layer": [
            functools.partial(qwix_comparison, arguments.turns, shape, bits) for bits in (4, 8)
        ],
    }
    for name in arguments.names or names:
        for comparison in comparisons[name]:
            keep(comparison(), arguments.results)


if __name__ == "__main__":
    main()
