"""Every Python block of the README runs, one after another, and its commands exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_python_blocks_run(capsys):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed
    assert printed in text


def test_make_targets_and_files_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z-]+)`", text))
    assert named
    assert named <= targets
    for path in re.findall(r"configs/\w+\.py|\]\((\w+\.md)\)", text):
        assert not path or (ROOT / path).exists(), path
