"""Worker processes and the process that they work for."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

pytestmark = pytest.mark.slow

CHILD = """
import multiprocessing, sys, time
from uniq_jax import data

if __name__ == "__main__":
    options = {"data_dir": sys.argv[1], "image_size": 16}
    source = data.load_as("never", "image_folder", split="train", **options)
    batches = data.train_iterator(source, batch_size=4, seed=0, workers=2)
    next(batches), next(batches)  # One of each worker: both are at work.
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    for _ in range(int(sys.argv[2])):
        next(batches)
        time.sleep(0.05)
    batches.close()
    print("done", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a program with two workers; gives the process, and their ids."""
    rng, processes = np.random.default_rng(0), []
    for label in ("a", "b"):
        directory = tmp_path / "images" / "train" / label
        directory.mkdir(parents=True)
        for i in range(8):
            cv2.imwrite(str(directory / f"{i}.jpg"), rng.integers(0, 256, (20, 20, 3), np.uint8))
    (tmp_path / "child.py").write_text(CHILD)

    def run(batches):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "child.py"), str(tmp_path / "images"), str(batches)],
            env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_a_process_that_is_killed(start):
    process, workers = start(10_000)
    assert len(workers) == 2
    assert all(map(is_running, workers))
    process.kill()
    deadline_s = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline_s, "workers outlived their process"
        time.sleep(0.05)


def test_signals_for_the_whole_group_leave_workers_at_work(start):
    process, workers = start(20)
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert process.stdout.read() == "done\n"
    assert process.wait() == 0
