"""How a phase starts: the network, what it takes from elsewhere, and calibration."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from uniq_jax import data_parallel, interop, models, nn
from uniq_jax.spec import ModelSpec, PhaseSpec
from uniq_jax.train import checkpoints, compilation, oscillation, sharding, sources
from uniq_jax.train.network import Arrays, split
from uniq_jax.train.state import Program, TrainState


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
    tracks = program.oscillation is not None and program.oscillation.tracks
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        statistics=statistics,
        opt_state=program.optimizer.init(params),
        averages=copies if program.ema_decay else None,
        oscillation=_oscillation(program, params, statistics) if tracks else None,
    )


def _oscillation(program: Program, params: Arrays, statistics: Arrays) -> oscillation.Oscillation:
    assert program.oscillation is not None
    return oscillation.initial(program.build(params, statistics), program.oscillation)


def restart_oscillation(program: Program, state: TrainState) -> TrainState:
    """The state that knows, where it follows oscillations, the codes of its weights."""
    if state.oscillation is None:
        return state
    places = jax.tree.map(lambda array: array.sharding, state.oscillation)
    start = jax.jit(functools.partial(_oscillation, program), out_shardings=places)
    return dataclasses.replace(state, oscillation=start(state.params, state.statistics))


def restart_averages(state: TrainState) -> TrainState:
    """The state whose averages, where it has some, are its parameters and statistics."""
    if state.averages is None:
        return state
    places = {path: array.sharding for path, array in state.averages.items()}
    copy = jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=places)
    return dataclasses.replace(state, averages=copy({**state.params, **state.statistics}))


def take(
    source: Mapping[str, np.ndarray],
    state: TrainState,
    program: Program,
    stale: Collection[str] = (),
) -> tuple[TrainState, Report]:
    """The state with every array of `source` that it has a place for.

    Args:
      source: path to array, or PyTorch's name to array (`interop.load_torch_state_dict`).
      state: of arrays, or of ShapeDtypeStructs to check only.
      program: of the state.
      stale: paths of quantizers ("conv1/weight_quantizer") that take nothing.

    Raises:
      ValueError: if two shapes disagree (the message names the path and both), or if no path of
        `source` is known.
    """
    here = {**state.params, **state.statistics}
    source = fitted(program.build(state.params, state.statistics), here, source)
    source = {path: a for path, a in source.items() if path.rpartition("/")[0] not in stale}
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

    Where a parameter of a quantizer has another shape, the quantizer is one of another width, and
    none of its parameters is returned.

    Args:
      model: any module; its variables may be of ShapeDtypeStructs.
      here: its variables, by path.
      source: path to array, or another program's name to array.
      key: that named the source, for messages.

    Raises:
      ValueError: if two other shapes disagree (the message names the path and both).
    """
    try:
        by_path = interop.by_path(model, source)
    except ValueError as error:
        raise ValueError(f"what {key} names does not fit: {error}") from None
    others = {p for p in here.keys() & by_path.keys() if by_path[p].shape != here[p].shape}
    resized = {p.rpartition("/")[0] for p in others if "_quantizer/" in p}
    by_path = {p: a for p, a in by_path.items() if p.rpartition("/")[0] not in resized}
    for path in sorted(others):
        if path in by_path:
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
    phases: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The arrays that a key of the config names, under this package's or PyTorch's names.

    Args:
      path: a file that `interop.read_state_dict` reads, named as here or as in PyTorch; a workdir,
        of whose phases one's best checkpoint is taken; or a directory of checkpoints.
      key: for messages.
      phases: of a workdir, those to look in first; then its phases from the last to the first.

    Raises:
      FileNotFoundError: if there is nothing there.
      ValueError: if the file is not one that can be read.
    """
    place = sources.locate(path, key=key, phases=phases)
    return interop.read_state_dict(place) if place.is_file() else checkpoints.read_model(place)


def calibrate(
    program: Program,
    state: TrainState,
    batches: Iterable[Any],
    count: int,
    kept: Collection[str] = (),
) -> TrainState:
    """The state with quantizer parameters from its weights and from `count` batches of images.

    Args:
      program: of the state.
      state: its weights and statistics count.
      batches: "image", as of a step.
      count: of batches.
      kept: paths of parameters that stay as they are.
    """
    model = program.build(state.params, state.statistics)
    images = (program.normalize(batch["image"]) for batch in itertools.islice(batches, count))
    mesh = cast(NamedSharding, state.step.sharding).mesh
    nn.calibrate(
        model,
        images,
        apply=data_parallel.on_mesh(mesh, lambda m, x: m(x)),
        compiler_options=compilation.compiler_options(),
    )
    calibrated = _with_parameters_of(model, state)
    params = {path: (state if path in kept else calibrated).params[path] for path in state.params}
    return dataclasses.replace(state, params=params)


def _with_parameters_of(model: nnx.Module, state: TrainState) -> TrainState:
    params, _ = split(model)
    # Calibration leaves new scalars wherever they were computed.
    placed = {path: jax.device_put(v, state.params[path].sharding) for path, v in params.items()}
    return dataclasses.replace(state, params=placed)
