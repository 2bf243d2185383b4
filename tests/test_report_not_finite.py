"""The page of a run whose layers went bad: it is written, and says so."""

import json
import re

import numpy as np
import pytest
from test_report import problems, write_run

from uniq_jax import plots
from uniq_jax.plots.curves import Curve, Phase
from uniq_jax.report import write_comparison, write_report

NAN, INF = float("nan"), float("inf")


def spoil(part, value, what):
    """A part of a layer, some or all of whose numbers are not finite."""
    if what == "some":
        part["levels"][-1] = part["thresholds"][-1] = value
        return
    part["levels"] = [value] * len(part["levels"])
    part["thresholds"] = [value] * len(part["thresholds"])
    part["histogram"] |= {"low": -value, "high": value}


def spelled(value):
    """As logs write it: what is not finite as a string."""
    if isinstance(value, dict):
        return {key: spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


@pytest.mark.parametrize("what", ["some", "all"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["input", "weight"])
def test_a_page_is_written_of_layers_that_are_not_finite(tmp_path, side, value, what):
    workdir = write_run(tmp_path / "run")
    file = workdir / "quantized" / "layers.json"
    assert "not finite<" not in write_report(workdir).read_text()
    table = json.loads(file.read_text())
    # One of 8 bits, with a range in place of lines, and one of 2.
    for layer in table["layers"][:2]:
        spoil(layer[side], value, what)
        layer["numbers"]["weight_step"] = value
    file.write_text(json.dumps(spelled(table)))
    text = write_report(workdir).read_text()
    assert problems(text) == []
    drawn = [t.strip() for t in re.findall(r"<text[^>]*>([^<]*)</text>", text)]
    assert drawn.count("not finite") == 2
    assert text.count("not finite: weight_step") == 2
    assert "nan" not in "".join(re.findall(r' d="([^"]*)"', text))
    again = write_run(tmp_path / "again")
    assert problems(write_comparison([workdir, again], tmp_path / "c.html").read_text()) == []


def test_a_line_of_one_point_is_seen():
    """Or of points between two that are not finite."""
    names = ["loss", "test_loss", "test_accuracy", "learning_rate"]
    for values in ([0.5], [NAN, 0.5, NAN]):
        curve = Curve(list(range(len(values))), values)
        text = plots.overlay([("one", [("loss", curve)])], "one run")
        assert sum("--series-0" in mark for mark in re.findall(r"<use[^>]*>", text)) == 2, text
        text = plots.curves([Phase("_x$", 0, dict.fromkeys(names, curve))], "one phase")
        drawn = [t.strip() for t in re.findall(r"<text[^>]*>([^<]*)</text>", text)]
        assert {"_x$ training", "_x$ test", "_x$"} <= set(drawn)
