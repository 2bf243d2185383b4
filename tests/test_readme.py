"""Every Python block of README and docs runs, one after another, and the commands exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python" in path.read_text()
]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, capsys, tmp_path, monkeypatch):
    text = (ROOT / page).read_text()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
        assert capsys.readouterr().out in text


def test_make_targets_and_files_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z-]+)`", text))
    assert named
    assert named <= targets
    linked = re.findall(r"\]\((\w+\.md)\)", text)
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    configs = re.findall(r"\bconfigs/\w+\.py", text + pages)
    assert len(linked) > 2
    assert len(configs) > 3
    assert [path for path in {*linked, *configs} if not (ROOT / path).exists()] == []
