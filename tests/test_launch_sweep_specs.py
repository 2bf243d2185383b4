"""Sweeps over a workdir whose runs are finished: by their own config, or by another one."""

import importlib.util
import pathlib
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"

CONFIG = """
from uniq_jax import config as c

def get_config(arg=None):
    args = c.parse_arg(arg, seed=0, epochs=1.0, phase="float")
    config = c.base()
    config.seed = args.seed
    config.phases = (args.phase,)
    config[args.phase] = c.phase("float", total_epochs=args.epochs)
    return config

def sweep(add):
    add(seed=1)
    add(**{"seed": 2, "float.optimizer.name": "adam"})
"""

# In place of `python -m uniq_jax.main`: writes a result, and the config that it was given.
FAKE = f"""#!{sys.executable}
import json, os, pathlib, sys
from absl import flags
from ml_collections import config_flags
from uniq_jax.config import run_spec
from uniq_jax.spec import to_json

words = sys.argv[2:]
values = flags.FlagValues()
flags.DEFINE_string("workdir", None, "", flag_values=values)
config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
values(words)
workdir = pathlib.Path(values["workdir"].value)
workdir.mkdir(parents=True)
(workdir / "config.json").write_text(json.dumps(to_json(run_spec(values["config"].value))))
(workdir / "result.json").write_text('{{"test_accuracy": 0.5}}')
"""


def load_sweep():
    spec = importlib.util.spec_from_file_location("launch_sweep", LAUNCH / "sweep.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LAUNCH)  # As it is for a script.
        spec.loader.exec_module(module)
    return module


sweep = load_sweep()


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """A config file, and a directory in which its sweep was run by `CONFIG:epochs=2 -- …`."""
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    monkeypatch.setenv("PYTHONPATH", str(LAUNCH.parent))
    assert sweep.main(arguments(tmp_path, "--", "--config.data.batch_size=64")) == 0
    (tmp_path / "python").write_text("#!/bin/sh\nexit 9\n")  # Nothing more is to be run.
    return tmp_path


def arguments(swept, *more, arg=":epochs=2"):
    return [f"--config={swept / 'small.py'}{arg}", f"--workdir={swept / 'runs'}", *more]


SAME = ("--", "--distributed", "off", "--config.data.batch_size=64")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (SAME, ": finished\n"),
        ((*SAME, "--config.mesh.model=1", "--config.memory_limit_gib=3.0"), ": finished\n"),
        ((*SAME, "--config.export.batch=2", "--config.data.data_dir=/elsewhere"), ": finished\n"),
        (("--collect", *SAME), "50.00%"),
        (("--dry-run", *SAME), "# finished: it is skipped\n"),
    ],
)
def test_finished_runs_of_the_same_config_are_skipped(more, word, swept, capfd):
    capfd.readouterr()
    assert sweep.main(arguments(swept, *more)) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.count(word) == 2


@pytest.mark.parametrize("mode", ["", "--collect", "--dry-run", "--slurm=array.sh"])
@pytest.mark.parametrize(
    ("arg", "more", "message"),
    [
        (":epochs=2", ("--config.data.batch_size=32",), "config.data.batch_size: 64 there, 32 now"),
        (":epochs=2", (), "config.data.batch_size: 64 there, 128 now"),
        ("", SAME[1:], "config.phases[0].total_epochs: 2.0 there, 1.0 now"),
    ],
)
def test_finished_runs_of_another_config_are_an_error(
    arg, more, message, mode, swept, capsys, monkeypatch
):
    monkeypatch.chdir(swept)
    before = (swept / "runs" / "sweep.csv").read_bytes()
    capsys.readouterr()
    options = filter(None, [mode, "--", *more])
    assert sweep.main(arguments(swept, *options, arg=arg)) == 2
    output = capsys.readouterr()
    assert "run seed=1 is finished, but by another config" in output.err
    assert message in output.err
    assert output.out == ""
    assert (swept / "runs" / "sweep.csv").read_bytes() == before
    assert not (swept / "array.sh").exists()


def test_another_base_config_is_another_run(swept, capsys):
    (swept / "small.py").write_text(
        CONFIG.replace("c.base()", "c.base(); config.data.pad_pixels=1")
    )
    assert sweep.main(arguments(swept, *SAME)) == 2
    assert "config.data.pad_pixels: 4 there, 1 now" in capsys.readouterr().err


def test_what_has_no_result_or_no_config_is_not_compared(swept, capsys):
    (swept / "runs" / "seed=1" / "result.json").unlink()
    (swept / "runs" / "seed=2,float.optimizer.name=adam" / "config.json").unlink()
    assert sweep.main(arguments(swept, "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.endswith("# finished: it is skipped") for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("arg", "more", "message"),
    [
        (
            ":phase=w4a4",
            (),
            "run seed=2,float.optimizer.name=adam: config.float is no known key of the config; "
            "there are checkpoint_every_steps, ",
        ),
        ("", ("--config.data.batch_sise=3",), "config.data.batch_sise is no known key"),
        ("", ("--config.seed.x=3",), "config.seed.x is no known key of the config"),
        ("", ("--config.data.batch_size=0",), "config.data.batch_size (=0) must be at least 1"),
        ("", ("--config=other.py",), "Overriding config is not allowed"),
    ],
)
def test_a_wrong_argument_is_named(arg, more, message, tmp_path, capsys):
    (tmp_path / "small.py").write_text(CONFIG)
    assert sweep.main(arguments(tmp_path, "--", *more, arg=arg)) == 2
    assert message in capsys.readouterr().err
