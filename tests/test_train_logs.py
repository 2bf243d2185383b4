"""Tests of uniq_jax.train.logs."""

import contextlib
import errno
import json
import math
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined] (made at import)

from uniq_jax.train import logs
from uniq_jax.train.logs import MetricsWriter, read_metrics, write_json

PHASES = ("float", "calibrate", "quantized")


def _strict_loads(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _write(workdir, records, **options):
    with MetricsWriter(workdir, tensorboard=False, **options) as writer:
        for phase, step, values in records:
            writer.write(phase, step, values)


def _steps(workdir):
    return [(record["phase"], record["step"]) for record in read_metrics(workdir)]


def _scalars(directory):
    """(step, tag, value) of every scalar and (step, "start", None) of every session start."""
    rows = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                rows.append((event.step, "start", None))
            rows.extend(
                (event.step, value.tag, value.simple_value) for value in event.summary.value
            )
    return rows


@contextlib.contextmanager
def small_disk():
    """Lets no file grow beyond 100 bytes, as a full disk would: part of a write gets through."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_floats_read_back_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**64, size=500, dtype=np.uint64)
    values = [float(value) for value in bits.view(np.float64) if np.isfinite(value)]
    values += [0.1, -0.0, 5e-324, 1.7976931348623157e308]
    _write(tmp_path, [("float", step, {"loss": value}) for step, value in enumerate(values)])
    read = [record["loss"] for record in read_metrics(tmp_path)]
    assert len(values) > 400
    assert [value.hex() for value in read] == [value.hex() for value in values]


def test_lines_are_strict_json_and_non_finite_numbers_come_back(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2.0, "e": 3}
    _write(tmp_path, [("float", 7, values)])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert _strict_loads(line) == {
        "phase": "float", "step": 7, "a": "nan", "b": "inf", "c": "-inf", "d": 2.0, "e": 3,
    }  # fmt: skip
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"], record["d"], record["e"]) == (math.inf, -math.inf, 2.0, 3)
    assert isinstance(record["e"], int)


def test_strict_json_check_can_fail():
    with pytest.raises(AssertionError, match="NaN"):
        _strict_loads(json.dumps({"a": math.nan}))


def test_array_scalars_are_written_as_plain_numbers(tmp_path):
    values = {"a": np.float32(0.1), "b": np.int32(4), "c": np.asarray(0.25)}
    _write(tmp_path, [("float", np.int64(1), values)])  # type: ignore[arg-type]
    (record,) = read_metrics(tmp_path)
    assert record == {"phase": "float", "step": 1, "a": float(np.float32(0.1)), "b": 4, "c": 0.25}


def test_a_line_is_on_disk_before_the_writer_is_closed(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("float", 1, {"loss": 1.0})
        assert _steps(tmp_path) == [("float", 1)]
        writer.write("float", 2, {"loss": 1.0})
        assert _steps(tmp_path) == [("float", 1), ("float", 2)]


@pytest.mark.parametrize("name", ["phase", "step"])
def test_reserved_names_are_refused(tmp_path, name):
    with (
        MetricsWriter(tmp_path) as writer,
        pytest.raises(ValueError, match=f"values has \\['{name}'\\]"),
    ):
        writer.write("float", 1, {"loss": 1.0, name: 2})


def test_disabled_writer_touches_nothing(tmp_path):
    workdir = tmp_path / "run"
    with MetricsWriter(workdir, enabled=False) as writer:
        writer.write("float", 1, {"loss": 1.0})
        writer.rewind("float", 0, PHASES)
    assert not workdir.exists()


def test_disabled_writer_rewinds_nothing(tmp_path):
    steps = _three_phases(tmp_path)
    with MetricsWriter(tmp_path, enabled=False) as writer:
        writer.rewind("float", 0, PHASES)
    assert _steps(tmp_path) == steps


@pytest.mark.parametrize("kept_bytes", range(1, 30))
def test_a_torn_last_line_is_left_out_and_the_next_writer_removes_it(tmp_path, kept_bytes):
    _write(tmp_path, [("float", 1, {"loss": 0.5})])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:kept_bytes])
    assert _steps(tmp_path) == [("float", 1)]
    _write(tmp_path, [("float", 2, {"loss": 0.25})])
    assert _steps(tmp_path) == [("float", 1), ("float", 2)]


@pytest.mark.parametrize("line", ['{"phase": "float", "st', '{"loss": 1.0}', "[]", "\0\0"])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"phase": "a", "step": 1}}\n{line}\n{{"phase": "a", "step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(tmp_path)


def test_read_metrics_needs_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


def _three_phases(workdir):
    steps = [(phase, step) for phase in PHASES for step in (0, 5, 10)]
    _write(workdir, [(phase, step, {"loss": math.pi / (step + 1)}) for phase, step in steps])
    return steps


@pytest.mark.parametrize(
    ("phase", "step", "count"),
    [("float", -1, 0), ("float", 4, 1), ("float", 10, 3), ("calibrate", 5, 5), ("quantized", 9, 8)],
)
def test_rewind_drops_what_is_later(tmp_path, phase, step, count):
    steps = _three_phases(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes() + b'{"phase": "quan')
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.rewind(phase, step, PHASES)
        # The lines that stay are the same bytes, and no temporary file is left.
        assert path.read_bytes() == b"".join(lines[:count])
        assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
        writer.write(phase, step + 1, {"loss": 0.0})
    assert _steps(tmp_path) == [*steps[:count], (phase, step + 1)]


def test_rewind_of_an_open_writer_continues_in_the_new_file(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write("float", step, {})
        writer.rewind("float", 1, PHASES)
        writer.write("float", 2, {})
    assert _steps(tmp_path) == [("float", 1), ("float", 2)]


def test_rewind_keeps_records_of_phases_that_it_does_not_know(tmp_path):
    _write(tmp_path, [("float", 1, {}), ("other", 9, {}), ("quantized", 1, {})])
    with MetricsWriter(tmp_path) as writer:
        writer.rewind("float", 1, PHASES)
    assert _steps(tmp_path) == [("float", 1), ("other", 9)]


def test_rewind_without_a_file_does_nothing(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.rewind("float", 1, PHASES)
    assert list(tmp_path.iterdir()) == []


def test_rewind_refuses_an_unknown_phase(tmp_path):
    with (
        MetricsWriter(tmp_path) as writer,
        pytest.raises(ValueError, match=r"phase must be one of .*, got 'flaot'"),
    ):
        writer.rewind("flaot", 1, PHASES)


def test_a_rewind_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    steps = _three_phases(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            writer.rewind("float", 1, PHASES)
        assert _steps(tmp_path) == steps
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_the_scalars(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("float", 3, {"loss": 0.5, "accuracy": 0.25})
        writer.write("quantized", 4, {"loss": 0.125})
    assert _scalars(tmp_path / "events" / "float") == [
        (3, "float/loss", 0.5),
        (3, "float/accuracy", 0.25),
    ]
    assert _scalars(tmp_path / "events" / "quantized") == [(4, "quantized/loss", 0.125)]


def test_tensorboard_purges_after_a_rewind_and_keeps_the_old_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for phase in PHASES:
            writer.write(phase, 1, {"loss": 1.0})
    with MetricsWriter(tmp_path) as writer:
        writer.rewind("calibrate", 5, PHASES)
        for phase in PHASES:
            writer.write(phase, 6, {"loss": 0.5})
    old_and_new = [(1, "{}/loss", 1.0), (6, "{}/loss", 0.5)]
    for phase, purge_step in [("float", None), ("calibrate", 6), ("quantized", 0)]:
        first, last = [(step, tag.format(phase), value) for step, tag, value in old_and_new]
        purge = [] if purge_step is None else [(purge_step, "start", None)]
        assert _scalars(tmp_path / "events" / phase) == [first, *purge, last]


def test_no_tensorboard_no_event_files(tmp_path):
    _write(tmp_path, [("float", 1, {"loss": 1.0})])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_full_disk_names_the_file_and_the_next_write_is_whole(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("float", 1, {"loss": 0.5})
        with small_disk(), pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
            writer.write("float", 2, {f"loss_{index}": 0.5 for index in range(20)})
        assert caught.value.errno == errno.EFBIG
        assert (tmp_path / "metrics.jsonl").stat().st_size == 100  # a part got through
        writer.write("float", 3, {"loss": 0.5})
    assert _steps(tmp_path) == [("float", 1), ("float", 3)]


def test_write_json_reads_back(tmp_path):
    value = {"a": 0.1, "b": [1, 2.5, None, True], "c": {"d": "Δ"}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert _strict_loads(text) == value
    assert text.endswith("}\n")
    write_json(tmp_path / "x.json", {"a": (math.inf, -math.inf, [math.nan])})
    assert _strict_loads((tmp_path / "x.json").read_text()) == {"a": ["inf", "-inf", ["nan"]]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_write_json_on_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with small_disk(), pytest.raises(OSError, match=r"'.*/x\.json'"):
        write_json(path, list(range(100)))
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_write_json_that_is_killed_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_write_json_errors_name_the_path_and_leave_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*/missing/x\.json'"):
        write_json(tmp_path / "missing" / "x.json", {})
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError, match=r"'.*/directory'"):
        write_json(tmp_path / "directory", {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "x.json", {"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_the_temporary_file_lies_beside_the_file(tmp_path, monkeypatch):
    moves = []
    real_replace = os.replace

    def spy(source, target):
        moves.append((Path(source), Path(target)))
        real_replace(source, target)

    monkeypatch.setattr(logs.os, "replace", spy)
    write_json(tmp_path / "x.json", {})
    ((source, target),) = moves
    assert source.parent == target.parent == tmp_path
    assert source != target


LAYERS = {"layer1/0/conv1": {"weight_entropy": 1.5, "weight_step_gradient": math.nan}}


def test_layers_are_one_record_that_rewinds(tmp_path):
    histogram = (np.array([0.0, 1.0, 2.0]), [3, 5])
    with MetricsWriter(tmp_path) as writer:
        writer.write("quantized", 2, {"loss": 1.0})
        for step in (2, 4):
            writer.write_layers("quantized", step, LAYERS, {"layer1/0/conv1/weight": histogram})
        writer.rewind("quantized", 3, PHASES)
    first, second = read_metrics(tmp_path)
    assert first["loss"] == 1.0
    assert (second["phase"], second["step"]) == ("quantized", 2)
    numbers = second["layers"]["layer1/0/conv1"]
    assert numbers["weight_entropy"] == 1.5
    assert math.isnan(numbers["weight_step_gradient"])
    _strict_loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])


def test_tensorboard_gets_a_group_and_histograms_for_each_layer(tmp_path):
    histogram = (np.array([0.0, 1.0, 2.0]), [3, 5])
    with MetricsWriter(tmp_path) as writer:
        writer.write_layers("quantized", 4, LAYERS, {"layer1/0/conv1/weight": histogram})
    (path,) = (tmp_path / "events" / "quantized").iterdir()
    data, values = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        values.update({value.tag: value for value in event.summary.value})
    group = "quantized.layer1.0.conv1"
    assert values[f"{group}/weight_entropy"].simple_value == 1.5
    found = values[f"{group}/weight"].histo
    assert (list(found.bucket_limit), list(found.bucket)) == ([1.0, 2.0], [3.0, 5.0])
    assert (found.min, found.max, found.num, found.sum) == (0.0, 2.0, 8.0, 9.0)


def test_a_writer_that_is_off_writes_no_layers(tmp_path):
    with MetricsWriter(tmp_path / "a", enabled=False) as writer:
        writer.write_layers("quantized", 4, LAYERS, {})
    assert not (tmp_path / "a").exists()
