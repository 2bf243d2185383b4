"""Checkpoints of one phase: complete or invisible, verified when read.

Orbax writes each into a temporary directory that it renames when everything is on disk. A digest of
all arrays goes with it, so that damage done to the files later is noticed: such a checkpoint is set
aside and the one before it is taken.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from uniq_jax.train import processes, sharding

_KEPT = 2
_META_FILE = "metadata"


class CheckpointError(ValueError):
    """A checkpoint is whole, but of another network or optimizer than this run's."""


@dataclasses.dataclass(frozen=True)
class Progressed:
    """What a checkpoint holds besides arrays.

    Attributes:
      data: the train iterator's state.
      best_accuracy: the highest test accuracy so far in this phase, or -1.
      seconds: time that all phases took until here.
      owes_evaluation: the run was told to stop before it did what falls due after this step.
    """

    data: dict[str, Any]
    best_accuracy: float
    seconds: float
    owes_evaluation: bool = False


class Checkpoints:
    """The checkpoints below one directory, by step.

    Args:
      directory: made where it is missing.
      keep: how many of the newest stay.
      read_only: nothing is written, removed or set aside: another process may be training there.
      note: called with a line for people when a checkpoint is unreadable.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = _KEPT,
        read_only: bool = False,
        note: Callable[[str], None] = lambda line: None,
    ):
        self._directory = Path(os.path.abspath(directory))
        self._read_only, self._note = read_only, note
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            multiprocessing_options=_among_processes(self._directory),
        )
        self._manager = _manager(self._directory, options)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in their order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, progressed: Progressed) -> None:
        """Saves in the background; the arrays may be donated as soon as this returns.

        One of the same step, from which a run has resumed to do what it owed, is replaced.

        Raises:
          OSError: if this save, or the one before it, could not be written.
        """
        arrays = _flat(state)
        # Not even a copy where a device shares the host's memory: JAX does not donate what is seen.
        on_host = _on_host(arrays) if processes.is_first() else {}  # Which writes the digest.
        meta = _SaveMeta(dataclasses.asdict(progressed), on_host)
        try:
            if step in self.steps:
                self._manager.wait_until_finished()
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=meta),
                force=True,
            )
        except Exception as error:
            raise OSError(f"cannot write a checkpoint to {self._directory}: {error}") from error

    def restore(self, state: Any) -> tuple[int, Any, Progressed] | None:
        """The newest checkpoint that is readable, or None where there is none.

        One that is not readable is named, and renamed to CORRUPT-STEP unless this is `read_only`.

        Args:
          state: of the wanted structure; arrays or ShapeDtypeStructs with shardings.

        Returns:
          Its step, the state, and what else it holds.

        Raises:
          CheckpointError: if it is of another network; the message names what differs.
          MemoryError, jax.errors.JaxRuntimeError: if memory, or another process, was missing.
        """
        self.wait()
        for step in reversed(self.steps):
            try:
                restored = processes.together(functools.partial(self._read, step, state))
            except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # The checkpoint itself may be as good as any.
            except Exception as error:
                text = f"checkpoint {self._directory / str(step)} is unreadable ({_reason(error)})"
                if self._read_only:
                    self._note(f"{text}; the one before it is taken")
                    continue
                aside = self._aside(step)
                self._note(f"{text}; set aside as {aside.name}")
                processes.on_first(os.replace, self._directory / str(step), aside)
                self._manager.reload()
            else:
                return (step, *restored)
        return None

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints later than `step`, which a resumed run will make again."""
        for later in [s for s in self.steps if s > step]:
            self._manager.delete(later)

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises an OSError if it could not be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise OSError(f"cannot write a checkpoint to {self._directory}: {error}") from error

    def close(self) -> None:
        """Waits, and frees the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _aside(self, step: int) -> Path:
        """Where a checkpoint goes that is unreadable: one set aside before stays."""
        names = (f"CORRUPT-{step}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        return next(path for name in names if not (path := self._directory / name).exists())

    def _read(self, step: int, state: Any) -> tuple[Any, Progressed]:
        wanted = _flat(jax.tree.map(_abstract, state))
        metadata = self._manager.item_metadata(step).state
        found = {name: tuple(array.shape) for name, array in metadata.tree.items()}
        _check_same(self._directory / str(step), found, wanted)
        arrays, meta = _restore(self._manager, step, wanted)
        leaves = [arrays[name] for name in _flat(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), Progressed(**meta)


def read_model(path: Path) -> dict[str, np.ndarray]:
    """Parameters and statistics, by path, of the newest checkpoint in a directory.

    Where it has moving averages, these are taken. It may be of any number of devices.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if it is unreadable, or its arrays are not those that were saved. An older one is
        not taken in its place: what starts from it would come to another result.
    """
    directory = Path(os.path.abspath(path))
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    with _manager(directory, options) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"there is no checkpoint in {directory}")
        try:
            # Into host memory: the devices that it was saved on need not be here.
            found = manager.item_metadata(step).state.tree
            wanted = {name: np.empty(array.shape, array.dtype) for name, array in found.items()}
            arrays, _ = _restore(manager, step, wanted)
        except Exception as error:
            raise ValueError(
                f"checkpoint {directory / str(step)} is unreadable ({_reason(error)}); if it is of "
                "a finished phase, remove it and the phase's outcome.json: the same command then "
                "trains the phase on from the checkpoint before"
            ) from error
    return {
        name.partition(".")[2].replace(".", "/"): np.asarray(array)
        for field in ("params.", "statistics.", "averages.")  # The later one of a path stays.
        for name, array in arrays.items()
        if name.startswith(field)
    }


class _MetaHandler(ocp.JsonCheckpointHandler):
    """Writes JSON with the arrays' digest, which is found in the background too."""

    async def async_save(
        self, directory: Any, item: Any = None, args: Any = None
    ) -> list[future.Future]:
        del item

        async def write() -> None:
            if jax.process_index() == 0:
                text = json.dumps({**args.meta, "digest": _digest(args.arrays)})
                (directory / _META_FILE).write_text(text)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="meta")]


@ocp.args.register_with_handler(_MetaHandler, for_save=True)
@dataclasses.dataclass
class _SaveMeta(ocp.args.CheckpointArgs):
    """What `_MetaHandler` saves.

    Attributes:
      meta: for JSON.
      arrays: to digest; none where no process sees all of them.
    """

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


@ocp.args.register_with_handler(_MetaHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreMeta(ocp.args.CheckpointArgs):
    """That `_MetaHandler` restores."""


def _manager(directory: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    among = _among_processes(directory)
    handlers = {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=among),
        "meta": _MetaHandler(_META_FILE, multiprocessing_options=among),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _among_processes(directory: Path) -> ocp.options.MultiprocessingOptions:
    # Processes wait for each other under names, which two directories that are saved to in the
    # background at the same time must not share.
    name = f"{directory.parent.name}-{directory.name}"
    return ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)


def _restore(
    manager: ocp.CheckpointManager, step: int, wanted: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays, and what else a checkpoint holds; verified.

    Raises:
      OSError: if the arrays are not those that were saved.
    """
    state = ocp.args.StandardRestore(wanted)
    args = ocp.args.Composite(state=state, meta=_RestoreMeta())
    restored: Any = manager.restore(step, args=args)
    arrays, meta = restored.state, dict(restored.meta)
    digest = meta.pop("digest")
    if digest and (on_host := _on_host(arrays)) and digest != _digest(on_host):
        raise OSError("its arrays are not those that were saved")
    return arrays, meta


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).splitlines()
    text = lines[0][:200] if lines else "no more is known"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _flat(state: Any) -> dict[str, Any]:
    """Leaves under names like "params.layer1.0.conv1.kernel", in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").replace("/", "."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _on_host(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays on the host; none where this process holds only a part of one."""
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        whole = sharding.whole(array) if isinstance(array, jax.Array) else array
        if whole is None:
            return {}
        found[name] = whole
    return found


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of all arrays; "" of none."""
    if not arrays:
        return ""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        total.update(name.encode())
        total.update(np.ascontiguousarray(arrays[name]).data)
    return total.hexdigest()


def _check_same(path: Path, found: Mapping[str, tuple], wanted: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    other = [
        f"{name} {found[name]} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name] != tuple(wanted[name].shape)
    ]
    parts = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("it lacks", missing), ("it also has", extra), ("shapes:", other))
        if names
    ]
    if parts:
        raise CheckpointError(f"{path} is of another architecture: {'; '.join(parts)}")
