"""Runs that learn from a teacher, through the command."""

import json
import shutil

import pytest

from uniq_jax.train.checkpoints import read_model
from uniq_jax.train.logs import read_metrics

CONFIG = """
from uniq_jax import config as c
from uniq_jax import recipes

def get_config(arg=None):
    args = recipes.arguments(arg, bits=2, method="n2uq")
    config = c.base()
    config.data.batch_size = 32
    config.data.train_split = "train[:320]"
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.checkpoint_every_steps = 8
    config.log_every_steps = 1
    config.export.formats = ""
    if not args.teacher:
        config.phases = ("float",)
        config.float = c.phase("float", total_epochs=args.epochs)
        return config
    recipes.add_phases(config, args, calibration_batches=0)
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)
    return path


# What else a phase may be told, so that it is resumed too.
OPTIONS = (
    "--config.quantized.batch_norm_batches=2",
    "--config.quantized.ema_decay=0.8",
    "--config.quantized.loss.mixup_alpha=0.2",
    "--config.quantized.loss.teacher_weight=0.7",
    "--config.quantized.optimizer.quantizer_freeze_fraction=0.3",
)


@pytest.fixture
def runs(config_file, tmp_path, run_main):
    """A float network, and one of two bits that learned its output: both directories."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for workdir, arg, options in (
        (teacher, "epochs=2", ()),
        (student, f"epochs=2,teacher={teacher}", OPTIONS),
    ):
        process = run_main(f"--config={config_file}:{arg}", f"--workdir={workdir}", *options)
        assert process.returncode == 0, process.stderr
    return teacher, student


def test_a_run_learns_from_a_workdir_and_resumes_bit_for_bit(runs, config_file, tmp_path, run_main):
    teacher, student = runs
    config = json.loads((student / "config.json").read_text())
    assert config["phases"][0]["loss"]["teacher"] == str(teacher)
    assert config["phases"][0]["loss"]["teacher_options"] == {"width": 4}
    records = [r["loss"] for r in read_metrics(student) if "loss" in r]
    assert len(records) == 20
    assert records[-1] < records[0]
    # As if it had been killed between its last two checkpoints.
    resumed = tmp_path / "resumed"
    shutil.copytree(student, resumed)
    (resumed / "result.json").unlink()
    (resumed / "quantized" / "outcome.json").unlink()
    shutil.rmtree(resumed / "quantized" / "checkpoints" / "20")
    arg = f"epochs=2,teacher={teacher}"
    process = run_main(f"--config={config_file}:{arg}", f"--workdir={resumed}", *OPTIONS)
    assert process.returncode == 0, process.stderr
    assert "quantized: estimates batch-norm statistics on 2 batches" in process.stdout
    assert "quantized: resumes at step 16 of 20" in process.stdout
    assert read_metrics(resumed) == read_metrics(student)
    arrays = [read_model(d / "quantized" / "checkpoints") for d in (student, resumed)]
    assert arrays[0].keys() == arrays[1].keys()
    for path in arrays[0]:
        assert arrays[0][path].tobytes() == arrays[1][path].tobytes(), path
    # The teacher is in no checkpoint.
    assert not [path for path in arrays[0] if "teacher" in path]
    # The network with averaged weights and new statistics is the one that is evaluated.
    process = run_main(
        f"--config={config_file}:{arg}", f"--workdir={student}", *OPTIONS, "--mode=eval"
    )
    accuracy = json.loads((student / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy {100 * accuracy:.2f}%" in process.stdout
    # A low-bit network is no teacher; nothing is written.
    workdir = tmp_path / "refused"
    arg = f"epochs=2,teacher={student}"
    process = run_main(f"--config={config_file}:{arg}", f"--workdir={workdir}")
    assert process.returncode == 1
    assert "must be a float network, but it has" in process.stderr
    assert "Traceback" not in process.stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("teacher=/no/such",), "config.quantized.loss.teacher (='/no/such') does not exist"),
        (("teacher=x,teacher_model=resnet9",), "loss.teacher_model: name (='resnet9') must be"),
        (
            ("teacher=x", "--config.quantized.loss.label_smoothing=0.1"),
            "config.quantized.loss.label_smoothing (=0.1) must be 0 where",
        ),
        (("teacher=x", "--config.quantized.loss.teachr=y"), "loss.teachr is no known key"),
    ],
)
def test_a_bad_teacher_is_named_and_nothing_is_written(
    arguments, message, config_file, tmp_path, run_main
):
    workdir = tmp_path / "run"
    first, *others = arguments
    process = run_main(f"--config={config_file}:{first}", f"--workdir={workdir}", *others)
    assert process.returncode == 1
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert not workdir.exists()
