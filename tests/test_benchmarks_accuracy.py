"""Runs that are trained, kept, and made a table of; and what `results/` and README say of them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS, accuracy, accuracy_runs

ROOT = BENCHMARKS.parent
KEPT = sorted(path.parent for path in (ROOT / "results").glob("*/frozen.json"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compilation):
    """A finished run of a few steps."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    arguments = ["--config=configs/cifar10_resnet20_w2a2.py:smoke=True", f"--workdir={workdir}"]
    subprocess.run(
        [sys.executable, "-m", "uniq_jax.main", *arguments, "--config.export.formats="],
        check=True,
        cwd=ROOT,
        env={**os.environ, **quick_compilation},
        capture_output=True,
    )
    return workdir


@pytest.fixture(scope="module")
def results(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    accuracy.keep(run, directory)
    return directory


def test_a_kept_run_has_the_same_accuracy_as_integers(run, results):
    kept = accuracy.Kept.read(results / "small")
    trained = json.loads((run / "result.json").read_text())
    assert kept.result == {key: value for key, value in trained.items() if key != "files"}
    metrics = (results / "small" / "metrics.jsonl").read_text().splitlines()
    assert any("test_accuracy" in json.loads(line) for line in metrics)
    assert not any("layers" in json.loads(line) for line in metrics)
    found = kept.frozen
    assert found["accuracy"] == found["integer_accuracy"] == trained["test_accuracy"]
    assert (found["class_mismatches"], found["mismatching_codes"], found["images"]) == (0, 0, 64)
    assert found["file_bytes"] == (run / "export" / "model.safetensors").stat().st_size
    assert min(found["float_ms"], found["integer_ms"]) > 0


def test_an_unfinished_run_is_not_kept(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        accuracy.keep(tmp_path, tmp_path / "results")


def _with(kept, seed, share):
    result = {**kept.result, "seed": seed}
    config = {**kept.config, "seed": seed}
    frozen = {**kept.frozen, "accuracy": share, "integer_accuracy": share}
    return accuracy.Kept(f"small_s{seed}", config, result, kept.devices, frozen)


def test_seeds_share_a_row(results):
    kept = accuracy.Kept.read(results / "small")
    *_, row = accuracy.rows([_with(kept, 0, 0.5), _with(kept, 1, 0.625)])
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1:7] == ["digits, resnet20", "W2A2", "uniq", "float", "labels", "1"]
    assert cells[7] == "2"
    assert [cells[9], cells[11]] == ["**56.25% (50.00 to 62.50)**", "the same classes"]


def test_a_row_says_what_its_runs_start_from():
    kept = accuracy.Kept.read(ROOT / "results" / "cifar10_uniq_w3a3_soft_teacher_s0")
    *_, row = accuracy.rows([kept])
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:5] == ["W3A3", "uniq", "uniq W4A4"]
    assert kept.result["float_accuracy"] is None
    assert cells[8:11] == ["91.30%", "**91.26%**", "-0.04"]


def test_an_integer_network_that_differs_is_said_to(results):
    kept = _with(accuracy.Kept.read(results / "small"), 0, 0.5)
    *_, row = accuracy.rows([kept, _with(kept, 1, 0.5)])
    assert "the same classes" in row
    for key, value in (
        ("integer_accuracy", 0.25),
        ("class_mismatches", 1),
        ("mismatching_codes", 1),
    ):
        other = _with(kept, 1, 0.5)
        other.frozen[key] = value
        *_, row = accuracy.rows([kept, other])
        assert "**differs**" in row


def test_other_recipes_have_rows_of_their_own(results):
    kept = accuracy.Kept.read(results / "small")
    other = json.loads(json.dumps(kept.config))
    other["phases"][0]["optimizer"]["learning_rate"] *= 2
    changed = accuracy.Kept("b", other, kept.result, kept.devices, kept.frozen)
    moved = {**kept.config, "data": {**kept.config["data"], "data_dir": "elsewhere"}}
    same = accuracy.Kept("c", moved, kept.result, kept.devices, kept.frozen)
    assert len(accuracy.rows([kept, changed])) == 4
    assert len(accuracy.rows([kept, same])) == 3


def test_the_table_stands_between_the_marks(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{accuracy.BEGIN}\nold\n{accuracy.END}\nafter\n")
    accuracy.write_table(results, readme)
    before, *table, after = readme.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert "old" not in table
    assert any("| W2A2 |" in line for line in table)
    assert "\n".join(table[1:-1]) in (results / "README.md").read_text()
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must have"):
        accuracy.write_table(results, readme)


def test_trainings_run_side_by_side_and_end_with_a_signal(tmp_path):
    """A stand-in for `uniq_jax.main` writes what it was told, and waits for its end."""
    (tmp_path / "uniq_jax").mkdir()
    (tmp_path / "uniq_jax" / "__init__.py").touch()
    (tmp_path / "uniq_jax" / "main.py").write_text(
        "import json, pathlib, signal, sys, time\n"
        "workdir = pathlib.Path(sys.argv[-1].removeprefix('--workdir='))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "(workdir / 'began').touch()\n"
        "if workdir.name == 'a':\n"
        "    (workdir / 'result.json').write_text(json.dumps({'test_accuracy': 0.5}))\n"
        "else:\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import accuracy_runs\n"
        "accuracy_runs.RUNS = dict.fromkeys('abcd', [])\n"
        "sys.exit(accuracy_runs.train('abcd', jobs=2))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", str(script)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    lines = [process.stdout.readline() for _ in range(4)]
    while not (tmp_path / "runs/results/c/began").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    lines += process.communicate(timeout=30)[0].splitlines(keepends=True)
    assert process.returncode == 3
    assert "a: 50.00%\n" in lines
    assert "b: ended with exit status 75\n" in lines
    assert "c: ended with exit status 75\n" in lines
    assert not (tmp_path / "runs/results/d").exists()


def test_a_run_waits_for_what_it_starts_from(monkeypatch, tmp_path, capsys):
    """It begins after that has finished, not where it failed, and not after a signal."""
    monkeypatch.chdir(tmp_path)
    begins = f"--config.init_from={accuracy_runs.WORKDIRS}"
    runs = {"a": [f"{begins}/b"], "b": [f"{begins}/c"], "c": ["--config.init_from=float.npz"]}
    monkeypatch.setattr(accuracy_runs, "RUNS", runs)
    began = []
    statuses = {"a": 0, "b": 0, "c": 0}

    def run_all(commands, **options):
        for name in commands:
            began.append(name)
            if statuses[name] == 0:
                (accuracy_runs.WORKDIRS / name).mkdir(parents=True)
                (accuracy_runs.WORKDIRS / name / "result.json").touch()
        return {name: statuses[name] for name in commands}

    monkeypatch.setattr(accuracy_runs, "run_all", run_all)
    assert accuracy_runs.train(["a"], 1) == 1
    assert "a: not trained, as what it starts from, b, has not finished" in capsys.readouterr().out
    statuses["b"] = 1
    assert accuracy_runs.train(["a", "b", "c"], 1) == 2
    assert began == ["c", "b"]
    statuses["b"] = 75
    assert accuracy_runs.train(["b", "a"], 1) == 2
    statuses["b"] = 0
    assert accuracy_runs.train(["a", "b"], 1) == 0
    assert began == ["c", "b", "b", "b", "a"]


# Of ml_collections, which imports config files.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_runs_are_ones_that_main_takes():
    """Each config can be had, is told only what it knows, and is that of what was kept."""
    from absl import flags
    from ml_collections import config_flags

    from uniq_jax import config as c
    from uniq_jax.spec import differences, to_json

    for name, arguments in accuracy_runs.RUNS.items():
        values = flags.FlagValues()
        command = [name, *(a.replace("configs/", f"{ROOT}/configs/", 1) for a in arguments)]
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
        values(command)
        spec = c.run_spec(holder.value)
        assert f"w{spec.phases[-1].weight_bits}a{spec.phases[-1].activation_bits}" in name
        assert name.endswith(f"_s{spec.seed}")
        assert name.startswith(spec.data.name)
        assert ("teacher" in name) == bool(spec.phases[-1].loss.teacher)
        kept = ROOT / "results" / name / "config.json"
        assert kept.is_file(), f"{name} has no results; or is not to be a run"
        # The table is of these runs: how often one logs and saves is all that may differ.
        then, now = json.loads(kept.read_text()), to_json(spec)
        for key in ("data", "model", "phases", "init_from", "seed"):
            assert differences(then[key], now[key], f"{name}: {key}") == []


def test_readme_has_the_table_of_the_results(tmp_path):
    readme = tmp_path / "README.md"
    shutil.copyfile(ROOT / "README.md", readme)
    copy = tmp_path / "results"
    shutil.copytree(ROOT / "results", copy)
    accuracy.write_table(copy, readme)
    hint = "run `python benchmarks/accuracy.py table`"
    assert readme.read_text() == (ROOT / "README.md").read_text(), hint
    assert (copy / "README.md").read_text() == (ROOT / "results" / "README.md").read_text(), hint


@pytest.mark.parametrize("directory", KEPT, ids=lambda path: path.name)
def test_what_is_kept_holds_together(directory):
    kept = accuracy.Kept.read(directory)
    assert kept.frozen["mismatching_codes"] == kept.frozen["class_mismatches"] == 0
    assert kept.frozen["accuracy"] == kept.frozen["integer_accuracy"]
    # What was trained elsewhere may have other bits there. A GPU rounded the float stems of these
    # networks to ten bits, which is why float layers of quantized networks don't let it any more.
    assert abs(kept.frozen["accuracy"] - kept.result["test_accuracy"]) < 0.01
    assert kept.name.endswith(f"_s{kept.config['seed']}")
    for path in directory.iterdir():
        assert path.stat().st_size < 50_000, path
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path
