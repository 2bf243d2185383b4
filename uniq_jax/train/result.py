"""The outcome of a run: `result.json`, and the table that a run closes with."""

import dataclasses
import json
import os
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from uniq_jax.train.logs import write_json

RESULT_FILE = "result.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run reached.

    Attributes:
        dataset: name of the data.
        model: name of the network.
        method: name of the quantization method.
        weight_bits: bits of a weight of the quantized layers.
        activation_bits: bits of an activation of the quantized layers.
        seed: seed of the run.
        steps: training steps of all phases.
        seconds: time that the run took.
        test_accuracy: accuracy of the quantized network at the end, in 0 .. 1.
        best_accuracy: highest accuracy of the quantized network at any evaluation.
        float_accuracy: accuracy of the float network, None where it is not known.
        packed_bytes: size of the quantized network with its weights packed.
        float_bytes: size of the same network in float32.
        files: label → path of what the run left on disk.
        codes: of the frozen network on test images, compared with those of training's evaluation;
            this and what follows is None where no network was frozen.
        mismatching_codes: of these, how many differ.
        file_bytes: of the packed file on disk.
        float_ms: time of one image in the float network.
        integer_ms: time of one image in the frozen network.
        not_exported: why a quantized network could not be frozen, or its files not be written; ""
            where they were, or none were to be.
    """

    dataset: str
    model: str
    method: str
    weight_bits: int
    activation_bits: int
    seed: int
    steps: int
    seconds: float
    test_accuracy: float
    best_accuracy: float
    float_accuracy: float | None
    packed_bytes: int
    float_bytes: int
    files: dict[str, str]
    codes: int | None = None
    mismatching_codes: int | None = None
    file_bytes: int | None = None
    float_ms: float | None = None
    integer_ms: float | None = None
    not_exported: str = ""

    def write(self, workdir: str | os.PathLike[str]) -> None:
        """Writes `WORKDIR/result.json` as a whole."""
        write_json(Path(workdir) / RESULT_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, workdir: str | os.PathLike[str]) -> "Result":
        """Reads `WORKDIR/result.json`.

        Args:
            workdir: directory of a finished run.

        Raises:
            FileNotFoundError: the run is not finished.
            ValueError: the file does not hold the fields of a result; those with a default may be
                missing.
        """
        path = Path(workdir) / RESULT_FILE
        text = path.read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        expected = {field.name for field in fields if field.default is dataclasses.MISSING}
        found = set(values) if isinstance(values, dict) else set()
        if not expected <= found <= known:
            raise ValueError(
                f"{path} must hold the fields of a result: it lacks {sorted(expected - found)} and "
                f"has {sorted(found - known)} besides"
            )
        return cls(**values)


def table(result: Result) -> Table:
    """Builds the table that a run closes with: float against quantized, the time, the files."""
    comparison = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    comparison.add_column("")
    comparison.add_column("float", justify="right")
    comparison.add_column("quantized", justify="right", style="bold")
    comparison.add_column("", justify="right")
    comparison.add_row(
        "accuracy",
        "-" if result.float_accuracy is None else _percent(result.float_accuracy),
        _percent(result.test_accuracy),
        _points(result.test_accuracy, result.float_accuracy),
    )
    for name, bits in [
        ("weight bits", result.weight_bits),
        ("activation bits", result.activation_bits),
    ]:
        comparison.add_row(name, "32", str(bits), f"{32 / bits:.3g}x fewer")
    size, label = result.packed_bytes, "size"
    if result.file_bytes is not None:
        size, label = result.file_bytes, "size on disk"
    ratio = _ratio(result.float_bytes, size)
    comparison.add_row(label, _size(result.float_bytes), _size(size), ratio)

    if result.float_ms is not None and result.integer_ms is not None:
        times = f"{result.float_ms:.2f} ms", f"{result.integer_ms:.2f} ms"
        comparison.add_row("one image, JAX", *times, _speed(result.float_ms, result.integer_ms))

    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("time", f"{_duration(result.seconds)} for {result.steps} steps")
    facts.add_row("best", f"{_percent(result.best_accuracy)} at any evaluation")
    if result.codes is not None:
        facts.add_row(
            "integers", f"mismatching codes: {result.mismatching_codes} of {result.codes}"
        )
    if result.not_exported:
        facts.add_row("no export", Text(result.not_exported))
    for label, path in result.files.items():
        # Text, as a path may hold what rich takes for markup.
        facts.add_row(Text(label), Text(path))

    whole = Table.grid()
    title = f"{result.method}, {result.model} on {result.dataset}, seed {result.seed}"
    whole.add_row(Text(title, style="bold"))
    whole.add_row("")
    whole.add_row(comparison)
    whole.add_row("")
    whole.add_row(facts)
    return whole


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"


def _points(quantized: float, float_accuracy: float | None) -> str:
    return "" if float_accuracy is None else f"{100 * (quantized - float_accuracy):+.2f} points"


def _size(size_bytes: int) -> str:
    if size_bytes < 1000:
        return f"{size_bytes} B"
    return f"{size_bytes / 1e3:.1f} KB" if size_bytes < 1e6 else f"{size_bytes / 1e6:.2f} MB"


def _ratio(float_bytes: int, packed_bytes: int) -> str:
    if packed_bytes <= float_bytes:
        return f"{float_bytes / packed_bytes:.1f}x smaller"
    return f"{packed_bytes / float_bytes:.1f}x larger"


def _speed(float_ms: float, integer_ms: float) -> str:
    if max(integer_ms, float_ms) < 1.05 * min(integer_ms, float_ms):
        return "as fast"
    if integer_ms <= float_ms:
        return f"{float_ms / integer_ms:.1f}x faster"
    return f"{integer_ms / float_ms:.1f}x slower"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
