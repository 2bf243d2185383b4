"""The command that runs exported networks on image files."""

import json
import pathlib
import subprocess
import sys
import types
from dataclasses import asdict, replace

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_runs import Small

import uniq_jax
from uniq_jax import data, deploy, predict, rules
from uniq_jax.deploy.onnx_metadata import onnx_metadata
from uniq_jax.nn import UniqActivation, UniqWeight
from uniq_jax.predict.__main__ import main

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ABOUT = deploy.About("a small network", LABELS, (77.8,), (95.8,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kept_compilations):
    """A packed file, and a directory of five digits."""
    root = tmp_path_factory.mktemp("predict")
    model = uniq_jax.quantize(
        Small(num_classes=10, in_features=1, rngs=nnx.Rngs(0)), rules.uniq(bits=2)
    )
    network = deploy.freeze(model, (8, 8, 1))
    deploy.save(replace(network, about=ABOUT), root / "model.safetensors")
    deploy.save(network, root / "bare.safetensors")
    (root / "images" / "more").mkdir(parents=True)
    images = data.load("digits", split="test[:5]").images
    for i, image in enumerate(images):
        place = root / "images" / ("more" if i == 4 else "")
        Image.fromarray(image[..., 0]).save(place / f"{i}.png")
    np.save(root / "images.npy", images)
    return root


def test_it_prints_the_most_probable_classes(folder, capsys):
    images = [str(folder / "images" / f"{i}.png") for i in (1, 0)]
    arguments = [str(folder / "model.safetensors"), *images, "--top=2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a small network"
    assert len([line for line in lines if "%" in line]) == 4
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found["images"]] == images
    model = predict.open_model(folder / "model.safetensors")
    logits = model.logits(np.load(folder / "images.npy")[[1, 0]])
    for entry, row in zip(found["images"], logits.astype(np.float64)):
        order = np.argsort(-row)[:2]
        assert [p["index"] for p in entry["predictions"]] == order.tolist()
        assert [p["label"] for p in entry["predictions"]] == [LABELS[i] for i in order]
        wanted = np.exp(row)[order] / np.exp(row).sum()
        shares = [p["probability"] for p in entry["predictions"]]
        np.testing.assert_allclose(shares, wanted, rtol=1e-12)


def test_pixels_that_nobody_normalizes_are_warned_of(folder, capsys):
    image = str(folder / "images" / "1.png")
    assert main([str(folder / "bare.safetensors"), image]) == 0
    assert "does not say how images are normalized" in capsys.readouterr().err
    assert main([str(folder / "model.safetensors"), image]) == 0
    assert not capsys.readouterr().err


def test_hidden_files_of_a_directory_are_left_out(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("._0.png", ".cache/1.png", "2.png"):
        (tmp_path / name).write_bytes(b"")
    assert predict.find_images([tmp_path]) == [tmp_path / "2.png"]


def test_directories_batches_and_the_benchmark(folder, capsys):
    arguments = [str(folder / "model.safetensors"), str(folder / "images"), "--json"]
    found = []
    for more in ([], ["--batch_size=2", "--benchmark"]):
        assert main([*arguments, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["images"] == found[1]["images"]
    names = [pathlib.Path(entry["image"]).name for entry in found[0]["images"]]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert "ms_per_image" not in found[0]
    assert list(found[1]["ms_per_image"]) == ["1", "2"]
    assert all(0 < ms < 1000 for ms in found[1]["ms_per_image"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.safetensors", "images"], "MODEL (='nothing.safetensors') is not a file"),
        (["images/0.png", "images"], "must be a packed file, .safetensors, or an ONNX file"),
        (["other.safetensors", "images"], "other.safetensors is truncated, or no .safetensors"),
        (["model.safetensors", "none.png"], "IMAGE (='none.png') does not exist"),
        (["model.safetensors", "empty"], "IMAGE (='empty') is a directory without .png, .jpg"),
        (["model.safetensors", "images.npy"], "(='images.npy') must be a PNG, JPEG, BMP or GIF"),
        (["model.safetensors", "cut.png"], "(='cut.png') must be a PNG, JPEG, BMP or GIF file: "),
    ],
)
def test_what_is_wrong_is_named(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    pathlib.Path("empty").mkdir(exist_ok=True)
    pathlib.Path("other.safetensors").write_bytes(b"something else")
    pathlib.Path("cut.png").write_bytes(pathlib.Path("images/0.png").read_bytes()[:60])
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("shape", "about", "message"),
    [
        ((8, 8, 4), ABOUT, "takes images of 4 channels, and must take those of image files: 1 or"),
        ((64,), ABOUT, r"takes arrays of shape \(64,\), which are no image"),
        ((8, 8, 1), replace(ABOUT, labels=LABELS[:3]), "has 3 labels and 10 logits; it must"),
    ],
)
def test_networks_of_other_inputs_or_labels_are_refused(shape, about, message, tmp_path):
    """Not with an index that is out of range, or as if the images were at fault."""
    model = nnx.Sequential(nnx.Linear(64, 10, rngs=nnx.Rngs(0)))
    if len(shape) == 3:
        model = Small(num_classes=10, in_features=shape[-1], rngs=nnx.Rngs(0))
    two_bits = rules.Rule(".*", UniqWeight(2), UniqActivation(2))
    network = deploy.freeze(uniq_jax.quantize(model, [two_bits]), shape)
    deploy.save(replace(network, about=about), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors'\) {message}"):
        predict.open_model(tmp_path / "model.safetensors")


def test_flags_that_make_no_sense_are_refused(capsys):
    for arguments in (["model.safetensors"], ["model.safetensors", "x.png", "--top=0"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "give at least one IMAGE" in (text := capsys.readouterr().err)
    assert "'0' must be a number from 1 on" in text


def described(shape, resize_size=0):
    """A model of which only the input matters."""
    return predict.Model(deploy.About(resize_size=resize_size), shape, None, lambda images: images)


def test_photos_are_read_as_in_evaluation(tmp_path):
    rng = np.random.default_rng(0)
    place = tmp_path / "test" / "cat"
    place.mkdir(parents=True)
    for name, size in (("a.png", (19, 30)), ("b.jpg", (40, 17))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(place / name)
    Image.fromarray(rng.integers(0, 256, (21, 13), dtype=np.uint8)).save(place / "grey.jpg")
    for resize_size in (0, 12):
        source = data.load_encoded(
            "image_folder",
            split="test",
            data_dir=str(tmp_path),
            image_size=8,
            resize_size=resize_size or None,
        )
        model = described((8, 8, 3), resize_size)
        for record in source.records.read(range(3)):
            found = predict.read_image(tmp_path / record.name, model)
            np.testing.assert_array_equal(found, source.decode(record))
    grey = predict.read_image(place / "a.png", described((8, 8, 1)))
    assert grey.shape == (8, 8, 1)


def test_an_input_that_is_no_square_takes_images_of_its_size(tmp_path):
    image = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    found = predict.read_image(tmp_path / "a.png", described((6, 4, 3)))
    np.testing.assert_array_equal(found, image)
    with pytest.raises(ValueError, match="has 4x6 pixels, and must have 6x4"):
        predict.read_image(tmp_path / "a.png", described((4, 6, 3)))


class Session:
    """What is used of an `onnxruntime.InferenceSession`: three images a call, their means."""

    properties: dict[str, str] = {}
    image_shape = [3, 8, 8, 1]

    def __init__(self, path, providers):
        if not pathlib.Path(path).read_bytes():
            raise RuntimeError("no protobuf\nmore")
        self.providers = providers

    def get_modelmeta(self):
        return types.SimpleNamespace(custom_metadata_map=self.properties)

    def get_inputs(self):
        return [types.SimpleNamespace(name="images", shape=self.image_shape)]

    def get_outputs(self):
        return [types.SimpleNamespace(name="logits", shape=[3, 2])]

    def run(self, outputs, feeds):
        (images,) = feeds.values()
        assert images.shape == (3, 8, 8, 1)
        assert images.dtype == np.float32
        return [images.mean((1, 2)) * np.float32([1, -1])]


def test_an_onnx_file_is_run_by_onnx_runtime(folder, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    runtime = types.SimpleNamespace(InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    with pytest.raises(ValueError, match=r"model\.onnx'\) is none that ONNX Runtime runs: no prot"):
        predict.open_model(path)
    path.write_bytes(b"graph")
    with pytest.raises(ValueError, match=r"the property format=uniq_jax\.onnx"):
        predict.open_model(path)
    about = replace(ABOUT, labels=("dark", "light"))
    monkeypatch.setattr(Session, "properties", onnx_metadata("qdq", about))
    model = predict.open_model(path)
    assert (model.about, model.image_shape, model.batch) == (about, (8, 8, 1), 3)
    images = np.load(folder / "images.npy")
    means = about.normalize(images).mean((1, 2))
    np.testing.assert_array_equal(model.logits(images), means * np.float32([1, -1]))
    newer = {**asdict(about), "palette": "sRGB"}
    for changes, message in (
        ({"format_version": "2", "about": json.dumps(newer)}, "has format version 2, and this"),
        ({"about": json.dumps(newer)}, "must be JSON of name, labels, mean, std, resize_size: "),
    ):
        monkeypatch.setattr(Session, "properties", {**onnx_metadata("qdq", about), **changes})
        with pytest.raises(ValueError, match=rf"model\.onnx'\) must be a file of .*{message}"):
            predict.open_model(path)
    monkeypatch.setattr(Session, "properties", onnx_metadata("qdq", ABOUT))
    with pytest.raises(ValueError, match="has 10 labels and 2 logits; it must have a label for"):
        predict.open_model(path)
    for shape, message in (([3, 8], r"of shape \(8,\), which"), ([3, 8, 8, 2], "2 channels")):
        monkeypatch.setattr(Session, "image_shape", shape)
        with pytest.raises(ValueError, match=message):
            predict.open_model(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'uniq_jax\[onnx\]'"):
        predict.open_model(path)


def test_an_exported_onnx_file_sees_what_the_packed_file_sees(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("uniq_jax.deploy.onnx_export")
    paths = folder / "model.safetensors", tmp_path / "model.onnx"
    deploy.export_onnx(deploy.load(paths[0]), paths[1], form="integer")
    packed, onnx = map(predict.open_model, paths)
    assert onnx.about == packed.about
    images = np.load(folder / "images.npy")
    logits = (model.logits(images, batch_size=5) for model in (onnx, packed))
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


def test_it_needs_no_trainer(folder):
    script = f"""
import runpy, sys
sys.argv = ["predict", {str(folder / "model.safetensors")!r}, {str(folder / "images")!r}]
try:
    runpy.run_module("uniq_jax.predict", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
wrong = {{"flax", "optax", "orbax", "grain", "tensorflow_datasets"}} & set(sys.modules)
assert not wrong, wrong
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "seven" in process.stdout
    assert process.stderr == ""
