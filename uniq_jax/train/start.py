"""How a phase starts: the network, what it takes from elsewhere, and calibration."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from uniq_jax import interop, models, nn
from uniq_jax.spec import ModelSpec, PhaseSpec
from uniq_jax.train import checkpoints, sharding
from uniq_jax.train.state import Arrays, Program, TrainState, split


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every parameter when a network started from another's.

    Attributes:
      taken: found, and of the right shape.
      new: not found; as initialized.
      left_over: found, but nothing of that name is here.
    """

    taken: tuple[str, ...]
    new: tuple[str, ...]
    left_over: tuple[str, ...]

    def summary(self) -> str:
        """One line. Names what is left over, and what is new but for quantizers' own state."""
        new = [path for path in self.new if "_quantizer/" not in path]
        parts = [
            f"{len(self.taken)} arrays taken",
            f"{len(self.new) - len(new)} of quantizers new",
            f"{len(new)} others new{_named(new)}",
            f"{len(self.left_over)} left over{_named(self.left_over)}",
        ]
        return "; ".join(parts)


def _named(paths: Sequence[str], few: int = 6) -> str:
    more = f" and {len(paths) - few} more" if len(paths) > few else ""
    return f": {', '.join(paths[:few])}{more}" if paths else ""


def build_model(
    spec: ModelSpec, phase: PhaseSpec, *, num_classes: int, in_features: int, seed: int
) -> nnx.Module:
    """The phase's network, with fresh parameters.

    Raises:
      ValueError: if there is no such network, or it does not take the config's options.
    """
    param_dtype = jnp.dtype(spec.param_dtype)
    quantized: dict[str, Any] = {}
    if not phase.is_float:
        quantized = {
            "method": phase.method,
            "weight_bits": phase.weight_bits,
            "activation_bits": phase.activation_bits,
            "granularity": phase.granularity,
            "quantize_downsample": phase.quantize_shortcut,
        }
    try:
        return models.create(
            spec.name,
            num_classes=num_classes,
            in_features=in_features,
            dtype=None if spec.dtype == spec.param_dtype else jnp.dtype(spec.dtype),
            param_dtype=param_dtype,
            rngs=nnx.Rngs(seed),
            **quantized,
            **spec.options,
        )
    except TypeError as error:
        raise ValueError(f"config.model.options (={spec.options}) don't fit: {error}") from None


def abstract_state(build: Callable[[], nnx.Module], program: Program, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a phase's state; nothing is computed."""
    shapes = jax.eval_shape(functools.partial(_fresh, build, program))
    return jax.tree.map(
        lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
        shapes,
        sharding.state_shardings(mesh, shapes),
    )


def fresh_state(build: Callable[[], nnx.Module], program: Program, mesh: Mesh) -> TrainState:
    """A phase's state with fresh parameters, made on the devices where it will lie."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(build, program, mesh))
    return jax.jit(functools.partial(_fresh, build, program), out_shardings=shardings)()


def _fresh(build: Callable[[], nnx.Module], program: Program) -> TrainState:
    params, statistics = split(build())
    copies = jax.tree.map(jnp.copy, {**params, **statistics})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        statistics=statistics,
        opt_state=program.optimizer.init(params),
        averages=copies if program.ema_decay else None,
    )


def restart_averages(state: TrainState) -> TrainState:
    """The state whose averages, where it has some, are its parameters and statistics."""
    if state.averages is None:
        return state
    places = {path: array.sharding for path, array in state.averages.items()}
    copy = jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=places)
    return dataclasses.replace(state, averages=copy({**state.params, **state.statistics}))


def take(
    source: Mapping[str, np.ndarray], state: TrainState, program: Program
) -> tuple[TrainState, Report]:
    """The state with every array of `source` that it has a place for.

    Args:
      source: path to array, or PyTorch's name to array (`interop.load_torch_state_dict`).
      state: of arrays, or of ShapeDtypeStructs to check only.
      program: of the state.

    Raises:
      ValueError: if two shapes disagree (the message names the path and both), or if no path of
        `source` is known.
    """
    here = {**state.params, **state.statistics}
    source = fitted(program.build(state.params, state.statistics), here, source)
    report = Report(
        taken=tuple(path for path in here if path in source),
        new=tuple(path for path in here if path not in source),
        left_over=tuple(path for path in source if path not in here),
    )
    if not report.taken:
        raise ValueError(
            "what config.init_from names has no parameter of this network; it has "
            f"{', '.join(list(source)[:5])} …"
        )

    def replaced(arrays: Arrays) -> Arrays:
        return {path: _place(source.get(path), array) for path, array in arrays.items()}

    new = {"params": replaced(state.params), "statistics": replaced(state.statistics)}
    return dataclasses.replace(state, **new), report


def fitted(
    model: nnx.Module,
    here: Mapping[str, Any],
    source: Mapping[str, np.ndarray],
    *,
    key: str = "config.init_from",
) -> dict[str, np.ndarray]:
    """The arrays of `source` by the model's paths.

    Args:
      model: any module; its variables may be of ShapeDtypeStructs.
      here: its variables, by path.
      source: path to array, or another program's name to array.
      key: that named the source, for messages.

    Raises:
      ValueError: if two shapes disagree (the message names the path and both).
    """
    try:
        by_path = interop.by_path(model, source)
    except ValueError as error:
        raise ValueError(f"what {key} names does not fit: {error}") from None
    for path in here.keys() & by_path.keys():
        if by_path[path].shape != here[path].shape:
            raise ValueError(
                f"what {key} names has {path} of shape {by_path[path].shape}, but the "
                f"network's has shape {here[path].shape}"
            )
    return by_path


def restart_weight_quantizers(program: Program, state: TrainState, report: Report) -> TrainState:
    """The state in which weight quantizers that found no parameters start from their weights."""
    model = program.build(state.params, state.statistics)
    nn.calibrate_weights(model, report.new)
    return _with_parameters_of(model, state)


def _place(value: np.ndarray | None, like: jax.Array) -> jax.Array:
    if value is None or isinstance(like, jax.ShapeDtypeStruct):
        return like
    return sharding.put(value.astype(like.dtype), like.sharding)


def read_source(
    path: str,
    *,
    key: str = "config.init_from",
    phases: Sequence[str] = ("quantized", "float"),
) -> dict[str, np.ndarray]:
    """The arrays that a key of the config names, under this package's or PyTorch's names.

    Args:
      path: a file that `interop.read_state_dict` reads, named as here or as in PyTorch; a workdir,
        of whose phases one's best checkpoint is taken; a directory of checkpoints; or a checkpoint.
      key: for messages.
      phases: of a workdir, the one to take first.

    Raises:
      FileNotFoundError: if there is nothing there.
      ValueError: if the file is not one that can be read.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{key} (={path!r}) does not exist")
    if place.is_file():
        return interop.read_state_dict(place)
    for directory in (place, place / "best", *(place / phase / "best" for phase in phases)):
        try:
            return checkpoints.read_model(directory)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(
        f"{key} (={path!r}) must be a .pth, .safetensors or .npz file, a workdir "
        "with a checkpoint in PHASE/best, or a directory of checkpoints"
    )


def calibrate(
    program: Program, state: TrainState, batches: Iterable[Any], count: int
) -> TrainState:
    """The state with quantizer parameters from its weights and from `count` batches of images."""
    model = program.build(state.params, state.statistics)
    images = (program.normalize(batch["image"]) for batch in itertools.islice(batches, count))
    nn.calibrate(model, images)
    return _with_parameters_of(model, state)


def _with_parameters_of(model: nnx.Module, state: TrainState) -> TrainState:
    params, _ = split(model)
    # Calibration leaves new scalars wherever they were computed.
    placed = {path: jax.device_put(v, state.params[path].sharding) for path, v in params.items()}
    return dataclasses.replace(state, params=placed)
