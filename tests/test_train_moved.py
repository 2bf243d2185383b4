"""A run whose directory, data, start and teacher are no longer where they were."""

import io
import json
import pathlib
import shutil

import pytest
from rich.console import Console
from small_runs import get_config, train

from uniq_jax import config as c
from uniq_jax.train import loop
from uniq_jax.train.logs import read_metrics

pytestmark = pytest.mark.usefixtures("kept_compilations")


def config_of(source):
    """A quantized phase that starts from a float run, and learns its output."""
    config = get_config()
    config.phases = ("quantized",)
    config.quantized.update(total_epochs=1.0, batch_norm_batches=0)
    config.init_from = str(source)
    config.quantized.loss.update(teacher=str(source), teacher_model="small")
    config.export.formats = "packed"
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, kept_compilations):
    """The directory of a run, and that of the float run before it."""
    root = tmp_path_factory.mktemp("trained")
    config = get_config()
    config.phases = ("float",)
    train(config, root / "float")
    train(config_of(root / "float"), root / "quantized")
    return root / "quantized", root / "float"


@pytest.fixture
def moved(trained, tmp_path):
    """A copy of the run elsewhere, as it is before its end."""
    workdir = tmp_path / "moved"
    shutil.copytree(trained[0], workdir)
    (workdir / "result.json").unlink()
    (workdir / "quantized" / "outcome.json").unlink()
    shutil.rmtree(workdir / "export")
    return workdir


def console():
    return Console(file=io.StringIO(), width=200)


def test_it_is_evaluated_and_exported(trained, moved):
    """Though nothing is there that it was trained from."""
    config = config_of("/elsewhere/float")
    config.data.update(data_dir="/elsewhere", workers=2)
    config.tensorboard = True
    spec = c.run_spec(config)
    found = loop.evaluate(spec, moved, console())
    before = json.loads((trained[0] / "result.json").read_text())
    assert found["test_accuracy"] == before["test_accuracy"]
    exported = loop.export(spec, moved, console())
    assert exported is not None
    assert exported.check.mismatches == 0
    files = [run / "export" / "model.safetensors" for run in (trained[0], moved)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_is_trained_on_where_its_data_lie_elsewhere(trained, moved):
    config = config_of(trained[1])
    config.data.update(data_dir="/elsewhere", workers=2)
    config.tensorboard = True
    assert "quantized: resumes at step 3 of 3" in train(config, moved)
    assert read_metrics(moved) == read_metrics(trained[0])
    assert json.loads((moved / "config.json").read_text())["data"]["data_dir"] == "/elsewhere"


@pytest.mark.parametrize("key", ["init_from", "quantized.loss.teacher"])
def test_it_is_not_trained_on_from_elsewhere(key, trained, moved):
    config = config_of(trained[1])
    config.update_from_flattened_dict({key: "x"})
    last = key.rpartition(".")[2]
    with pytest.raises(ValueError, match=rf"another config.*\n.*{last}: '.*' there, 'x' now"):
        train(config, moved)


@pytest.mark.parametrize(
    ("key", "value"), [("log_every_steps", 2), ("quantized.loss.teacher_weight", 0.5), ("seed", 1)]
)
def test_what_it_is_may_not_change(key, value, trained, moved):
    config = config_of(trained[1])
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"{key.rpartition('.')[2]}: .* there, {value} now"):
        loop.evaluate(c.run_spec(config), pathlib.Path(moved), console())
