"""The examples run, with few steps, and say what they should."""

import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"

# File, arguments, and what it prints.
RUNS = [
    ("plain_jax.py", ["--steps=3"], "codes of the first kernel: ["),
    ("nnx_own_loop.py", ["--steps=2"], "mismatching codes: 0 of "),
    ("linen_model.py", ["--steps=3"], "2 bits, trained: "),
    ("export_onnx.py", [], "mismatching codes: 0 of "),
]


@pytest.mark.parametrize(("file", "arguments", "expected"), RUNS)
def test_an_example_runs(file, arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    runpy.run_path(str(EXAMPLES / file), run_name="__main__")
    assert expected in capsys.readouterr().out


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {file for file, *_ in RUNS}
