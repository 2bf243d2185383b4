"""What benchmarks make of times, and how they keep it."""

import json
import pathlib
import re

import pytest
from benchmark_scripts import BENCHMARKS, measure, table

ROOT = BENCHMARKS.parent


class Clock:
    """Stands still, but for what passes by `advance`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_things_are_timed_in_turns_and_the_ratio_is_that_of_the_turns(clock):
    order = []
    slow = iter([9, 9, 2, 4, 6, 8, 10])
    machine_load = iter([1, 1, 1, 2, 3, 4, 5])

    def run_slow():
        order.append("slow")
        clock.advance(next(slow))

    def run_fast():
        order.append("fast")
        clock.advance(next(machine_load))

    times = measure.alternately({"slow": run_slow, "fast": run_fast}, turns=5, least_seconds=0)
    # Each twice, which is not counted; then first and second, second and first, and so on.
    assert order[:4] == ["slow", "slow", "fast", "fast"]
    assert order[4:10] == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert list(times.seconds["slow"]) == [2, 4, 6, 8, 10]
    # The machine slows down, which meets both: the ratio stays.
    assert times.ratio("slow", "fast") == (2.0, (2.0, 2.0))
    assert times.median("slow") == 6.0
    assert times.quartiles("slow") == (4.0, 8.0)


def test_the_ratio_is_a_median_and_its_spread_quartiles():
    seconds = {"slow": measure.np.array([1, 2, 3, 4, 50.0]), "fast": measure.np.ones(5)}
    assert measure.Times(seconds).ratio("slow", "fast") == (3.0, (2.0, 4.0))


def test_what_is_short_is_called_often(clock):
    calls = []

    def run():
        calls.append(clock.now)
        clock.advance(0.01)

    times = measure.alternately({"short": run}, turns=3, least_seconds=0.05)
    assert len(calls) == 2 + 3 * 5
    assert times.median("short") == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("value", "goal", "least", "met"),
    [
        (2.0, 2.0, True, True),
        (1.99, 2.0, True, False),
        (1.1, 1.1, False, True),
        (1.11, 1.1, False, False),
        (1.0, None, True, None),
    ],
)
def test_a_goal_is_met_from_one_side(value, goal, least, met):
    assert measure.Result("x", value, "ratio", goal, least=least).met is met


def figures(path):
    return {row["name"]: row["value"] for row in json.loads(path.read_text())}


def test_figures_are_replaced_by_name_in_both_files(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "results.json"
    monkeypatch.setattr(measure, "machine", lambda: "an old machine")
    old = [measure.Result(name, 1.0, "ratio", 2.0, spread=(0.9, 1.2)) for name in ("a", "b")]
    measure.keep(old, path)
    assert "NOT MET" in capsys.readouterr().out
    monkeypatch.setattr(measure, "machine", lambda: "a new machine")
    measure.keep([measure.Result("a", 3.0, "ratio", 2.0), measure.Result("c", 12345.0, "s")], path)
    assert list(figures(path).items()) == [("a", 3.0), ("b", 1.0), ("c", 12345.0)]
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert rows["a"]["met"] is True
    assert rows["b"]["met"] is False
    assert rows["c"]["met"] is None
    assert [rows[name]["machine"] for name in "abc"] == [
        "a new machine",
        "an old machine",
        "a new machine",
    ]
    written = path.with_suffix(".md").read_text()
    assert written == table.markdown(rows.values())
    assert "| `a` | 3 ratio |  | ≥ 2 | yes |  | A |" in written
    assert "| `b` | 1 ratio | 0.9 to 1.2 | ≥ 2 | **no** |  | B |" in written
    assert "| `c` | 12,345 s |  |  |  |  | A |" in written
    assert "A: a new machine.  \nB: an old machine.\n" in written
    assert {file.name for file in path.parent.iterdir()} == {"results.json", "results.md"}


def test_a_write_that_ends_early_leaves_the_old_figures(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    measure.keep([measure.Result("a", 1.0, "s")], path)
    before = path.read_text(), path.with_suffix(".md").read_text()
    write = pathlib.Path.write_text

    def half(self, text, **options):
        if ".md" not in self.name:
            return write(self, text, **options)
        write(self, text[: len(text) // 2], **options)
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        measure.keep([measure.Result("a", 2.0, "s")], path)
    assert (path.read_text(), path.with_suffix(".md").read_text()) == before


def test_the_machine_is_told():
    assert re.search(r"\d+ cores?, jax \d+\..*, flax \d+\.", measure.machine())


def test_every_script_is_named_where_benchmarks_are_told_of():
    # Others are parts of these.
    scripts = {p.name for p in BENCHMARKS.glob("*.py") if "__main__" in p.read_text()}
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert set(re.findall(r"benchmarks/(\w+\.py)", page)) == scripts
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"benchmarks/(\w+\.py)", makefile)) <= scripts


def test_a_figure_without_spread_and_goal_is_a_short_line():
    row = {"name": "x", "value": 1.5, "unit": "s", "spread": [], "goal": None, "detail": "d"}
    assert table.line(row).split() == ["x", "1.5", "s", "d"]
