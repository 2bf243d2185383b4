"""Times things alternately, and keeps what was found beside its goal.

What is compared runs in turns, in one process, so that other work on the machine meets all of it. A
ratio is the median of the ratios of the turns; its spread are their quartiles.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from table import line, markdown

RESULTS = pathlib.Path(__file__).parent / "results.json"


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call of each function, a number for each turn."""

    seconds: Mapping[str, np.ndarray]

    def median(self, name: str) -> float:
        """Seconds of a call."""
        return float(np.median(self.seconds[name]))

    def quartiles(self, name: str) -> tuple[float, float]:
        """Of the seconds of a call, over all turns."""
        low, high = np.percentile(self.seconds[name], (25, 75))
        return float(low), float(high)

    def ratio(self, slow: str, fast: str) -> tuple[float, tuple[float, float]]:
        """How many times as long `slow` takes: the median of all turns, and their quartiles."""
        ratios = self.seconds[slow] / self.seconds[fast]
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        return float(middle), (float(low), float(high))


def alternately(
    functions: Mapping[str, Callable[[], object]], *, turns: int = 15, least_seconds: float = 0.05
) -> Times:
    """Times functions in turns, after each has run twice.

    Args:
      functions: by name; each returns when its work is done.
      turns: of all of them.
      least_seconds: a function is called as often in a turn as it takes to last so long.
    """
    calls = {}
    for name, function in functions.items():
        function()
        once = _seconds(function, 1)
        calls[name] = max(1, round(least_seconds / once))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns):
        names = list(functions) if turn % 2 == 0 else list(functions)[::-1]
        for name in names:
            found[name].append(_seconds(functions[name], calls[name]))
    return Times({name: np.asarray(seconds) for name, seconds in found.items()})


def _seconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


@dataclasses.dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
      name: of the figure, the same in every run.
      value: what was measured.
      unit: of the value; "ratio" for a ratio of two times.
      goal: what the value should at least be (`least`), or at most; None without one.
      least: which of the two.
      spread: quartiles of the value over the turns; () where it was not timed.
      detail: what was compared, for people.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    least: bool = True
    spread: tuple[float, ...] = ()
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.least else self.value <= self.goal


def machine() -> str:
    """The processor, how many cores this process has, and the versions that figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        processor = fields.get("model name", processor)
        known = [
            flag for flag in ("avx2", "avx512f", "avx512_vnni") if flag in fields.get("flags", "")
        ]
        processor += f" ({', '.join(known)})" if known else ""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    return f"{processor}, {cores} {'core' if cores == 1 else 'cores'}, {', '.join(versions)}"


def keep(results: Iterable[Result], path: pathlib.Path = RESULTS) -> None:
    """Prints figures, and puts them in place of those of the same names in a file of results.

    The same figures, as a table, are beside it in a file that ends in ".md".
    """
    results = list(results)
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    about = machine()
    new = {
        result.name: {**dataclasses.asdict(result), "met": result.met, "machine": about}
        for result in results
    }
    rows = [new.pop(row["name"], row) for row in rows] + list(new.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {path: json.dumps(rows, indent=1) + "\n", path.with_suffix(".md"): markdown(rows)}
    partial = {place: place.with_name(f"{place.name}.partial") for place in texts}
    for place, text in texts.items():
        partial[place].write_text(text, encoding="utf-8")
    for place in texts:  # Only now that both are whole.
        partial[place].replace(place)
    for result in results:
        print(line(dataclasses.asdict(result) | {"met": result.met}), flush=True)
