"""What a run says of what it ran on."""

import json
import platform
import subprocess

import jax
import pytest

from uniq_jax.train import environment


def test_the_first_environment_stays_and_a_change_is_noted(tmp_path, monkeypatch):
    path = tmp_path / environment.ENVIRONMENT_FILE
    environment.record(tmp_path, "first")
    written = json.loads(path.read_text())
    assert written["started"] == "first"
    assert written["environment"]["jax"] == jax.__version__
    assert written["environment"]["devices"].startswith("1 x ")
    assert written["changes"] == []
    # The same again says nothing new; and no more does the same after a change.
    before = path.read_bytes()
    environment.record(tmp_path, "second")
    assert path.read_bytes() == before
    monkeypatch.setattr(platform, "python_version", lambda: "9.9.9")
    for started in ("third", "fourth"):
        environment.record(tmp_path, started)
    written = json.loads(path.read_text())
    assert [change["started"] for change in written["changes"]] == ["third"]
    assert written["changes"][0]["environment"]["python"] == "9.9.9"
    assert written["environment"]["python"] != "9.9.9"
    monkeypatch.undo()
    environment.record(tmp_path, "fifth")
    assert len(json.loads(path.read_text())["changes"]) == 2


def test_it_names_no_machine():
    text = json.dumps(environment.environment())
    assert platform.node() not in text or len(platform.node()) < 4


def test_a_damaged_file_is_written_anew(tmp_path):
    (tmp_path / environment.ENVIRONMENT_FILE).write_text("{")
    environment.record(tmp_path, "now")
    written = json.loads((tmp_path / environment.ENVIRONMENT_FILE).read_text())
    assert written["started"] == "now"


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    git("init", "--quiet")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    return package, git


def test_the_commit_of_tracked_code(repository):
    package, git = repository
    assert environment.commit(package) == ""  # Not tracked: not that repository's code.
    git("add", ".")
    git("commit", "--quiet", "-m", "a")
    assert environment.commit(package) == git("rev-parse", "HEAD")
    (package / "notes.txt").write_text("untracked")
    assert environment.commit(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = True")
    assert environment.commit(package) == git("rev-parse", "HEAD") + "-dirty"


def test_without_git_there_is_no_commit(repository, monkeypatch):
    package, _ = repository
    monkeypatch.setenv("PATH", "")
    assert environment.commit(package) == ""
