"""Whether a frozen network is its model: code by code."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax.deploy import integers
from uniq_jax.deploy.graph import Node
from uniq_jax.deploy.network import FrozenNetwork
from uniq_jax.nn import capture

_ENCODES = ("encode", "encode_sums")


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One quantizer of activations.

    Attributes:
      path: of its layer in the model.
      codes: that were compared.
      mismatches: of these, how many differ.
    """

    path: str
    codes: int
    mismatches: int


@dataclasses.dataclass(frozen=True)
class Verification:
    """A model and its frozen network on the same images.

    Attributes:
      images: how many.
      layers: in the order of their calls.
      logit_difference: the largest difference of two logits, over the largest logit; inf where
        one of them is not finite and the other is something else.
      class_mismatches: images whose largest logit is of another class.
    """

    images: int
    layers: tuple[LayerCheck, ...]
    logit_difference: float
    class_mismatches: int

    @property
    def codes(self) -> int:
        """Codes that were compared, over all layers."""
        return sum(layer.codes for layer in self.layers)

    @property
    def mismatches(self) -> int:
        """Codes that differ, over all layers."""
        return sum(layer.mismatches for layer in self.layers)

    def summary(self) -> str:
        """One line."""
        bad = [f"{layer.path} {layer.mismatches}" for layer in self.layers if layer.mismatches]
        where = f" ({', '.join(bad[:5])})" if bad else ""
        return f"mismatching codes: {self.mismatches} of {self.codes}{where}"


def verify(model: nnx.Module, frozen: FrozenNetwork, batches: Iterable[Any]) -> Verification:
    """Compares the codes of a model's evaluation with those of its frozen network.

    Both run as they would alone, each a compiled program of its own.

    Args:
      model: that `frozen` was made of.
      frozen: the integer network.
      batches: of images, float32 (batch, height, width, channels), normalized.

    Raises:
      ValueError: if the two have different layers, or there are no batches.

    Example:
      >>> from uniq_jax import models, rules
      >>> from uniq_jax.deploy import freeze
      >>> model = models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0), method="n2uq",
      ...                       weight_bits=2, activation_bits=2)
      >>> images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
      >>> verify(model, freeze(model, (8, 8, 3)), [images]).mismatches
      0
    """
    evaluated = nnx.clone(model)
    evaluated.eval()
    encodes = encodes_of(frozen)
    total, classes, largest, difference = 0, 0, 0.0, 0.0
    counts, mismatches = np.zeros(len(encodes), int), np.zeros(len(encodes), int)
    for images in batches:
        images = jnp.asarray(images, jnp.float32)
        logits, codes = _of_model(evaluated, images)
        frozen_logits, frozen_codes = logits_and_codes(frozen, images)
        if [c.shape for c in codes] != [c.shape for c in frozen_codes]:
            raise ValueError("frozen is of another model: its quantizers see other shapes")
        counts += [c.size for c in codes]
        mismatches += np.asarray(_differing(codes, frozen_codes))
        total += images.shape[0]
        classes += int(jnp.sum(jnp.argmax(logits, -1) != jnp.argmax(frozen_logits, -1)))
        difference = max(difference, largest_difference(logits, frozen_logits))
        largest = max(largest, largest_logit(logits))
    if not total:
        raise ValueError("batches must hold at least one batch")
    layers = tuple(
        LayerCheck(node.layer, int(n), int(m)) for node, n, m in zip(encodes, counts, mismatches)
    )
    return Verification(total, layers, difference / (largest or 1.0), classes)


def encodes_of(frozen: FrozenNetwork) -> list[Node]:
    """The quantizers of activations, in the order of their calls."""
    return [node for node in frozen.graph.nodes if node.operation in _ENCODES]


def largest_difference(first: Any, second: Any) -> float:
    """Of two arrays of logits; inf where one is not finite and the other is something else."""
    first, second = np.asarray(first), np.asarray(second)
    is_same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):  # inf - inf is nan.
        differences = np.nan_to_num(np.abs(first - second), nan=np.inf, posinf=np.inf)
    return float(np.max(np.where(is_same, 0, differences), initial=0))


def largest_logit(logits: Any) -> float:
    """The largest magnitude of those that are finite."""
    magnitudes = np.abs(np.asarray(logits))
    return float(np.max(magnitudes[np.isfinite(magnitudes)], initial=0))


# At module level, so that the next network of the same shape is not compiled anew.
@nnx.jit
def _of_model(model: Any, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    with capture.tapping() as codes:
        logits = model(images)
    return logits, codes


@jax.jit
def logits_and_codes(frozen: FrozenNetwork, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """The logits, and the codes of every quantizer of `encodes_of`."""
    values = frozen.values(images)
    codes = [
        integers.codes_of(values[node.name], integers.form(*node["grid"]))
        for node in encodes_of(frozen)
    ]
    return values[frozen.graph.output], codes


@jax.jit
def _differing(first: list[jax.Array], second: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(a.astype(jnp.int16) != b) for a, b in zip(first, second)]
