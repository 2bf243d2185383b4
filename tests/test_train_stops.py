"""Runs that are told to stop, and go on; on other devices too."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from small_runs import StopAt, get_config, train

from uniq_jax.train import preemption
from uniq_jax.train.checkpoints import read_model
from uniq_jax.train.logs import read_metrics

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, kept_compilations):
    workdir = tmp_path_factory.mktemp("undisturbed")
    output = train(get_config(), workdir)
    assert "Stopped" not in output
    return workdir


def owes_evaluation(workdir, phase):
    newest = max((workdir / phase / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return json.loads((newest / "meta" / "metadata").read_text())["owes_evaluation"]


def assert_same_run(one, other):
    assert read_metrics(one) == read_metrics(other)
    for phase in ("float", "quantized"):
        for directory in ("checkpoints", "best"):
            arrays = [read_model(d / phase / directory) for d in (one, other)]
            assert arrays[0].keys() == arrays[1].keys()
            for path in arrays[0]:
                assert arrays[0][path].tobytes() == arrays[1][path].tobytes(), path
    names = [path.name for path in other.rglob("*")]
    assert not [name for name in names if "tmp" in name or name.startswith("CORRUPT")]


def test_stopped_anywhere_it_resumes_bit_for_bit(undisturbed, tmp_path):
    """At a step, in evaluations, in calibration, and where statistics are estimated."""
    config, owed = get_config(), []
    for calls, said in (
        (3, "float: stopped after step 2 of 3"),
        (4, "float: stopped after step 3 of 3"),  # In the evaluation.
        (8, "the run was told to stop"),  # In the calibration: nothing is worth saving.
        (9, "quantized: stopped after step 3 of 6"),  # In the evaluation.
        (7, "quantized: stopped after step 4 of 6"),
        (5, "quantized: stopped after step 6 of 6"),  # Where statistics are estimated.
    ):
        output = train(config, tmp_path, StopAt(calls))
        assert f"Stopped: {said}" in output
        assert not (tmp_path / "result.json").exists()
        phase = said.partition(":")[0]
        owed.append(
            phase in said.split(" ")[0] and owes_evaluation(tmp_path, phase)
            if ":" in said
            else None
        )
    assert owed == [False, True, None, True, False, True]
    output = train(config, tmp_path)
    assert "quantized: resumes at step 6 of 6" in output
    assert_same_run(undisturbed, tmp_path)


def test_a_stop_between_phases_saves_nothing_more(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert "Stopped: the run was told to stop" in train(get_config(), tmp_path, StopAt(2))
    assert sorted(tmp_path.rglob("*")) == before


def test_signals_are_heard_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with preemption.listening() as stop:
            assert not stop()
            signal.raise_signal(number)
            assert stop()
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_interrupt_ends_it_at_once():
    child = "\n".join(
        [
            "import signal",
            "from uniq_jax.train import preemption",
            "with preemption.listening() as stop:",
            "    signal.raise_signal(signal.SIGTERM)",
            "    signal.raise_signal(signal.SIGTERM)",
            "    signal.raise_signal(signal.SIGINT)",
            "    print('alive', flush=True)",
            "    signal.raise_signal(signal.SIGINT)",
            "    print('still alive', flush=True)",
        ]
    )
    process = subprocess.run(
        [sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGINT
    assert process.stdout == "alive\n"
    assert "SIGTERM: stops at the next step" in process.stderr
    assert "Ctrl-C again ends it at once" in process.stderr


def wait_for_step(workdir, step, *processes):
    deadline_s = time.monotonic() + 300
    while time.monotonic() < deadline_s:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        if (workdir / "metrics.jsonl").exists():
            records = read_metrics(workdir)
            if any(r["phase"] == "quantized" and r["step"] >= step for r in records):
                return
        time.sleep(0.02)
    raise AssertionError("the run did not get that far in time")


def start(command, quick_compilation, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **quick_compilation, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_the_command_exits_with_75(number, tmp_path, quick_compilation):
    process = start(
        [
            *("-m", "uniq_jax.main", "--config=tests/small_runs.py", f"--workdir={tmp_path}"),
            "--config.quantized.total_epochs=10000.0",
            "--config.eval_every_epochs=10000.0",
        ],
        quick_compilation,
    )
    wait_for_step(tmp_path, 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert "which is saved; the same command resumes it" in output
    (saved,) = (tmp_path / "quantized" / "checkpoints").iterdir()
    assert read_metrics(tmp_path)[-1]["step"] == int(saved.name)


@pytest.mark.slow
def test_it_resumes_on_other_devices(tmp_path, quick_compilation):
    """One device, then four, then two along the model axis: equal to rounding, in float64."""

    def run(workdir, devices, mesh, stop_at=0):
        flags = quick_compilation["XLA_FLAGS"]
        flags += f" --xla_force_host_platform_device_count={devices}"
        command = ["tests/small_runs.py", str(workdir), str(stop_at), mesh]
        process = start(command, quick_compilation, XLA_FLAGS=flags, JAX_ENABLE_X64="1")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == (75 if stop_at else 0), output

    one, other = tmp_path / "one", tmp_path / "other"
    run(one, 1, "-1x1")
    run(other, 1, "-1x1", stop_at=3)
    run(other, 4, "-1x1", stop_at=12)
    assert json.loads((other / "config.json").read_text())["mesh"] == {"data": -1, "model": 1}
    run(other, 2, "1x2")
    assert json.loads((other / "config.json").read_text())["mesh"] == {"data": 1, "model": 2}
    records, others = read_metrics(one), read_metrics(other)
    assert len(records) == len(others)
    for record, counterpart in zip(records, others):
        assert record.keys() == counterpart.keys()
        for name, value in record.items():
            # Running statistics are float32: what is evaluated with them agrees to that.
            tolerance = 1e-5 if "test_loss" in record else 1e-9
            is_text = isinstance(value, str)
            expected = value if is_text else pytest.approx(value, rel=tolerance)
            assert counterpart[name] == expected, (record, counterpart)
    arrays = [read_model(d / "quantized" / "checkpoints") for d in (one, other)]
    assert arrays[0]["conv2/kernel"].dtype == np.float64
    for path, array in arrays[0].items():
        tolerance = 1e-9 if array.dtype == np.float64 else 1e-5
        np.testing.assert_allclose(arrays[1][path], array, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_two_processes_stop_at_the_same_step(number, told, tmp_path, quick_compilation):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def both(port):
        return [
            start(
                ["tests/small_runs.py", str(tmp_path), "0", "2x1", str(i), str(port)],
                quick_compilation,
            )
            for i in range(2)
        ]

    processes = both(port)
    wait_for_step(tmp_path, 30, *processes)
    processes[told].send_signal(number)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    (saved,) = (tmp_path / "quantized" / "checkpoints").iterdir()
    for output in outputs:
        assert f"quantized: stopped after step {saved.name} of" in output
    assert read_metrics(tmp_path)[-1]["step"] == int(saved.name)


@pytest.mark.parametrize("key", ["config.init_from", "config.quantized.loss.teacher"])
def test_a_source_that_changed_is_named(key, undisturbed, tmp_path):
    source, workdir = tmp_path / "source", tmp_path / "run"
    config = get_config()
    shutil.copytree(undisturbed / "float", source)
    if key == "config.init_from":
        config.init_from = str(source)
    else:
        config.quantized.loss.update(teacher=str(source), teacher_model="small")
    assert "Stopped: float: stopped" in train(config, workdir, StopAt(2))
    assert "Stopped: float: stopped" in train(config, workdir, StopAt(2))  # The same are welcome.
    shutil.rmtree(source)
    arrays = read_model(undisturbed / "float" / "best")
    arrays["fc/bias"] = arrays["fc/bias"] + np.float32(1)
    source.mkdir()
    save(arrays, source)
    with pytest.raises(ValueError, match=rf"{key} \(='.*source'\) has other arrays now than when"):
        train(config, workdir)


def save(arrays, directory):
    import contextlib

    from uniq_jax.train.checkpoints import Checkpoints, Progressed

    named = {f"params.{path}".replace("/", "."): jax.numpy.asarray(a) for path, a in arrays.items()}
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(1, named, Progressed({}, 0.0, 0.0))
