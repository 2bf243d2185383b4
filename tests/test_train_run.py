"""Whole runs through the command: finished, killed and resumed, refused."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small_runs import NETWORK

from uniq_jax.train import exclusive
from uniq_jax.train.logs import read_metrics

CONFIG = """
from uniq_jax import config as c

def get_config(arg=None):
    config = c.base()
    config.data.batch_size = 32
    config.data.train_split = "train[:320]"
    config.data.augment = "crop"
    config.data.pad_pixels = 1
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.phases = ("float", "quantized")
    config.float = c.phase("float", total_epochs=2.0)
    config.quantized = c.phase("uniq_n2uq", weight_bits=2, activation_bits=2, total_epochs=3.0,
                               calibration_batches=2, optimizer={"learning_rate": 0.01})
    config.checkpoint_every_steps = 4
    config.log_every_steps = 1
    config.layer_metrics_every_steps = 6
    config.export.formats = ""
    return config
"""


RESNET = 'config.model.name = "resnet8"\n    config.model.options = {"width": 4}'
SMALL = NETWORK + CONFIG.replace(RESNET, 'config.model.name = "small"')


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def light_config_file(tmp_path_factory):
    """What is refused before anything is imported that trains."""
    path = tmp_path_factory.mktemp("config") / "light.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory, quick_compilation):
    """An undisturbed run: its directory and what it printed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    process = start(config_file, workdir, quick_compilation)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return workdir, output


def start(config_file, workdir, environment, *arguments):
    command = [sys.executable, "-m", "uniq_jax.main", f"--config={config_file}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *arguments],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def files(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.json"))
    }


def test_a_run_prints_its_table_and_leaves_its_files(finished):
    workdir, output = finished
    result = json.loads((workdir / "result.json").read_text())
    assert result["method"] == "uniq_n2uq"
    assert (result["weight_bits"], result["activation_bits"], result["seed"]) == (2, 2, 0)
    assert 0 <= result["test_accuracy"] <= result["best_accuracy"] <= 1
    assert 0 <= result["float_accuracy"] <= 1
    assert 0 < result["packed_bytes"] < result["float_bytes"] / 4
    assert result["steps"] == 50
    assert result["seconds"] > 0
    assert all(pathlib.Path(path).exists() for path in result["files"].values())
    for text in ("accuracy", "smaller", str(workdir / "result.json"), "epoch2/2"):
        assert text in "".join(output.split()), text  # Long paths are folded.
    records = read_metrics(workdir)
    steps = [r["step"] for r in records if r["phase"] == "quantized" and "loss" in r]
    assert steps == list(range(1, 31))
    assert [r["step"] for r in records if "test_accuracy" in r] == [10, 20, 10, 20, 30]
    for phase in ("float", "quantized"):
        found = [
            (r["test_accuracy"], -r["step"])
            for r in records
            if r["phase"] == phase and "test_accuracy" in r
        ]
        accuracy, step = max(found)  # The first one of equal ones.
        outcome = json.loads((workdir / phase / "outcome.json").read_text())
        assert outcome["best_accuracy"] == accuracy
        best = [path.name for path in (workdir / phase / "best").iterdir()]
        assert [name for name in best if name.isdigit()] == [str(-step)]
    assert all(r["test_count"] == 360 for r in records if "test_accuracy" in r)
    assert list((workdir / "events" / "quantized").glob("events.out.*"))
    measured = [r for r in records if "layers" in r]
    assert [(r["phase"], r["step"]) for r in measured] == [
        ("quantized", step) for step in (6, 12, 18, 24, 30)
    ]
    layers = json.loads((workdir / "quantized" / "layers.json").read_text())
    assert layers["step"] == 30
    numbers = {row["path"]: row["numbers"] for row in layers["layers"]}
    assert numbers == measured[-1]["layers"]
    assert 0 < numbers["conv2"]["weight_entropy"] <= 2
    sizes = [row["packed_bytes"] for row in layers["layers"]]
    assert sum(sizes) + layers["other_packed_bytes"] == result["packed_bytes"]
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["environment"]["backend"] == "cpu"
    assert environment["changes"] == []
    page = (workdir / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "Finished: 50 steps" in page
    assert page.count("<svg") == 2 + len(layers["layers"])
    report = json.loads((workdir / "quantized" / "start.json").read_text())
    assert "conv2/kernel" in report["taken"]
    assert "conv2/weight_quantizer/step" in report["new"]
    assert report["left_over"] == []


def test_the_same_command_again_trains_nothing(finished, config_file, run_main):
    workdir, _ = finished
    before = files(workdir)
    again = run_main(f"--config={config_file}", f"--workdir={workdir}")
    assert again.returncode == 0, again.stderr
    assert "nothing is left to train" in again.stdout
    assert files(workdir) == before


def test_a_report_that_cannot_be_drawn_does_not_undo_the_run(copy, config_file, run_main):
    shutil.copy(copy.parent / "result.json", copy)
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    process = run_main(f"--config={config_file}", f"--workdir={copy}")
    assert process.returncode == 0, process.stderr
    assert "no report was drawn (IsADirectoryError" in process.stdout
    assert "accuracy" in process.stdout


def test_eval_finds_the_accuracy_of_training(finished, config_file, run_main):
    workdir, _ = finished
    process = run_main(f"--config={config_file}", f"--workdir={workdir}", "--mode=eval")
    assert process.returncode == 0, process.stderr
    accuracy = json.loads((workdir / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy {100 * accuracy:.2f}%" in process.stdout
    assert "on 360 examples" in process.stdout


def test_export_writes_what_it_is_told_to(finished, config_file, run_main):
    workdir, _ = finished
    arguments = (f"--config={config_file}", f"--workdir={workdir}", "--mode=export")
    options = ("--config.export.formats=packed", "--config.export.check_images=40")
    process = run_main(*arguments, *options)
    assert process.returncode == 0, process.stderr
    lines = [line.strip() for line in process.stdout.splitlines()]
    check = json.loads((workdir / "export" / "export.json").read_text())["check"]
    assert (check["images"], check["mismatches"]) == (40, 0)
    assert f"mismatching codes: 0 of {check['codes']}" in lines
    assert (workdir / "export" / "model.safetensors").stat().st_size > 1000


def test_killed_anywhere_it_resumes_bit_for_bit(finished, config_file, tmp_path, quick_compilation):
    """Killed in the first phase and between checkpoints of the second."""
    undisturbed, _ = finished
    workdir = tmp_path / "run"
    for phase, step in (("float", 9), ("quantized", 6), ("quantized", 18)):
        process = start(config_file, workdir, quick_compilation)
        kill_after(process, workdir, phase, step)
        assert not (workdir / "result.json").exists()
    process = start(config_file, workdir, quick_compilation)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "quantized: resumes at step" in output
    for name in ("metrics.jsonl", "quantized/layers.json"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()
    for name in ("result.json", "quantized/outcome.json", "float/outcome.json"):
        one, other = (json.loads((d / name).read_text()) for d in (undisturbed, workdir))
        for values in (one, other):
            del values["seconds"]
            values.pop("files", None)
        assert one == other
    from uniq_jax.train.checkpoints import read_model

    for phase in ("float", "quantized"):
        arrays = [read_model(d / phase / "checkpoints") for d in (undisturbed, workdir)]
        assert arrays[0].keys() == arrays[1].keys()
        for path in arrays[0]:
            assert arrays[0][path].tobytes() == arrays[1][path].tobytes(), path
    names = [p.name for p in workdir.rglob("*")]
    assert not [name for name in names if "tmp" in name.lower() or name.startswith("CORRUPT")]


def kill_after(process, workdir, phase, step):
    """Kills the process as soon as it has logged this step."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        records = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
        if any(r["phase"] == phase and r["step"] >= step for r in records):
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get that far in time")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, as if it had been killed before its end."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").rename(tmp_path / "result.json")
    (workdir / "quantized" / "outcome.json").unlink()
    return workdir


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing file"])
def test_a_corrupt_newest_checkpoint_falls_back(damage, copy, finished, config_file, run_main):
    newest = copy / "quantized" / "checkpoints" / "30"
    largest = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    data = bytearray(largest.read_bytes())
    if damage == "flipped byte":
        data[len(data) // 2] ^= 0xFF
        largest.write_bytes(bytes(data))
    elif damage == "truncated":
        largest.write_bytes(bytes(data[: len(data) // 2]))
    else:
        (newest / "state" / "manifest.ocdbt").unlink()
    process = run_main(f"--config={config_file}", f"--workdir={copy}")
    assert process.returncode == 0, process.stderr
    words = " ".join(process.stdout.split())
    assert "is unreadable" in words
    assert "CORRUPT-30" in words
    assert "quantized: resumes at step 28 of 30" in words
    assert read_metrics(copy) == read_metrics(finished[0])


def test_a_checkpoint_of_another_architecture_is_refused(copy, config_file, run_main):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["options"] = {"width": 4}
    (copy / "config.json").write_text(json.dumps(config))
    shutil.rmtree(copy / "float")
    other = config_file.with_name("wide.py")
    other.write_text(SMALL.replace('"small"', '"small"; config.model.options = {"width": 4}'))
    # The float phase is trained anew; the quantized one finds checkpoints that are not its own.
    process = run_main(f"--config={other}", f"--workdir={copy}")
    assert process.returncode == 1
    assert "is of another architecture" in process.stderr
    assert "bn1" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (copy / "result.json").exists()


def test_a_workdir_of_another_config_is_refused(finished, config_file, run_main):
    workdir, _ = finished
    before = files(workdir)
    process = run_main(f"--config={config_file}", f"--workdir={workdir}", "--config.seed=5")
    assert process.returncode == 1
    assert "holds a run of another config" in process.stderr
    assert "config.seed: 0 there, 5 now" in process.stderr
    assert files(workdir) == before


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.data.name=digitz", "'digitz' is an unknown data set"),
        ("--config.data.name=cifar10 --config.data.data_dir=/no/such", "'/no/such' is not a dir"),
        ("--config.sead=3", 'config.sead is no known key of the config. Did you mean "seed"'),
        ("--config.data.batch_sise=3", "config.data.batch_sise is no known key"),
        ("--config.quantized.weight_bits=0", "config.quantized.weight_bits (=0) must be in 1..8"),
        ("--config.quantized.weight_bits=17", "config.quantized.weight_bits (=17) must be in 1..8"),
        ("--config.quantized.weight_bits=two", "weight_bits=two"),
        ("--config.model.name=resnet21", "'resnet21') must be one of"),
        ("--config.init_from=/no/such", "config.init_from (='/no/such') does not exist"),
        ("--config.data.batch_size=400", "config.data.batch_size (=400) must be at most"),
        ("--config.mesh.data=3", "must multiply to the number of devices"),
        ("--mode=trane", "<train|eval|export>"),
        ("--mode=eval", "has no checkpoint to evaluate"),
        ("--wrkdir=x", "Unknown command line flag 'wrkdir'"),
        ("stray", "unexpected arguments: stray"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    argument, message, light_config_file, tmp_path, run_main
):
    workdir = tmp_path / "run"
    process = run_main(f"--config={light_config_file}", f"--workdir={workdir}", *argument.split())
    assert process.returncode == 1
    assert message in process.stderr
    assert "Traceback" not in process.stderr + process.stdout
    assert not workdir.exists()


def test_a_workdir_that_cannot_be_written_is_named(light_config_file, tmp_path, run_main):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "run"
    process = run_main(f"--config={light_config_file}", f"--workdir={workdir}")
    assert process.returncode == 1
    assert str(workdir) in process.stderr
    assert "Traceback" not in process.stderr


def test_a_workdir_that_another_process_writes_is_refused(copy, config_file, run_main):
    before = files(copy)
    with exclusive.writing(copy):
        process = run_main(f"--config={config_file}", f"--workdir={copy}")
    assert process.returncode == 1
    assert f"is being written by process {os.getpid()} on" in process.stderr
    assert "Traceback" not in process.stderr
    assert files(copy) == before


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(
    config_file, tmp_path, run_main, finished
):
    """Files may grow to 6 kB here: logs fit, checkpoints don't."""
    workdir = tmp_path / "run"
    arguments = (f"--config={config_file}", f"--workdir={workdir}", "--config.tensorboard=False")
    limited = ("sh", "-c", 'ulimit -f 12; exec "$@"', "sh")  # In blocks of 512 bytes.
    process = run_main(*arguments, prefix=limited)
    assert process.returncode == 1
    # Orbax's own threads may complain on stderr besides.
    assert f"error: cannot write a checkpoint to {workdir}" in " ".join(process.stderr.split())
    assert not (workdir / "result.json").exists()
    # With room again, the same command comes to the same end.
    process = run_main(*arguments)
    assert process.returncode == 0, process.stderr
    assert read_metrics(workdir) == read_metrics(finished[0])


def test_a_diverged_loss_ends_the_run(config_file, tmp_path, run_main):
    workdir = tmp_path / "run"
    process = run_main(
        f"--config={config_file}",
        f"--workdir={workdir}",
        "--config.float.optimizer.learning_rate=1e30",
    )
    assert process.returncode == 1
    assert "the loss of phase 'float' is" in process.stderr
    assert "learning_rate" in process.stderr


def test_it_starts_from_another_workdir(finished, config_file, tmp_path, run_main):
    workdir = tmp_path / "run"
    process = run_main(
        f"--config={config_file}",
        f"--workdir={workdir}",
        f"--config.init_from={finished[0] / 'float'}",
        "--config.phases=('quantized',)",
        "--config.quantized.total_epochs=1.0",
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((workdir / "result.json").read_text())
    floats = json.loads((finished[0] / "float" / "outcome.json").read_text())
    assert result["float_accuracy"] == floats["best_accuracy"]
