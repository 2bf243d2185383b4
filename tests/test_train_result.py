"""Tests of uniq_jax.train.result."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from uniq_jax import config as c
from uniq_jax.spec import to_json
from uniq_jax.train import loop
from uniq_jax.train.result import Result, table

RESULT = Result(
    dataset="digits",
    model="resnet_digits",
    method="uniq",
    weight_bits=2,
    activation_bits=2,
    seed=0,
    steps=480,
    seconds=41.23,
    test_accuracy=0.1 + 0.8777,
    best_accuracy=0.98333,
    float_accuracy=0.98889,
    packed_bytes=21_876,
    float_bytes=312_345,
    files={"result": "runs/demo/result.json", "network": "runs/demo/[x]/network.onnx"},
)


def _render(width=80, **changes):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table(dataclasses.replace(RESULT, **changes)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


def test_write_and_read_back(tmp_path):
    RESULT.write(tmp_path)
    assert Result.read(tmp_path) == RESULT
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    unknown = dataclasses.replace(RESULT, float_accuracy=None, seed=1)
    unknown.write(tmp_path)
    assert Result.read(tmp_path) == unknown


def test_read_without_a_result(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        Result.read(tmp_path)


def test_read_names_wrong_fields(tmp_path):
    path = tmp_path / "result.json"
    values = dataclasses.asdict(RESULT)
    del values["seed"]
    path.write_text(json.dumps(values | {"sede": 0}))
    with pytest.raises(ValueError, match=r"result\.json .* lacks \['seed'\] and has \['sede'\]"):
        Result.read(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"lacks \['activation_bits', 'best_accuracy', "):
        Result.read(tmp_path)
    path.write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"result\.json is not JSON"):
        Result.read(tmp_path)


def test_table_reads_as_documented():
    assert _render() == [
        "uniq, resnet_digits on digits, seed 0",
        "",
        "                     float   quantized",
        "──────────────────────────────────────────────────────",
        "accuracy            98.89%      97.77%    -1.12 points",
        "weight bits             32           2       16x fewer",
        "activation bits         32           2       16x fewer",
        "size              312.3 KB     21.9 KB   14.3x smaller",
        "",
        "time     41.2 s for 480 steps",
        "best     98.33% at any evaluation",
        "result   runs/demo/result.json",
        "network  runs/demo/[x]/network.onnx",
    ]


def test_table_of_a_frozen_network():
    frozen = {"codes": 1000, "mismatching_codes": 0, "file_bytes": 25_000}
    times = {"float_ms": 1.5, "integer_ms": 0.5}
    lines = _render(**frozen, **times)
    assert lines[7:9] == [
        "size on disk      312.3 KB     25.0 KB   12.5x smaller",
        "one image, JAX     1.50 ms     0.50 ms     3.0x faster",
    ]
    assert "integers  mismatching codes: 0 of 1000" in lines
    assert _row("one image, JAX", float_ms=0.5, integer_ms=0.6)[-2:] == ["1.2x", "slower"]
    assert _row("one image, JAX", float_ms=0.5, integer_ms=0.52)[-2:] == ["as", "fast"]
    (line,) = [x for x in _render(not_exported="it has [no] layers") if x.startswith("no export")]
    assert line.endswith("it has [no] layers")


def test_a_result_from_before_networks_were_frozen_is_read(tmp_path):
    values = {k: v for k, v in dataclasses.asdict(RESULT).items() if v is not None and v != ""}
    (tmp_path / "result.json").write_text(json.dumps(values))
    assert "codes" not in values
    assert Result.read(tmp_path) == RESULT


def _row(label, **changes):
    (line,) = [line for line in _render(**changes) if line.startswith(label)]
    return line.removeprefix(label).split()


def test_accuracy_row():
    assert _row("accuracy", float_accuracy=None) == ["-", "97.77%"]
    assert _row("accuracy", float_accuracy=0.9, test_accuracy=0.95)[-2:] == ["+5.00", "points"]


@pytest.mark.parametrize(
    ("float_bytes", "packed_bytes", "expected"),
    [
        (46_800_000, 3_510_000, "46.80 MB 3.51 MB 13.3x smaller"),
        (1_000_000, 999_949, "1.00 MB 999.9 KB 1.0x smaller"),
        (900, 1800, "900 B 1.8 KB 2.0x larger"),
    ],
)
def test_size_row(float_bytes, packed_bytes, expected):
    row = _row("size", float_bytes=float_bytes, packed_bytes=packed_bytes)
    assert " ".join(row) == expected


@pytest.mark.parametrize(("bits", "expected"), [(1, "32x"), (3, "10.7x"), (8, "4x"), (32, "1x")])
def test_bits_row(bits, expected):
    assert _row("weight bits", weight_bits=bits)[1:3] == [str(bits), expected]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (119.9, "119.9 s"), (600, "10.0 min"), (9e3, "2.5 h")],
)
def test_time_row(seconds, expected):
    assert " ".join(_row("time", seconds=seconds)) == f"{expected} for 480 steps"


def test_a_long_path_is_kept_whole():
    path = "runs/" + "long-directory/" * 10 + "network.onnx"
    text = "".join(line.strip() for line in _render(files={"network": path}))
    assert text.endswith("network  " + path)


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RESULT.seed = 1  # type: ignore[misc]


def test_a_workdir_is_of_its_config_once_something_was_trained_there(tmp_path):
    """A run that ended before, because it did not fit in memory say, binds nobody."""
    config = c.base()
    config.model.name, config.model.options = "resnet8", {"width": 4}
    config.phases = ("float",)
    config.float = c.phase("float")
    spec = c.run_spec(config)
    (tmp_path / "config.json").write_text(json.dumps({**to_json(spec), "seed": 9}))
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        loop.evaluate(spec, tmp_path, Console())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"config\.seed: 9 there, 0 now"):
        loop.evaluate(spec, tmp_path, Console())
