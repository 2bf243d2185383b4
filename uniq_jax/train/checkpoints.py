"""Checkpoints of one phase: complete or invisible, verified when read.

Orbax writes each into a temporary directory that it renames when everything is on disk. A digest of
all arrays goes with it, so that damage done to the files later is noticed: such a checkpoint is set
aside and the one before it is taken.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from uniq_jax.train import processes, sharding

_KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint is whole, but of another network or optimizer than this run's."""


@dataclasses.dataclass(frozen=True)
class Progressed:
    """What a checkpoint holds besides arrays.

    Attributes:
      data: the train iterator's state.
      best_accuracy: the highest test accuracy so far in this phase, or -1.
      seconds: time that all phases took until here.
    """

    data: dict[str, Any]
    best_accuracy: float
    seconds: float


class Checkpoints:
    """The checkpoints below one directory, by step.

    Args:
      directory: made where it is missing.
      keep: how many of the newest stay.
      note: called with a line for people when a checkpoint is unreadable.
    """

    def __init__(
        self, directory: Path, *, keep: int = _KEPT, note: Callable[[str], None] = lambda line: None
    ):
        self._directory = Path(os.path.abspath(directory))
        self._note = note
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            multiprocessing_options=_among_processes(self._directory),
        )
        self._manager = _manager(self._directory, options)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in their order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, progressed: Progressed) -> None:
        """Saves in the background; the arrays may be donated as soon as this returns.

        Raises:
          OSError: if this save, or the one before it, could not be written.
        """
        arrays = _flat(state)
        meta = {**dataclasses.asdict(progressed), "digest": _digest(arrays)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
        except Exception as error:
            raise OSError(f"cannot write a checkpoint to {self._directory}: {error}") from error

    def restore(self, state: Any) -> tuple[int, Any, Progressed] | None:
        """The newest checkpoint that is readable, or None where there is none.

        One that is not readable is renamed to CORRUPT-STEP, and said so.

        Args:
          state: of the wanted structure; arrays or ShapeDtypeStructs with shardings.

        Returns:
          Its step, the state, and what else it holds.

        Raises:
          CheckpointError: if it is of another network; the message names what differs.
        """
        self.wait()
        for step in reversed(self.steps):
            try:
                restored = processes.together(functools.partial(self._read, step, state))
            except CheckpointError:
                raise
            except Exception as error:
                aside = self._directory / f"CORRUPT-{step}"
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._note(
                    f"checkpoint {self._directory / str(step)} is unreadable ({reason[:200]}); "
                    f"set aside as {aside.name}"
                )
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
        self.wait()
        self._manager.close()

    def _read(self, step: int, state: Any) -> tuple[Any, Progressed]:
        wanted = _flat(jax.tree.map(_abstract, state))
        metadata = self._manager.item_metadata(step).state
        found = {name: tuple(array.shape) for name, array in metadata.tree.items()}
        _check_same(self._directory / str(step), found, wanted)
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(wanted), meta=ocp.args.JsonRestore()
            ),
        )
        meta = dict(restored.meta)
        digest = meta.pop("digest")
        if digest not in ("", _digest(restored.state)):
            raise OSError("its arrays are not those that were saved")
        leaves = [restored.state[name] for name in _flat(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), Progressed(**meta)


def read_model(path: Path) -> dict[str, np.ndarray]:
    """Parameters and statistics, by path, of the newest checkpoint in a directory.

    Where it has moving averages, these are taken.

    Raises:
      FileNotFoundError: if there is no checkpoint.
    """
    directory = Path(os.path.abspath(path))
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    with _manager(directory, options) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"there is no checkpoint in {directory}")
        # NumPy arrays to fill, as the devices that they were saved from need not be here.
        wanted = {
            name: np.empty(array.shape, array.dtype)
            for name, array in manager.item_metadata(step).state.tree.items()
        }
        arrays = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        ).state
    return {
        name.partition(".")[2].replace(".", "/"): np.asarray(array)
        for field in ("params.", "statistics.", "averages.")  # The later one of a path stays.
        for name, array in arrays.items()
        if name.startswith(field)
    }


def _manager(directory: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    among = _among_processes(directory)
    handlers = {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=among),
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=among),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _among_processes(directory: Path) -> ocp.options.MultiprocessingOptions:
    # Processes wait for each other under names, which two directories that are saved to in the
    # background at the same time must not share.
    name = f"{directory.parent.name}-{directory.name}"
    return ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)


def _flat(state: Any) -> dict[str, Any]:
    """Leaves under names like "params.layer1.0.conv1.kernel", in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").replace("/", "."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _digest(arrays: Mapping[str, jax.Array]) -> str:
    """A hash of all arrays; "" where this process does not see all of them."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = sharding.whole(arrays[name])
        if array is None:
            return ""
        total.update(name.encode())
        total.update(np.ascontiguousarray(array).data)
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
