"""Metrics on disk: `metrics.jsonl`, the record of a run, and TensorBoard event files beside it."""

import contextlib
import json
import math
import numbers
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
EVENTS_DIRECTORY = "events"

# Kept short, so that curves appear while a run trains; the default of tensorboardX is 120.
_TENSORBOARD_FLUSH_S = 10

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Writes the metrics of a run to `WORKDIR/metrics.jsonl` and to TensorBoard.

    Each record is one line, a JSON object `{"phase": …, "step": …, NAME: VALUE, …}`. A finite
    float is written by `repr` and so reads back bit for bit; JSON has no spelling for the others,
    which become the strings `"nan"`, `"inf"` and `"-inf"` (`read_metrics` turns them back).
    A line goes to the operating system as a whole before `write` returns: a killed process loses at
    most a torn last line, which the next writer on the same directory removes.

    TensorBoard gets the scalars `PHASE/NAME` in `WORKDIR/events/PHASE`, some seconds later.

    Args:
        workdir: directory of the run; made where it is missing.
        tensorboard: whether to write TensorBoard event files too.
        enabled: False makes every method do nothing; of many processes only process 0 writes.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, tensorboard: bool = True, enabled: bool = True
    ):
        self._workdir = Path(workdir)
        self._path = self._workdir / METRICS_FILE
        self._tensorboard = tensorboard
        self._enabled = enabled
        self._file: BinaryIO | None = None
        self._events: dict[str, SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}
        if enabled:
            self._workdir.mkdir(parents=True, exist_ok=True)

    def write(self, phase: str, step: int, values: Mapping[str, float | int]) -> None:
        """Appends one record.

        Args:
            phase: name of the part of the run, such as `"float"`; also a directory name.
            step: number of training steps of this phase that the values describe.
            values: name → number. NumPy and JAX scalars are welcome.

        Raises:
            ValueError: a value is named `phase` or `step`.
            OSError: the record could not be written; the message holds the path.
        """
        reserved = {"phase", "step"} & values.keys()
        if reserved:
            raise ValueError(f"values has {sorted(reserved)}, names that every record uses itself")
        if not self._enabled:
            return
        numbers_of = {name: _plain_number(value) for name, value in values.items()}
        self._append(encode_json({"phase": phase, "step": int(step), **numbers_of}) + b"\n")
        if self._tensorboard:
            events = self._events_of(phase)
            for name, value in numbers_of.items():
                events.add_scalar(f"{phase}/{name}", value, int(step))

    def write_layers(
        self,
        phase: str,
        step: int,
        layers: Mapping[str, Mapping[str, float | int]],
        histograms: Mapping[str, tuple[Any, Any]],
    ) -> None:
        """Appends one record `{"phase": …, "step": …, "layers": {PATH: {NAME: VALUE, …}, …}}`.

        TensorBoard gets a group of scalars, and the histograms, for each layer: `PHASE.PATH/NAME`
        with dots in PATH.

        Args:
            phase: as in `write`.
            step: as in `write`.
            layers: by path ("layer1/0/conv1"), name → number.
            histograms: by path and name ("layer1/0/conv1/weight"), the edges of the bins and the
                counts; for TensorBoard alone.

        Raises:
            OSError: the record could not be written; the message holds the path.
        """
        if not self._enabled:
            return
        record = {"phase": phase, "step": int(step), "layers": layers}
        self._append(encode_json(record) + b"\n")
        if not self._tensorboard:
            return
        events = self._events_of(phase)
        for path, numbers_of in layers.items():
            for name, value in numbers_of.items():
                events.add_scalar(f"{_group(phase, path)}/{name}", value, int(step))
        for path_and_name, (edges, counts) in histograms.items():
            path, _, name = path_and_name.rpartition("/")
            centres = (edges[1:] + edges[:-1]) / 2
            events.add_histogram_raw(
                f"{_group(phase, path)}/{name}",
                min=float(edges[0]),
                max=float(edges[-1]),
                num=sum(counts),
                sum=float(centres @ counts),
                sum_squares=float(centres**2 @ counts),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=list(counts),
                global_step=int(step),
            )

    def rewind(
        self, phase: str, step: int, phases: Sequence[str], *, owes_evaluation: bool = False
    ) -> None:
        """Drops what an interrupted run wrote after the checkpoint that it resumes from.

        Dropped are the records of `phase` after `step`, all records of the phases that follow it,
        and a torn last line. The file is replaced as a whole, so that a kill leaves the old one or
        the new one; the lines that stay keep their bytes. TensorBoard hides the same points as soon
        as a phase writes again.

        Args:
            phase: phase of the checkpoint.
            step: step of the checkpoint within `phase`.
            phases: all phases in their order. Records of a phase not listed here stay.
            owes_evaluation: whether that step is yet to be evaluated: an evaluation of it is
                dropped too.

        Raises:
            ValueError: `phase` is not in `phases`, or a whole line of the file is not a record.
        """
        if phase not in phases:
            raise ValueError(f"phase must be one of {list(phases)}, got {phase!r}")
        if not self._enabled:
            return
        self.close()
        later = set(phases[phases.index(phase) + 1 :])
        # TensorBoard hides the events at the purge step and after it.
        self._purge_steps = {phase: step + 1} | dict.fromkeys(later, 0)
        if not self._path.exists():
            return
        old = self._path.read_bytes()
        kept = []
        for number, line in enumerate(_whole_lines(old), start=1):
            record = _decode(line, self._path, number)
            is_redone = record["step"] > step or (
                owes_evaluation and record["step"] == step and "test_accuracy" in record
            )
            dropped = record["phase"] in later or (record["phase"] == phase and is_redone)
            if not dropped:
                kept.append(line)
        new = b"".join(kept)
        if new != old:
            _write_atomically(self._path, new)

    def close(self) -> None:
        """Closes the files. A later `write` opens them again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for events in self._events.values():
            events.close()
        self._events.clear()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        try:
            if self._file is None:
                self._file = _open_after_last_line(self._path)
            # Unbuffered, so that a write that failed is not tried again when the file is closed.
            written = self._file.write(line)
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            if self._file is not None:
                # The next write opens the file again, which removes the part that got through.
                self._file.close()
                self._file = None
            raise _with_path(error, self._path) from error

    def _events_of(self, phase: str) -> SummaryWriter:
        if phase not in self._events:
            directory = self._workdir / EVENTS_DIRECTORY / phase
            # tensorboardX names a file by the second and overwrites what has that name: a number
            # keeps a run that resumes at once from erasing the events of the one before.
            count = len(list(directory.glob("events.out.*")))
            self._events[phase] = SummaryWriter(
                str(directory),
                purge_step=self._purge_steps.pop(phase, None),
                flush_secs=_TENSORBOARD_FLUSH_S,
                filename_suffix=f".{count:05d}",
            )
        return self._events[phase]


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the records that `MetricsWriter` wrote, in their order.

    Args:
        workdir: directory of the run.

    Returns:
        One dictionary per record; the strings `"nan"`, `"inf"` and `"-inf"` are floats again. A
        torn last line, one without a line end, is left out.

    Raises:
        FileNotFoundError: there is no `metrics.jsonl` in `workdir`.
        ValueError: a whole line is not a record; the message holds the path and the line number.
    """
    path = Path(workdir) / METRICS_FILE
    lines = _whole_lines(path.read_bytes())
    return [_decode(line, path, number) for number, line in enumerate(lines, start=1)]


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file as a whole: after a kill or an error the old file stands unchanged.

    Floats are written as in `metrics.jsonl`: finite ones bit for bit, the others as strings.

    Args:
        path: the file; its directory must exist.
        value: dictionaries with string keys, lists, tuples, strings, numbers, booleans and None.

    Raises:
        OSError: the file could not be written; the message holds the path.
        TypeError: JSON cannot hold `value`.
    """
    _write_atomically(Path(path), encode_json(value, indent=2) + b"\n")


def remove_torn_files(workdir: str | os.PathLike[str]) -> None:
    """Removes what a process that was killed while it wrote a whole file has left below a workdir.

    Args:
        workdir: directory of a run that no other process writes to.
    """
    for pattern in (".*.tmp", "*/.*.tmp", "*/*/.*.tmp"):
        for path in Path(workdir).glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def encode_json(value: Any, *, indent: int | None = None) -> bytes:
    """Encodes as JSON that strict readers accept, with non-finite floats as strings."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False).encode()


def _finite(value: Any) -> Any:
    """Copies nested containers with `nan`, `inf` and `-inf` spelled as strings."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    return value


def _group(phase: str, path: str) -> str:
    """TensorBoard groups tags by what stands before the first slash."""
    return f"{phase}.{path.replace('/', '.')}"


def _plain_number(value: Any) -> float | int:
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _whole_lines(data: bytes) -> list[bytes]:
    """Splits at line ends, keeps them, and leaves out a last line without one: it is torn."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def _decode(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON: {line!r}") from error
    if not isinstance(record, dict) or not {"phase", "step"} <= record.keys():
        raise ValueError(f'{path}, line {number}: no object with "phase" and "step": {line!r}')
    for values in (record, *record.get("layers", {}).values()):
        for name, value in values.items():
            if name != "phase" and isinstance(value, str):
                values[name] = _NON_FINITE.get(value, value)
    return record


def _open_after_last_line(path: Path) -> BinaryIO:
    """Opens for appending, without buffer, and cuts off a torn last line."""
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 (the writer closes it)
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        file.truncate(whole)
    return file


def _write_atomically(path: Path, data: bytes) -> None:
    # In the same directory, as os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _with_path(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _with_path(error: OSError, path: Path) -> OSError:
    """The same error (the errno chooses its class) naming `path`: a full disk names no file."""
    return OSError(error.errno, error.strerror or str(error), str(path))
