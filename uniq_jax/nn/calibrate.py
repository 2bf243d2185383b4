"""Initial quantizer parameters from weights and data."""

import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax.nn.layer import QuantLayer
from uniq_jax.nn.quantizer import ActivationQuantizer, Statistic, reached

# What model.eval() sets, and what quantized layers go by here.
_MODES = ("deterministic", "use_running_average", "calibrating")


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    apply: Callable[[nnx.Module, Any], Any] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> int:
    """Sets every quantizer's parameters from the model's weights and from what flows through it.

    Weight quantizers start anew from the present weights (load a float checkpoint first).
    Activation quantizers take, over the batches, the largest statistic of their input (UniQ's
    running maximum), measured in the float network: no quantizer is active meanwhile, so the result
    doesn't depend on the order of layers.

    Layers that `nnx.scan` or `nnx.vmap` has stacked are calibrated one by one. Transforms of JAX
    itself inside the model lose what a quantizer sees within them, which is an error.

    The model runs in evaluation mode, and nothing but quantizer parameters changes: dropout is off,
    and batch-norm statistics, caches and counters stay as they are. It comes back in the mode that
    each of its modules was in. Where an error ends calibration, nothing has changed at all.

    Args:
      model: any NNX module that holds quantized layers; changed in place.
      batches: inputs, taken to the end; all of one shape compile once. A quantizer that none of
        them reaches keeps its parameters.
      apply: how to run the model on a batch, by default `model(batch)`.
      compiler_options: as those of `jax.jit`.

    Returns:
      The number of batches.

    Raises:
      TypeError: if `model` is no NNX module, or `batches` an array and no iterable of them.
      ValueError: if the model has no quantized layer, or `batches` is empty although there are
        activations to quantize, or an activation is nan or infinite, or a transform of JAX around
        a layer keeps what it sees.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model (a {type(model).__name__}) must be an nnx.Module; "
            "for Linen see uniq_jax.linen.calibrate"
        )
    check_batches(batches)
    apply = apply or _call
    if not any(isinstance(m, QuantLayer) for _, m in nnx.iter_modules(model)):
        raise ValueError("model has no quantized layer; call uniq_jax.quantize on it first")
    watchers = {
        path: m for path, m in nnx.iter_modules(model) if isinstance(m, ActivationQuantizer)
    }
    count = _watch(model, batches, apply, watchers, compiler_options) if watchers else 0
    for watcher in watchers.values():
        watcher.finish_calibration()
    calibrate_weights(model)
    return count


def calibrate_weights(model: nnx.Module, paths: Container[str] | None = None) -> None:
    """Starts weight quantizers anew from the present weights.

    Args:
      model: any NNX module; changed in place.
      paths: of the learned parameters to set, "conv1/weight_quantizer/step" for example; None for
        all. Where one of a quantizer's parameters is among them, all of them are set.
    """
    for path, layer in nnx.iter_modules(model):
        if not isinstance(layer, QuantLayer) or layer.weight_quantizer is None:
            continue
        quantizer = layer.weight_quantizer
        names = ("/".join(map(str, (*path, "weight_quantizer", p))) for p in quantizer.parameters)
        if paths is None or any(name in paths for name in names):
            quantizer.calibrate(layer.kernel[...])


def check_batches(batches: Any) -> None:
    """Raises a TypeError if `batches` is one array, which would be taken example by example."""
    if isinstance(batches, jax.Array | np.ndarray):
        raise TypeError(
            f"batches must be an iterable of batches, not one array (of shape {batches.shape}); "
            "write [array]"
        )


def _watch(
    model: nnx.Module,
    batches: Iterable[Any],
    apply: Callable[[nnx.Module, Any], Any],
    watchers: Mapping[tuple[Any, ...], ActivationQuantizer],
    compiler_options: Mapping[str, Any] | None,
) -> int:
    modes = [
        (m, k, getattr(m, k)) for _, m in nnx.iter_modules(model) for k in _MODES if hasattr(m, k)
    ]
    for number, watcher in enumerate(watchers.values()):
        watcher.start_calibration(number)
    numbers = []
    try:
        model.eval()
        model.set_attributes(calibrating=True, raise_if_not_found=False)
        # Nothing else of the model comes back: not what it sows, counts or caches on its way.
        graphdef, statistics, rest = nnx.split(model, Statistic, ...)
        observe = jax.jit(
            functools.partial(_observe, graphdef, apply),
            compiler_options=dict(compiler_options or {}),
        )
        for batch in batches:
            found, statistics = observe(statistics, rest, batch)
            numbers.append(found)
        nnx.update(model, statistics)
        if not numbers:
            raise ValueError("batches is empty, but activations need at least one to calibrate")
        touched = set(np.concatenate(numbers).tolist())
        for path, watcher in watchers.items():
            watcher.check_calibration("/".join(map(str, path)), touched)
    except BaseException:
        for watcher in watchers.values():
            watcher.abandon_calibration()
        raise
    finally:
        for module, name, value in modes:
            setattr(module, name, value)
    return len(numbers)


def _call(model: Any, batch: Any) -> Any:
    return model(batch)


def _observe(
    graphdef: nnx.GraphDef[nnx.Module],
    apply: Callable[[nnx.Module, Any], Any],
    statistics: nnx.State,
    rest: nnx.State,
    batch: Any,
) -> tuple[jax.Array, nnx.State]:
    """Runs the model; returns the numbers of the quantizers that were called, and statistics."""
    model = nnx.merge(graphdef, statistics, rest)
    token = reached.set(found := set())
    try:
        apply(model, batch)
    finally:
        reached.reset(token)
    return jnp.asarray(sorted(found), jnp.int32), nnx.state(model, Statistic)
