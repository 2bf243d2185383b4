"""What the counts of `layer_metrics.measure` say of each layer: numbers for logs, and tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from uniq_jax import deploy
from uniq_jax.nn import QuantLayer
from uniq_jax.nn.size import packed_kernel_bytes
from uniq_jax.train.layer_metrics import HISTOGRAM_BINS, histogram_range, quantized_layers

_FLOAT_BYTES = 4

# Of a number in a log: six digits say all that such a measurement can.
_DIGITS = 6


def entropy_bits(counts: Any) -> float:
    """Shannon's entropy of codes, in bits: at most the width, which all codes alike would have.

    Args:
      counts: how often each code occurs, integers (codes,).

    Example:
      >>> entropy_bits([5, 5, 5, 5])
      2.0
      >>> entropy_bits([7, 0])
      0.0
    """
    shares = np.asarray(counts, np.float64) / max(np.sum(counts), 1)
    used = shares[shares > 0]
    return abs(float(np.sum(used * np.log2(used))))


def layer_numbers(measured: Mapping[str, Any]) -> dict[str, float | int]:
    """What a log keeps of one layer; "weight_…" of its weights, "input_…" of what it gets.

    Args:
      measured: one layer of `measure`, as NumPy arrays.

    Returns:
      By name: "…_entropy" of the codes, in bits; "…_clipped_low" and "…_clipped_high", the shares
      below the lowest level and above the highest; "…_dead_levels", how many levels nothing maps
      to; "weight_flip_rate", the share of weights whose code the step changed; "weight_step";
      "input_threshold_first" and "…_last"; what the quantizers learn, and, as "…_gradient", the
      norm of the loss's gradient for it. Of several numbers there are "…_min", "…_mean" and
      "…_max". Floats have six digits.
    """
    numbers: dict[str, float | int] = {}
    for what in ("weight", "input"):
        counts = measured.get(f"{what}_codes")
        if counts is None:
            continue
        total = max(int(np.sum(counts)), 1)
        numbers[f"{what}_entropy"] = entropy_bits(counts)
        for side, clipped in zip(("low", "high"), measured[f"{what}_clipped"]):
            numbers[f"{what}_clipped_{side}"] = int(clipped) / total
        numbers[f"{what}_dead_levels"] = int(np.sum(np.asarray(counts) == 0))
        if what == "weight":
            numbers["weight_flip_rate"] = int(measured["weight_flipped"]) / total
            numbers.update(_spread("weight_step", measured["weight_step"]))
        else:
            thresholds = _thresholds(measured["input_edges"])
            numbers["input_threshold_first"] = float(thresholds.min())
            numbers["input_threshold_last"] = float(thresholds.max())
    for name, value in measured["parameters"].items():
        if name != "weight_step":
            numbers.update(_spread(name, value))
        numbers[f"{name}_gradient"] = float(measured["gradients"][name])
    return {
        name: float(f"{v:.{_DIGITS}g}") if isinstance(v, float) else v
        for name, v in numbers.items()
    }


def layers_table(model: nnx.Module, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All that a picture or a table of the layers needs, as plain lists and numbers.

    Args:
      model: the network; its arrays may be ShapeDtypeStructs.
      measured: of `measure`, as NumPy arrays.

    Returns:
      "layers", a list of dictionaries with "path", "type", "kernel_shape", "weights" (how many),
      "packed_bytes" and "float_bytes" of the kernel, "numbers" (see `layer_numbers`), and, where
      they are quantized, "weight" and "input": "method", "bits", "codes" (counts), "histogram"
      ("low", "high", "counts" of bins of one width, the outermost with all that lies beyond),
      "thresholds" and "levels". A weight histogram is of weights divided by their step, and so are
      its thresholds and levels. "other_packed_bytes" and "other_float_bytes": of all other arrays.
    """
    layers = quantized_layers(model)
    rows = [_row(path, layer, measured[path]) for path, layer in layers.items()]
    size = deploy.model_size(model)
    return {
        "layers": rows,
        "other_packed_bytes": size.packed_bytes - sum(row["packed_bytes"] for row in rows),
        "other_float_bytes": size.float_bytes - sum(row["float_bytes"] for row in rows),
    }


def _row(path: str, layer: QuantLayer, measured: Mapping[str, Any]) -> dict[str, Any]:
    kernel = layer.kernel.get_value()
    count = int(np.prod(kernel.shape))
    row: dict[str, Any] = {
        "path": path,
        "type": type(layer).__name__,
        "kernel_shape": list(kernel.shape),
        "weights": count,
        "packed_bytes": count * _FLOAT_BYTES,
        "float_bytes": count * _FLOAT_BYTES,
        "numbers": layer_numbers(measured),
    }
    if layer.weight_quantizer is not None:
        grid = layer.weight_quantizer.method.grid
        row["packed_bytes"] = packed_kernel_bytes(layer.weight_quantizer, kernel)
        levels = np.arange(grid.max_code + 1) - grid.offset
        row["weight"] = _quantized("weight", layer.weight_quantizer.method, measured, levels)
    if layer.activation_quantizer is not None:
        edges = measured["input_edges"]
        row["input"] = _quantized("input", layer.activation_quantizer.method, measured, edges)
    return row


def _quantized(what: str, method: Any, measured: Mapping[str, Any], edges: Any) -> dict[str, Any]:
    edges = np.asarray(edges, np.float64)
    low, high = histogram_range(edges.min(), edges.max(), method.bits)
    return {
        "method": method.kind,
        "bits": method.bits,
        "codes": np.asarray(measured[f"{what}_codes"]).tolist(),
        "histogram": {
            "low": float(low),
            "high": float(high),
            "counts": np.asarray(measured[f"{what}_histogram"]).tolist(),
        },
        "thresholds": sorted(_thresholds(edges).tolist()),
        "levels": sorted(edges.tolist()),
    }


def _thresholds(edges: Any) -> np.ndarray:
    edges = np.asarray(edges, np.float64)
    return (edges[1:] + edges[:-1]) / 2


def _spread(name: str, value: Any) -> dict[str, float]:
    value = np.asarray(value, np.float64).reshape(-1)
    if value.size == 1:
        return {name: float(value[0])}
    return {
        f"{name}_min": float(value.min()),
        f"{name}_mean": float(value.mean()),
        f"{name}_max": float(value.max()),
    }


def histogram_edges(histogram: Mapping[str, Any]) -> np.ndarray:
    """The HISTOGRAM_BINS + 1 edges of a histogram of `layers_table`."""
    return np.linspace(histogram["low"], histogram["high"], HISTOGRAM_BINS + 1)
