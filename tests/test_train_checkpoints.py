"""Checkpoints that are damaged, or of other moments."""

import contextlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from uniq_jax.train import checkpoints as module
from uniq_jax.train import processes
from uniq_jax.train.checkpoints import Checkpoints, Progressed, read_model
from uniq_jax.train.logs import remove_torn_files, write_json


def arrays(step):
    return {"params.a": jnp.full((64, 64), float(step)), "params.b": jnp.arange(3) + step}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, arrays(step), Progressed({"step": step}, 0.5, 1.0))
    return directory


def largest(directory):
    return max(directory.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_arrays(newest):
    """Whole and readable, but not what its digest says."""
    shutil.rmtree(newest / "state")
    shutil.copytree(newest.with_name("1") / "state", newest / "state")


def directory_in_place(path):
    """What cannot be read, also by a superuser, to whom permissions are nothing."""
    path.unlink()
    path.mkdir()


def of_meta(change):
    def damage(newest):
        path = newest / "meta" / "metadata"
        value = change(json.loads(path.read_text()))
        path.write_text(value if isinstance(value, str) else json.dumps(value))

    return damage


DAMAGES = {
    "flipped bit": lambda newest: flip(largest(newest / "state")),
    "truncated array": lambda newest: truncate(largest(newest / "state")),
    "no array file": lambda newest: largest(newest / "state").unlink(),
    "no arrays": lambda newest: shutil.rmtree(newest / "state"),
    "no manifest": lambda newest: (newest / "state" / "manifest.ocdbt").unlink(),
    "no names": lambda newest: (newest / "state" / "_METADATA").unlink(),
    "other arrays": other_arrays,
    "empty meta": of_meta(lambda meta: ""),
    "meta of another kind": of_meta(lambda meta: [1]),
    "no digest": of_meta(lambda meta: {k: v for k, v in meta.items() if k != "digest"}),
    "no data state": of_meta(lambda meta: {k: v for k, v in meta.items() if k != "data"}),
    "no meta": lambda newest: shutil.rmtree(newest / "meta"),
    "unreadable meta": lambda newest: directory_in_place(newest / "meta" / "metadata"),
    "empty": lambda newest: [shutil.rmtree(path) for path in newest.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(damage, two, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    (directory / "CORRUPT-2").mkdir()  # Of an earlier time; it stays.
    DAMAGES[damage](directory / "2")
    if damage != "no data state":  # It is of no use to one that takes parameters only.
        with pytest.raises(ValueError, match=r"checkpoint .*/2 is unreadable \(.+\); if it is of"):
            read_model(directory)
    notes = []
    with contextlib.closing(Checkpoints(directory, note=notes.append)) as checkpoints:
        step, state, progressed = checkpoints.restore(arrays(0))
        assert (step, progressed) == (1, Progressed({"step": 1}, 0.5, 1.0))
        np.testing.assert_array_equal(state["params.a"], np.full((64, 64), 1.0))
        (note,) = notes
        assert note.startswith(f"checkpoint {directory / '2'} is unreadable (")
        assert note.endswith("; set aside as CORRUPT-2-2")
        # The step can be saved anew.
        checkpoints.save(2, arrays(2), progressed)
        checkpoints.wait()
        assert checkpoints.restore(arrays(0))[0] == 2
    assert sorted(path.name for path in directory.iterdir()) == [
        "1",
        "2",
        "CORRUPT-2",
        "CORRUPT-2-2",
    ]
    assert read_model(directory)["b"].tolist() == [2, 3, 4]


def test_a_checkpoint_that_was_never_finished_is_invisible_and_goes(two, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    os.rename(directory / "2", directory / "2.orbax-checkpoint-tmp")
    assert read_model(directory)["b"].tolist() == [1, 2, 3]
    notes = []
    with contextlib.closing(Checkpoints(directory, note=notes.append)) as checkpoints:
        assert checkpoints.restore(arrays(0))[0] == 1
        checkpoints.save(3, arrays(3), Progressed({}, 0.5, 1.0))  # Waits until it is gone.
    assert notes == []
    assert sorted(path.name for path in directory.iterdir()) == ["1", "3"]


def test_reading_leaves_everything_where_another_process_trains(two, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    shutil.copytree(two / "2", directory / "3.orbax-checkpoint-tmp")
    flip(largest(directory / "2" / "state"))
    before = sorted(directory.rglob("*"))
    notes = []
    with contextlib.closing(
        Checkpoints(directory, read_only=True, note=notes.append)
    ) as checkpoints:
        assert checkpoints.restore(arrays(0))[0] == 1
    assert sorted(directory.rglob("*")) == before
    (note,) = notes
    assert note.endswith("; the one before it is taken")


@pytest.mark.parametrize("error", [MemoryError(), JaxRuntimeError("out of memory")])
def test_what_is_no_fault_of_the_checkpoint_does_not_set_it_aside(error, two, monkeypatch):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(module, "_restore", fails)
    with (
        contextlib.closing(Checkpoints(two)) as checkpoints,
        pytest.raises(type(error)),
    ):
        checkpoints.restore(arrays(0))
    assert sorted(path.name for path in two.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(("states", "error"), [([0, 1], OSError), ([1, 2], JaxRuntimeError)])
def test_others_hear_why_one_could_not_read(states, error, monkeypatch):
    """So that none sets a checkpoint aside for which another one's memory was too small."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_gathered", lambda value: np.asarray(states))
    with pytest.raises(error, match="process 1 "):
        processes.together(lambda: None)


def test_arrays_may_be_given_up_while_they_are_saved(tmp_path):
    change = jax.jit(lambda arrays: {k: v * 3 + 1 for k, v in arrays.items()}, donate_argnums=0)
    state = {f"params.{i}": jnp.full((512, 512), float(i)) for i in range(8)}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in range(4):
            checkpoints.save(step, state, Progressed({}, 0.0, 0.0))
            expected = {name: np.array(array) for name, array in state.items()}
            for _ in range(3):
                state = change(state)
        assert checkpoints.restore(state)[0] == 3
    found = read_model(tmp_path)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name.removeprefix("params.")], array)


def test_a_step_is_saved_again_in_place(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for accuracy in (0.25, 0.75):
            checkpoints.save(7, arrays(7), Progressed({}, accuracy, 0.0, accuracy < 0.5))
        step, _, progressed = checkpoints.restore(arrays(0))
    assert (step, progressed) == (7, Progressed({}, 0.75, 0.0, False))


def test_files_torn_by_a_kill_are_removed(tmp_path):
    (tmp_path / "phase" / "files").mkdir(parents=True)
    write_json(tmp_path / "phase" / "outcome.json", {})
    for name in (".config.json.17.tmp", "phase/.outcome.json.17.tmp", "phase/files/.x.bin.17.tmp"):
        (tmp_path / name).write_text("{")
    remove_torn_files(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"phase", "files", "outcome.json"}
