"""Progress of a training phase: a live bar on a terminal, plain lines elsewhere."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

# A terminal is redrawn no more often than this; between redraws an update only looks at the clock.
_REDRAW_INTERVAL_S = 0.25

# The window of the rate: so many marks, each this long or one update after the one before.
_MARK_INTERVAL_S = 0.5
_WINDOW_MARKS = 32


class Progress:
    """Shows how far a training phase is, how fast it runs and when it will end.

    On an interactive terminal this is one line that redraws itself at most four times a second;
    elsewhere (a file, a pipe, a notebook) plain lines such as

        quantized  epoch 3/40  step 36/480  loss 0.1234  acc 98.1%  5230 img/s  ETA 0:12

    one for the first update, then one every `plain_interval_s` at most, and one for the last
    update. The rate is that of the last 16 seconds or 32 updates, whichever is longer, and counts
    all time that passed, evaluation included. What precedes the first update (compilation) does not
    count; rate and ETA are dashes until there is a second update.

    Args:
        console: where to write.
        total_steps: steps of the phase.
        start_step: steps that were done before, where a run resumes.
        steps_per_epoch: steps of an epoch.
        batch_size: images of a step.
        description: name of the phase.
        plain_interval_s: least time between two plain lines.
        clock: returns a time in seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        total_steps: int,
        start_step: int,
        steps_per_epoch: int,
        batch_size: int,
        description: str,
        plain_interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        if not 0 <= start_step <= total_steps:
            raise ValueError(
                f"start_step must lie in 0 .. total_steps = {total_steps}, got {start_step}"
            )
        self._console = console
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._description = description
        self._clock = clock
        self._latest: tuple[int, Any, Any] = (start_step, None, None)
        self._latest_s = -math.inf
        self._shown_step = start_step
        self._shown_time_s = -math.inf
        self._marks: deque[tuple[float, int]] = deque(maxlen=_WINDOW_MARKS)
        self._bar = _make_bar(console) if console.is_interactive else None
        self._interval_s = plain_interval_s if self._bar is None else _REDRAW_INTERVAL_S
        if self._bar is not None:
            head, tail = self._texts()
            self._task = self._bar.add_task(
                "", total=total_steps, completed=start_step, head=head, tail=tail
            )

    def update(self, step: int, *, loss: Any, accuracy: Any) -> None:
        """Reports a finished step.

        Args:
            step: steps done so far, the ones before a resume included.
            loss: a number or an array scalar, read only when it is shown.
            accuracy: fraction of the batch that is right, in 0 .. 1; read only when it is shown.
        """
        now_s = self._clock()
        self._latest = (step, loss, accuracy)
        self._latest_s = now_s
        if not self._marks or now_s - self._marks[-1][0] >= _MARK_INTERVAL_S:
            self._marks.append((now_s, step))
        if now_s - self._shown_time_s >= self._interval_s:
            self._show(now_s)

    def note(self, message: str) -> None:
        """Prints a line above the bar."""
        say(self._console, message)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._latest[0] != self._shown_step:
            self._show(self._clock())
        if self._bar is not None:
            self._bar.stop()

    def _show(self, now_s: float) -> None:
        self._shown_time_s = now_s
        self._shown_step = self._latest[0]
        head, tail = self._texts()
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self._shown_step, head=head, tail=tail, refresh=True
            )
        else:
            self.note(f"{head}  step {self._shown_step}/{self._total_steps}  {tail}")

    def _texts(self) -> tuple[str, str]:
        """The texts on both sides of the bar."""
        step, loss, accuracy = self._latest
        # Step s is the last one of an epoch when s is a multiple of steps_per_epoch.
        epoch = max(1, math.ceil(step / self._steps_per_epoch))
        epochs = max(1, math.ceil(self._total_steps / self._steps_per_epoch))
        head = f"{self._description}  epoch {epoch}/{epochs}"
        if loss is None:
            return head, "compiling the first step"
        rate = self._steps_per_second()
        images = "-" if rate is None else _short_number(rate * self._batch_size)
        eta = "-" if rate is None else _duration(max(0, self._total_steps - step) / rate)
        tail = (
            f"loss {float(loss):.4f}  acc {100 * float(accuracy):.1f}%  {images} img/s  ETA {eta}"
        )
        return head, tail

    def _steps_per_second(self) -> float | None:
        """Rate since the oldest mark, or None where it is not known."""
        first_s, first_step = self._marks[0]
        steps, elapsed_s = self._latest[0] - first_step, self._latest_s - first_s
        return steps / elapsed_s if steps > 0 and elapsed_s > 0 else None


def say(console: Console, message: str) -> None:
    """Prints a line as it is: paths in it are neither folded nor taken for markup."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def _make_bar(console: Console) -> RichProgress:
    # Without a thread of its own the bar draws only in `update`. The texts never wrap, the bar
    # takes what is left of the line.
    return RichProgress(
        TextColumn("{task.fields[head]}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[tail]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        auto_refresh=False,
        expand=True,
    )


def _short_number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _duration(duration_s: float) -> str:
    """H:MM:SS, or M:SS under an hour."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
