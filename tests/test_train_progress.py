"""Tests of uniq_jax.train.progress; the clock is a variable, nothing sleeps."""

import io
import re

import pytest
from rich.console import Console

from uniq_jax.train.progress import Progress


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    # rich asks the environment for a width and whether a terminal can move its cursor.
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class Loss:
    """An array scalar that counts how often it is read."""

    def __init__(self):
        self.reads = 0

    def __float__(self):
        self.reads += 1
        return 0.5


def _plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def _terminal(width=80):
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        force_interactive=True,
        color_system=None,
        width=width,
        legacy_windows=False,
    )


def _frames(console):
    """What a terminal showed, one entry per drawn or printed line."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _progress(console, clock, **changes):
    arguments = {
        "total_steps": 480,
        "start_step": 0,
        "steps_per_epoch": 12,
        "batch_size": 128,
        "description": "quantized",
        "clock": clock,
    }
    return Progress(console, **(arguments | changes))


def _run(console, clock, steps, seconds_per_step, *, compile_s=8.0, **changes):
    with _progress(console, clock, **changes) as progress:
        for index, step in enumerate(steps):
            clock.now_s += seconds_per_step if index else compile_s
            progress.update(step, loss=0.1234, accuracy=0.981)
    return _frames(console)


def test_plain_line_reads_as_documented():
    # 24 ms a step at 128 images is 5333 img/s; 444 steps are left, 10.7 s.
    lines = _run(_plain_console(), Clock(), range(1, 37), 0.024)
    assert lines == [
        "quantized  epoch 1/40  step 1/480  loss 0.1234  acc 98.1%  - img/s  ETA -",
        "quantized  epoch 3/40  step 36/480  loss 0.1234  acc 98.1%  5333 img/s  ETA 0:11",
    ]


def test_plain_lines_are_at_least_an_interval_apart_and_the_last_one_is_there():
    lines = _run(_plain_console(), Clock(), range(1, 481), 0.25, plain_interval_s=10.0)
    steps = [int(re.search(r"step (\d+)/480", line).group(1)) for line in lines]  # type: ignore[union-attr]
    assert steps == [*range(1, 481, 40), 480]


def test_the_last_line_is_not_printed_twice():
    lines = _run(_plain_console(), Clock(), range(1, 42), 0.25)
    assert [line.split("  ")[2] for line in lines] == ["step 1/480", "step 41/480"]


def test_a_long_plain_line_is_not_wrapped():
    lines = _run(_plain_console(), Clock(), [1], 1.0, description="q" * 100)
    assert len(lines) == 1
    assert lines[0].endswith("ETA -")


def test_rate_leaves_out_compilation():
    fast = _run(_plain_console(), Clock(), range(1, 20), 0.1, compile_s=0.1)
    slow = _run(_plain_console(), Clock(), range(1, 20), 0.1, compile_s=1000.0)
    assert fast == slow
    assert "  1280 img/s  ETA 0:46" in fast[-1]


def test_rate_follows_a_moving_window():
    clock = Clock()
    console = _plain_console()
    with _progress(console, clock, total_steps=2000) as progress:
        for step in range(1, 2001):
            clock.now_s += 0.1 if step <= 1000 else 0.05
            progress.update(step, loss=1.0, accuracy=0.5)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) img/s", "\n".join(_frames(console)))]
    assert rates[0] == 1280
    # 1000 steps at each rate: over the whole run the mean would be 1707.
    assert rates[-1] == 2560
    assert rates == sorted(rates)


def test_eta_of_a_resumed_run_counts_only_new_steps():
    lines = _run(_plain_console(), Clock(), range(401, 441), 1.0, start_step=400)
    assert lines[0].endswith("epoch 34/40  step 401/480  loss 0.1234  acc 98.1%  - img/s  ETA -")
    assert lines[-1].endswith("step 440/480  loss 0.1234  acc 98.1%  128 img/s  ETA 0:40")


def test_eta_in_hours_and_small_rates():
    lines = _run(
        _plain_console(), Clock(), [1, 2], 60.0, batch_size=1, total_steps=200, plain_interval_s=1
    )
    assert lines[-1].endswith("  0.0 img/s  ETA 3:18:00")


def test_a_clock_that_stands_still_gives_no_rate():
    lines = _run(_plain_console(), Clock(), [1, 2, 3], 0.0)
    assert lines[-1].endswith("step 3/480  loss 0.1234  acc 98.1%  - img/s  ETA -")


def test_finished_and_empty_runs_print_nothing():
    assert _run(_plain_console(), Clock(), [], 1.0, start_step=480) == []
    assert _run(_plain_console(), Clock(), [], 1.0, total_steps=0) == []


def test_the_last_state_is_shown_when_training_fails():
    console = _plain_console()
    clock = Clock()
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        _progress(console, clock) as progress,
    ):
        progress.update(1, loss=1.0, accuracy=0.5)
        progress.update(2, loss=float("nan"), accuracy=0.5)
        raise ZeroDivisionError
    assert "step 2/480  loss nan" in _frames(console)[-1]


def test_bar_on_a_terminal():
    console = _terminal()
    clock = Clock()
    with _progress(console, clock) as progress:
        clock.now_s += 8
        for step in range(1, 481):
            clock.now_s += 0.024
            progress.update(step, loss=0.1234, accuracy=0.981)
            if step == 240:
                progress.note("test accuracy 97.78% [bold]")
    frames = _frames(console)
    assert re.fullmatch(r"quantized  epoch 1/40 [ ━]+ compiling the first step", frames[0])
    assert "test accuracy 97.78% [bold]" in frames
    assert re.fullmatch(
        r"quantized  epoch 40/40 ━+ loss 0.1234  acc 98.1%  5333 img/s  ETA 0:00", frames[-1]
    )
    assert max(map(len, frames)) == 80
    assert len([frame for frame in frames if "epoch" in frame]) > 40  # 11.5 s, four a second


def test_bar_is_redrawn_at_most_four_times_a_second_and_reads_no_loss_between():
    console = _terminal()
    clock = Clock()
    loss = Loss()
    with _progress(console, clock, total_steps=10_000) as progress:
        for step in range(1, 10_001):
            clock.now_s += 0.001
            progress.update(step, loss=loss, accuracy=0.5)
    # 10 s: 40 redraws, the first and the last one.
    assert 38 <= loss.reads <= 42
    assert len(_frames(console)) <= loss.reads + 3


def test_bar_fits_a_narrow_terminal():
    console = _terminal(width=40)
    _run(console, Clock(), range(1, 481), 0.1)
    frames = _frames(console)
    assert max(map(len, frames)) <= 40
    assert all(frame.startswith("quantized") for frame in frames), "a frame takes several lines"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
        ({"start_step": 481}, r"start_step must lie in 0 \.\. total_steps = 480, got 481"),
        ({"start_step": -1}, "got -1"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        _progress(_plain_console(), Clock(), **changes)
