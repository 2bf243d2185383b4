"""The float network whose output a phase learns."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from uniq_jax import models
from uniq_jax.spec import ModelSpec, PhaseSpec
from uniq_jax.train import sharding, start
from uniq_jax.train.network import Network, Teacher, join


def read(
    spec: ModelSpec, phase: PhaseSpec, mesh: Mesh, *, num_classes: int, in_features: int
) -> Teacher | None:
    """The phase's teacher, a copy on every device of the mesh; None where it has none.

    Args:
      spec: of the student, whose dtypes the teacher has.
      phase: whose `loss` names the teacher.
      mesh: of the run.
      num_classes: logits of the student.
      in_features: channels of the images.

    Raises:
      ValueError: if the file is not of that network, or there is no such network.
      FileNotFoundError: if there is nothing there.
    """
    if not phase.loss.teacher:
        return None
    key = f"config.{phase.name}.loss"

    def build() -> nnx.Module:
        return models.create(
            phase.loss.teacher_model,
            num_classes=num_classes,
            in_features=in_features,
            dtype=None if spec.dtype == spec.param_dtype else jnp.dtype(spec.dtype),
            param_dtype=jnp.dtype(spec.param_dtype),
            rngs=nnx.Rngs(0),
            **phase.loss.teacher_options,
        )

    try:
        abstract: nnx.Module = nnx.eval_shape(build)
    except TypeError as error:
        options = phase.loss.teacher_options
        raise ValueError(f"{key}.teacher_options (={options}) don't fit: {error}") from None
    except ValueError as error:
        raise ValueError(f"{key}.teacher_model: {error}") from None
    variables = nnx.to_flat_state(nnx.state(abstract))
    here = {join(path): variable.get_value() for path, variable in variables}
    source = start.read_source(
        phase.loss.teacher, key=f"{key}.teacher", phases=("float", "quantized")
    )
    source = start.fitted(abstract, here, source, key=f"{key}.teacher")
    _check_complete(here, source, f"{key}.teacher (={phase.loss.teacher!r})", phase)
    everywhere = sharding.replicated(mesh)
    arrays = {
        path: sharding.put(source[path].astype(array.dtype), everywhere)
        for path, array in here.items()
    }
    return Teacher(arrays, Network.of(abstract))


def _check_complete(
    here: Mapping[str, Any], source: Mapping[str, np.ndarray], named: str, phase: PhaseSpec
) -> None:
    """Raises a ValueError unless the arrays are those of the network, no more and no less."""
    lacking = [path for path in here if path not in source]
    besides = [path for path in source if path not in here]
    if any("_quantizer/" in path for path in besides):
        raise ValueError(f"{named} must be a float network, but it has {besides[0]}")
    parts = [
        f"{what} {', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}"
        for what, paths in (("it lacks", lacking), ("it also has", besides))
        if paths
    ]
    if parts:
        raise ValueError(
            f"{named} must hold a {phase.loss.teacher_model} with the options "
            f"{phase.loss.teacher_options}: {'; '.join(parts)}"
        )
