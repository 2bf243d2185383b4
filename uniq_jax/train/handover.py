"""What one phase takes over from another: quantizers that are no longer the same start anew.

Weights, biases, batch norms, PReLUs and shifts mean the same at any width. A learned step does not:
four bits have fifteen steps where two have three. So a phase whose method or widths are others than
those of the phase before it takes a quantizer's parameters only where that quantizer is the same in
both, as 8-bit first and last layers are; all others are calibrated, as in a float network.

Going down in width from phase to phase: Zhuang et al., "Towards Effective Low-bitwidth
Convolutional Neural Networks", CVPR 2018 (arXiv:1711.00205), there called progressive quantization.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from uniq_jax.nn import ActivationQuantizer, WeightQuantizer
from uniq_jax.spec import ConfigError, PhaseSpec
from uniq_jax.train import sources, start
from uniq_jax.train.checkpoints import read_model
from uniq_jax.train.network import join
from uniq_jax.train.run import Run

# The keys of a phase that decide about its quantizers.
_KEYS = ("method", "weight_bits", "activation_bits", "granularity", "quantize_shortcut")


@dataclasses.dataclass(frozen=True)
class Source:
    """Parameters that a phase starts from.

    Attributes:
      read: gives the arrays by path, or by another program's name.
      stale: paths of the phase's quantizers that start anew whatever the source has for them.
    """

    read: Callable[[], Mapping[str, np.ndarray]]
    stale: frozenset[str]


def of_run(run: Run, workdir: Path) -> dict[str, Source | None]:
    """For each phase's name, what it starts from; None for fresh parameters.

    The quantizers of earlier phases of the run follow from its spec, and those of `init_from` from
    the config.json of the workdir that it lies in. Of a file no widths are known: its quantizers
    are taken where nothing is calibrated, and start anew otherwise.

    Args:
      run: its phases, and how their networks are built.
      workdir: of the run.

    Raises:
      ConfigError: if activation quantizers that change have no batches to be calibrated on.
      FileNotFoundError: if `init_from` names nothing.
    """
    found: dict[str, Source | None] = {}
    before: PhaseSpec | None = None
    read: Callable[[], Mapping[str, np.ndarray]] | None = None
    if run.spec.init_from:
        read = functools.partial(start.read_source, run.spec.init_from)
        before = _phase_of(run.spec.init_from, run.spec.phases[0])
    for phase in run.spec.phases:
        found[phase.name] = read and Source(read, _stale(run, before, phase))
        read = functools.partial(read_model, workdir / phase.name / "checkpoints")
        before = phase
    return found


def quantizers(model: nnx.Module) -> dict[str, Any]:
    """The method of every quantizer of a model, by path ("conv1/weight_quantizer").

    Args:
      model: of arrays or of ShapeDtypeStructs.
    """
    return {
        join(path): module.method
        for path, module in nnx.iter_modules(model)
        if isinstance(module, WeightQuantizer | ActivationQuantizer)
    }


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> frozenset[str]:
    """The quantizers `after` that were not there before, or had another method or width.

    Args:
      before: as from `quantizers`.
      after: likewise.

    Example:
      >>> from uniq_jax.nn import UniqWeight
      >>> old = {"conv1/weight_quantizer": UniqWeight(8), "conv2/weight_quantizer": UniqWeight(4)}
      >>> new = {"conv1/weight_quantizer": UniqWeight(8), "conv2/weight_quantizer": UniqWeight(2)}
      >>> changed(old, new)
      frozenset({'conv2/weight_quantizer'})
    """
    return frozenset(path for path, method in after.items() if before.get(path) != method)


def _phase_of(path: str, like: PhaseSpec) -> PhaseSpec | None:
    """The phase that trained what `init_from` names; None where that is not known."""
    section = sources.trained_by(sources.locate(path, key="config.init_from"))
    if section is None or not all(key in section for key in _KEYS):
        return None
    values = {key: section[key] for key in _KEYS}
    return dataclasses.replace(like, name=section["name"], **values)


def _stale(run: Run, before: PhaseSpec | None, phase: PhaseSpec) -> frozenset[str]:
    if phase.is_float or (before is None and not phase.calibration_batches):
        return frozenset()
    here = quantizers(nnx.eval_shape(run.builder(phase)))
    if before is None or before.is_float:
        return frozenset(here)
    if all(getattr(before, key) == getattr(phase, key) for key in _KEYS):
        return frozenset()
    stale = changed(quantizers(nnx.eval_shape(run.builder(before))), here)
    if not phase.calibration_batches and any(p.endswith("activation_quantizer") for p in stale):
        raise ConfigError(
            f"config.{phase.name}.calibration_batches (=0) must be above 0: phase {phase.name!r} "
            f"({phase.method}, W{phase.weight_bits}A{phase.activation_bits}) starts from "
            f"{before.name!r} ({before.method}, W{before.weight_bits}A{before.activation_bits}), "
            "and quantizers of another method or width start anew"
        )
    return stale
