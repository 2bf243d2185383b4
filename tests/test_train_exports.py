"""What a run leaves to be deployed: checked, described, and never at the cost of the run."""

import dataclasses
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from small_runs import StopAt, get_config, train

from uniq_jax import config as c
from uniq_jax import deploy, exact, main, predict
from uniq_jax.spec import ConfigError
from uniq_jax.train import exports, frozen, loop
from uniq_jax.train.result import Result
from uniq_jax.train.run import Run

FORMATS = "packed,onnx,openvino,qonnx,stablehlo"


def config_of(formats="packed", **values):
    config = get_config()
    config.phases = ("quantized",)
    # With averages, which are what is evaluated: no other parameters are to be frozen.
    config.quantized.update(total_epochs=1.0, batch_norm_batches=0, ema_decay=0.5)
    config.export.update(formats=formats, sample_images=4, **values)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, kept_compilations):
    workdir = tmp_path_factory.mktemp("trained")
    return workdir, train(config_of(), workdir)


@pytest.fixture
def unfinished(trained, tmp_path):
    """The run as it is before its end, at which the network is frozen."""
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    shutil.rmtree(workdir / "export")
    (workdir / "result.json").unlink()
    return workdir


def console():
    return Console(file=io.StringIO(), width=200)


def test_a_run_ends_with_its_integer_network(trained):
    workdir, output = trained
    assert "quantized: freezes the network" in output
    result = Result.read(workdir)
    assert result.mismatching_codes == 0
    assert result.codes == 200 * (64 + 16 * 8 + 8)  # Inputs of three layers, of 200 images.
    packed = workdir / "export" / "model.safetensors"
    assert result.file_bytes == packed.stat().st_size
    assert 0 < result.integer_ms < 1000
    assert 0 < result.float_ms < 1000
    assert pathlib.Path(result.files["network"]) == packed.parent
    network = deploy.load(packed)
    assert network.about.labels == tuple("0123456789")
    assert network.about.name == "small uniq W2A2 on digits"
    described = json.loads((packed.parent / "export.json").read_text())
    assert described["files"] == {"packed": {"model.safetensors": result.file_bytes}}
    assert described["check"]["mismatches"] == 0
    assert [layer["path"] for layer in described["check"]["layers"]] == ["conv1", "conv2", "fc"]
    assert described["float_epilogues"] == {"conv2": "float epilogue: sum over the pixels"}
    assert (described["phase"], described["step"]) == ("quantized", 3)


def test_a_finished_run_is_not_frozen_again(trained, monkeypatch):
    workdir, _ = trained
    monkeypatch.setattr(frozen, "freeze", None)
    assert "nothing is left to train" in train(config_of("packed,stablehlo"), workdir)


def test_predictions_are_those_of_evaluation_bit_for_bit(trained):
    """From PNG files, through the packed file, against the program that training evaluates."""
    workdir, _ = trained
    run = Run(c.run_spec(config_of()))
    (phase,) = run.spec.phases
    program = run.program(phase)
    _, _, state = loop.newest(run, workdir, console())

    @jax.jit
    def evaluated(params, statistics, images):
        model = program.build(params, statistics)
        model.eval()
        return model(program.normalize(images))

    model = predict.open_model(workdir / "export" / "model.safetensors")
    paths = predict.find_images([workdir / "export" / "images"])
    assert [path.name for path in paths] == [
        f"{i:03}_is_{label}.png" for i, label in enumerate(run.test_data.labels[:4])
    ]
    images = np.stack([predict.read_image(path, model) for path in paths])
    np.testing.assert_array_equal(images, run.test_data.images[:4])
    wanted = np.asarray(evaluated(*state.evaluated, run.test_data.images[:4]))
    np.testing.assert_array_equal(model.logits(images), wanted)
    np.testing.assert_array_equal(model.logits(images, batch_size=3), wanted)
    best = [model.predictions(row, 1)[0].index for row in wanted]
    assert best == wanted.argmax(-1).tolist()


def test_normalized_images_are_the_same_everywhere():
    """All bytes, for the statistics of known sets: also where a product and a sum follow."""
    values = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    mean = tuple(255 * v for v in (0.485, 0.456, 0.406))
    std = tuple(255 * v for v in (0.229, 0.224, 0.225))
    centred = values.astype(np.float32) - np.float32(mean)
    wanted = centred * (1 / np.asarray(std)).astype(np.float32)
    assert np.any(wanted != centred / np.float32(std))
    np.testing.assert_array_equal(deploy.About(mean=mean, std=std).normalize(values), wanted)

    @jax.jit
    def fused(images, bias):
        x = exact.normalize(images, mean, std)
        return x, x + bias

    for found in zip(fused(values, jnp.float32(0.3)), (wanted, wanted + np.float32(0.3))):
        np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(deploy.About().normalize(values), values.astype(np.float32))


class StandIns:
    """Exporters that only write down what they are called with."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("onnx", "openvino", "qonnx", "stablehlo"):
            stand_in = self.exporter(name)
            monkeypatch.setattr(deploy, f"export_{name}", stand_in, raising=False)
        monkeypatch.setattr(exports.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(exports.importlib.metadata, "version", lambda name: "1.2.3")

    def exporter(self, name):
        def export(network, path, **options):
            kinds = {node.operation for node in network.graph.nodes}
            self.calls.append((name, path.name, "encode_sums" in kinds, options))
            assert network.about.labels
            path.write_bytes(b"x" * len(self.calls))
            if name == "openvino":
                path.with_suffix(".bin").write_bytes(b"weights")

        return export


def test_every_format_gets_the_network_it_wants(trained, monkeypatch):
    workdir, _ = trained
    stand_ins = StandIns(monkeypatch)
    loop.export(c.run_spec(config_of(FORMATS)), workdir, console())
    assert stand_ins.calls == [
        ("onnx", "model.onnx", True, {"form": "integer", "batch": None}),
        ("onnx", "model_qdq.onnx", False, {"form": "qdq", "batch": None}),
        ("openvino", "model.xml", False, {"batch": None}),
        ("qonnx", "model.qonnx.onnx", False, {"batch": 1, "levels": False}),
        ("stablehlo", "model.stablehlo", True, {"batch": None}),
    ]
    stand_ins.calls.clear()
    formats = "onnx,openvino,qonnx"
    loop.export(c.run_spec(config_of(formats, exact=True, batch=2)), workdir, console())
    assert [call[2] for call in stand_ins.calls] == [True] * 4
    assert all(call[3]["batch"] == 2 for call in stand_ins.calls)
    assert stand_ins.calls[-1][3]["levels"]


def test_what_qonnx_cannot_hold_with_integer_thresholds_it_holds_without(trained, monkeypatch):
    workdir, _ = trained
    stand_ins = StandIns(monkeypatch)
    export = stand_ins.exporter("qonnx")

    def of_few(network, path, **options):
        if any(node.operation == "encode_sums" for node in network.graph.nodes):
            raise NotImplementedError
        export(network, path, **options)

    monkeypatch.setattr(deploy, "export_qonnx", of_few)
    loop.export(c.run_spec(config_of("qonnx", exact=True)), workdir, console())
    assert stand_ins.calls == [("qonnx", "model.qonnx.onnx", False, {"batch": 1, "levels": True})]


def test_export_json_and_the_table_list_all_files(trained, monkeypatch):
    workdir, _ = trained
    StandIns(monkeypatch)
    text = console()
    main._export(c.run_spec(config_of(FORMATS)), workdir, text)
    described = json.loads((workdir / "export" / "export.json").read_text())
    assert {name: list(files) for name, files in described["files"].items()} == {
        "packed": ["model.safetensors"],
        "onnx": ["model.onnx", "model_qdq.onnx"],
        "openvino": ["openvino/model.bin", "openvino/model.xml"],
        "qonnx": ["model.qonnx.onnx"],
        "stablehlo": ["model.stablehlo"],
    }
    assert described["versions"]["openvino"] == "1.2.3"
    lines = [line.strip() for line in text.file.getvalue().splitlines()]
    assert f"mismatching codes: 0 of {Result.read(workdir).codes}" in lines
    assert "layers with a float epilogue: 1 (sum over the pixels 1)" in " ".join(lines)
    (line,) = [line for line in lines if "openvino/model.bin" in line]
    assert line.endswith(" 7")


def test_files_of_another_step_go(trained, monkeypatch, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns("export"))
    StandIns(monkeypatch)
    directory = workdir / "export"

    def export(formats):
        loop.export(c.run_spec(config_of(formats)), workdir, console())
        return sorted(path.name for path in directory.rglob("*.onnx"))

    assert export("qonnx") == export("packed") == ["model.qonnx.onnx"]
    described = json.loads((directory / "export.json").read_text())
    (directory / "export.json").write_text(json.dumps({**described, "step": 1}))
    assert export("packed") == []
    assert (directory / "model.safetensors").exists()


def test_mismatches_end_an_export_with_an_error(trained, monkeypatch):
    workdir, _ = trained
    verify = deploy.verify

    def worse(*arguments):
        found = verify(*arguments)
        first = dataclasses.replace(found.layers[0], mismatches=3)
        return dataclasses.replace(found, layers=(first, *found.layers[1:]))

    monkeypatch.setattr(deploy, "verify", worse)
    with pytest.raises(ValueError, match=r"not exact: mismatching codes: 3 of \d+ \(conv1 3\)"):
        main._export(c.run_spec(config_of()), workdir, console())


@pytest.mark.parametrize("name", ["onnx", "openvino", "qonnx"])
def test_a_missing_extra_is_named_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.setattr(exports.importlib.util, "find_spec", lambda name: None)
    spec = c.run_spec(config_of(f"packed,{name}"))
    for function in (loop.train, loop.export):
        with pytest.raises(ConfigError, match=rf"pip install 'uniq_jax\[{name}\]'"):
            function(spec, tmp_path / "run", console())
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_exported_is_said(trained, tmp_path):
    workdir, _ = trained
    with pytest.raises(ValueError, match=r"config\.export\.formats \(=''\) must name a format"):
        loop.export(c.run_spec(config_of("")), workdir, console())
    with pytest.raises(FileNotFoundError, match="has no checkpoint to evaluate or export"):
        loop.export(c.run_spec(config_of()), tmp_path, console())


def test_a_network_that_cannot_be_frozen_does_not_undo_the_run(unfinished, monkeypatch):
    def refused(*arguments, **options):
        raise NotImplementedError("a frozen network has no operation for 'sort'")

    monkeypatch.setattr(deploy, "freeze", refused)
    train(config_of(), unfinished)
    result = Result.read(unfinished)
    assert result.not_exported == "a frozen network has no operation for 'sort'"
    assert result.codes is result.file_bytes is result.integer_ms is None


def test_what_nobody_thought_of_does_not_undo_the_run(unfinished, monkeypatch):
    monkeypatch.setattr(deploy, "freeze", lambda *arguments, **options: {}["layer"])
    train(config_of(), unfinished)
    assert Result.read(unfinished).not_exported == "KeyError: 'layer'"


def test_a_run_in_bfloat16_ends_and_says_why_it_is_not_frozen(tmp_path):
    config = config_of()
    config.model.dtype = "bfloat16"
    train(config, tmp_path / "run")
    assert "must compute in float32" in Result.read(tmp_path / "run").not_exported


def test_formats_that_were_written_stay_described(trained, monkeypatch, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns("export"))
    StandIns(monkeypatch)
    loop.export(c.run_spec(config_of("packed,stablehlo")), workdir, console())

    def refused(*arguments, **options):
        raise NotImplementedError

    monkeypatch.setattr(deploy, "export_stablehlo", refused)
    with pytest.raises(NotImplementedError):
        loop.export(c.run_spec(config_of("qonnx,stablehlo", batch=3)), workdir, console())
    described = json.loads((workdir / "export" / "export.json").read_text())
    assert sorted(described["files"]) == ["packed", "qonnx"]
    assert described["options"]["packed"] == {"batch": 0, "exact": False}
    assert described["options"]["qonnx"] == {"batch": 3, "exact": False}


def test_a_run_stopped_before_its_network_is_frozen_goes_on_there(unfinished):
    torn = unfinished / "export" / ".model.stablehlo.tmp"
    torn.mkdir(parents=True)
    (torn / "model.stablehlo").write_text("half")
    calls = 2  # Before the phase, and before its network is frozen.
    assert "Stopped" in train(config_of(), unfinished, StopAt(calls))
    assert not (unfinished / "result.json").exists()
    assert "freezes the network" in train(config_of(), unfinished)
    assert Result.read(unfinished).mismatching_codes == 0
    assert not torn.exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_samples_are_named_as_what_they_are(kind):
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, kind)
    assert exports._suffix(file.getvalue()) == {"JPEG": "jpg"}.get(kind, kind.lower())
