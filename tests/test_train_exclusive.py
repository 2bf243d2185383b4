"""A workdir is written by one process at a time."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from uniq_jax.train import exclusive

HOLD = """
import os, pathlib, sys, time
from uniq_jax.train import exclusive

with exclusive.writing(pathlib.Path(sys.argv[1])):
    if os.fork() == 0:  # As a worker that outlives a killed run.
        time.sleep(600)
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another_process(workdir):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, workdir], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_workdir_in_use_is_refused_until_its_process_ends(tmp_path):
    with another_process(tmp_path) as process:
        with (
            pytest.raises(BlockingIOError, match=f"process {process.pid} on ") as refused,
            exclusive.writing(tmp_path),
        ):
            pass
        assert str(tmp_path) in str(refused.value)
        process.kill()
        process.wait()
        with exclusive.writing(tmp_path):  # Though its worker still runs.
            assert f"process {os.getpid()} on" in (tmp_path / exclusive.LOCK_FILE).read_text()
    with exclusive.writing(tmp_path):
        pass


def test_where_there_are_no_locks_nothing_is_locked(tmp_path, monkeypatch):
    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def lockf(file, operation):
            raise OSError(45, "not supported")

    monkeypatch.setattr(exclusive, "fcntl", NoLocks)
    with exclusive.writing(tmp_path):
        pass
    monkeypatch.setattr(exclusive, "fcntl", None)
    with exclusive.writing(tmp_path):
        pass
