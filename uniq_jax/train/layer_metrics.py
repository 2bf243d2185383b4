"""What each quantized layer does on one training batch, counted where the batch lies.

`measure` is one program of its own, apart from the training step: what a run measures does not
change what it learns. Everything counted is of the global batch; entropies and shares follow from
the counts on the host (`uniq_jax.train.layer_summary`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from uniq_jax.nn import ActivationMethod, QuantLayer
from uniq_jax.train.network import Arrays, Network, Teacher, join, split
from uniq_jax.train.state import Program, TrainState
from uniq_jax.train.step import train_step

HISTOGRAM_BINS = 192

# At most so many inputs of a layer are counted: shares are then known to a tenth of a percent.
_MOST_INPUTS = 2**20


def quantized_layers(model: nnx.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a model, by path ("layer1/0/conv1"), in the order of their paths."""
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(model))
    layers = [(path, module) for path, module in modules if isinstance(module, QuantLayer)]
    # Numbers as numbers: layer1/2 comes before layer1/10.
    layers.sort(key=lambda item: [(isinstance(p, str), p) for p in item[0]])
    return {join(path): module for path, module in layers}


def measure(
    program: Program,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    teacher: Teacher | None = None,
) -> dict[str, dict[str, Any]]:
    """Counts what the quantized layers do in the training step that takes this state and batch.

    Args:
      program: as `train_step` takes it.
      state: likewise, but kept.
      batch: likewise.
      teacher: likewise.

    Returns:
      For each quantized layer, by path, with n = 2**bits − 1:

      - "weight_codes", int32 (n + 1,): how many weights have each code.
      - "weight_clipped", int32 (2,): weights below the lowest level, and above the highest.
      - "weight_flipped", int32 (): weights whose code this very step changes.
      - "weight_histogram", int32 (HISTOGRAM_BINS,): of the weights divided by their step; its range
        is `histogram_range(-offset, n - offset, bits)`.
      - "weight_step", (channels,) or (1,): the distance of two levels.
      - "input_codes", "input_clipped", "input_histogram": the same of what the layer gets, of at
        most 2**20 activations spread evenly over the batch; the range is that of "input_edges".
      - "input_edges", (n + 1,): as `ActivationMethod.edges` has them.
      - "parameters" and "gradients": by name ("weight_step", "input_intervals"), what a quantizer
        learns, and the norms, (), of the loss's gradients for it.
    """
    model = program.build(state.params, state.statistics)
    layers = quantized_layers(model)
    for layer in layers.values():
        if layer.activation_quantizer is not None:
            size = 2**layer.activation_quantizer.method.bits + 2 + HISTOGRAM_BINS
            layer.activation_quantizer.start_observing(_observe, jnp.zeros(size, jnp.int32))
    # The step itself, of a network that also counts its inputs. The counts come out among the
    # statistics, the gradients in place of the optimizer's state.
    observing = dataclasses.replace(
        program, network=Network.of(model), optimizer=_keeping_gradients(program.optimizer)
    )
    _, statistics = split(model)
    after, _ = train_step(
        observing,
        dataclasses.replace(state, statistics=statistics, averages=None),
        batch,
        teacher,
    )
    observed = quantized_layers(observing.build(after.params, after.statistics))
    return {
        path: {
            **_of_weights(layer, observed[path]),
            **_of_inputs(layer, observed[path]),
            **_of_parameters(path, layer, after.opt_state),
        }
        for path, layer in layers.items()
    }


def histogram_range(low: Any, high: Any, bits: int) -> tuple[Any, Any]:
    """The range of a histogram of what is quantized: that of the levels, and as much on each side.

    Values beyond it are counted in the outermost bins. It hangs on the quantizer alone, so that
    parts of a batch can be counted apart.

    Args:
      low: below it values are clipped.
      high: above it values are clipped.
      bits: of the quantizer. One bit gets more room: its levels lie within the bulk of the values.
    """
    margin = (high - low) * (1 + 1 / (2**bits - 1))
    return low - margin, high + margin


def _keeping_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, but for its next state, in whose place it gives the gradients."""

    def update(updates, state, params=None):
        changes, _ = optimizer.update(updates, state, params)
        return changes, updates

    return optax.GradientTransformation(optimizer.init, update)


def _observe(method: ActivationMethod, parameters: Arrays, x: jax.Array) -> jax.Array:
    """Counts codes, then clipped inputs, then the histogram, in one vector."""
    x = jax.lax.stop_gradient(_spread_out(x))
    parameters = jax.lax.stop_gradient(parameters)
    encoded = method.encode(x, parameters, jnp.uint8)
    edges = method.edges(parameters, encoded.scale)
    return jnp.concatenate(_counts(x, encoded.codes, edges.min(), edges.max(), method.bits))


def _spread_out(x: jax.Array) -> jax.Array:
    """At most `_MOST_INPUTS` of `x`, (examples, features), and as many of every example.

    Each device takes some of its own.
    """
    features = x.reshape(x.shape[0], -1)
    every = math.ceil(x.size / _MOST_INPUTS)
    # Not always the same channels.
    while math.gcd(every, x.shape[-1]) > 1:
        every += 1
    return features[:, ::every]


def _counts(
    x: jax.Array, codes: jax.Array, low: Any, high: Any, bits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of codes, of what lies below low and above high, and of the bins of the histogram."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    start, end = histogram_range(low, high, bits)
    place = (wide - start) * (HISTOGRAM_BINS / (end - start))
    bins = jnp.clip(jnp.nan_to_num(place), 0, HISTOGRAM_BINS - 1).astype(jnp.int32)
    clipped = [jnp.sum(outside, dtype=jnp.int32) for outside in (wide < low, wide > high)]
    return (
        _tally(codes.astype(jnp.int32), 2**bits),
        jnp.stack(clipped),
        _tally(bins, HISTOGRAM_BINS),
    )


def _tally(indices: jax.Array, length: int) -> jax.Array:
    return jnp.zeros(length, jnp.int32).at[indices.reshape(-1)].add(1)


def _of_weights(layer: QuantLayer, after: QuantLayer) -> dict[str, jax.Array]:
    quantizer = layer.weight_quantizer
    if quantizer is None or after.weight_quantizer is None:
        return {}
    kernel, grid = layer.kernel[...], quantizer.method.grid
    codes, scale, offset = quantizer.encode(kernel)
    later = after.weight_quantizer.encode(after.kernel[...]).codes
    # A channel of zeros may have the step 0.
    in_steps = kernel / jnp.where(scale == 0, 1, scale)
    tally, clipped, histogram = _counts(in_steps, codes, -offset, grid.max_code - offset, grid.bits)
    return {
        "weight_codes": tally,
        "weight_clipped": clipped,
        "weight_flipped": jnp.sum(codes != later, dtype=jnp.int32),
        "weight_histogram": histogram,
        "weight_step": scale.reshape(-1),
    }


def _of_inputs(layer: QuantLayer, observed: QuantLayer) -> dict[str, jax.Array]:
    quantizer, counted = layer.activation_quantizer, observed.activation_quantizer
    if quantizer is None or counted is None or counted.observation is None:
        return {}
    parameters = quantizer.parameters
    codes = 2**quantizer.method.bits
    tally, clipped, histogram = jnp.split(counted.observation[...], [codes, codes + 2])
    scale = quantizer.encode(jnp.zeros((), jnp.float32)).scale
    return {
        "input_codes": tally,
        "input_clipped": clipped,
        "input_histogram": histogram,
        "input_edges": quantizer.method.edges(parameters, scale),
    }


def _of_parameters(path: str, layer: QuantLayer, gradients: Arrays) -> dict[str, Arrays]:
    values: Arrays = {}
    norms: Arrays = {}
    for kind in ("weight", "activation"):
        quantizer = getattr(layer, f"{kind}_quantizer")
        if quantizer is None:
            continue
        prefix = "input" if kind == "activation" else kind
        for name, value in quantizer.parameters.items():
            values[f"{prefix}_{name}"] = value
            gradient = gradients[f"{path}/{kind}_quantizer/{name}"]
            norms[f"{prefix}_{name}"] = jnp.sqrt(jnp.sum(jnp.square(gradient)))
    return {"parameters": values, "gradients": norms}
