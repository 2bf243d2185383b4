"""The files that a network is deployed by, in `WORKDIR/export`.

packed      model.safetensors               `uniq_jax.deploy.load`, `python -m uniq_jax.predict`
onnx        model.onnx, model_qdq.onnx      exact integers for ONNX Runtime; QDQ, which others fuse
openvino    openvino/model.xml, .bin        OpenVINO's own
qonnx       model.qonnx.onnx                for tools that know QONNX
stablehlo   model.stablehlo                 `jax.export.deserialize`

`export.json` beside them says what they are, and how they were checked.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.table import Table
from rich.text import Text

from uniq_jax import __version__, data, deploy
from uniq_jax.data import decoding
from uniq_jax.spec import ConfigError, ExportSpec, PhaseSpec
from uniq_jax.train import frozen as freezing
from uniq_jax.train.frozen import Frozen
from uniq_jax.train.logs import write_json
from uniq_jax.train.run import Run

EXPORT_DIRECTORY = "export"
EXPORT_FILE = "export.json"
PACKED_FILE = "model.safetensors"
SAMPLES_DIRECTORY = "images"

# Format → what must be installed, by an extra of the format's name: uniq_jax[onnx].
_EXTRAS = {"onnx": ("onnx",), "openvino": ("openvino", "onnx"), "qonnx": ("qonnx", "onnx")}

# Format → what its files are named.
_PATTERNS = {
    "packed": (PACKED_FILE,),
    "onnx": ("model.onnx*", "model_qdq.onnx*"),
    "openvino": ("openvino/model*",),
    "qonnx": ("model.qonnx.onnx*",),
    "stablehlo": ("model.stablehlo*",),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export left.

    Attributes:
      directory: of all files.
      files: format → name below the directory → bytes.
      check: of the frozen network on test images; of two forms of it, that with more mismatches.
      float_epilogues: layer → why float32 operations lie between its sums and the next codes.
    """

    directory: Path
    files: Mapping[str, Mapping[str, int]]
    check: deploy.Verification
    float_epilogues: Mapping[str, str]


def check_installed(export: ExportSpec) -> None:
    """Raises a ConfigError if a format needs a package that is not installed."""
    for name in export.names:
        if any(importlib.util.find_spec(package) is None for package in _EXTRAS.get(name, ())):
            raise ConfigError(
                f"config.export.formats (={export.formats!r}) has {name!r}, which needs the extra "
                f"uniq_jax[{name}]: pip install 'uniq_jax[{name}]'"
            )


def write(run: Run, phase: PhaseSpec, step: int, frozen: Frozen, workdir: Path) -> Exported:
    """Writes the files of all formats that the config names, and `export.json`.

    Args:
      run: whose config says what to write.
      phase: that trained the network.
      step: of the phase.
      frozen: the network.
      workdir: of the run.

    Raises:
      ValueError, NotImplementedError: if a format cannot hold the network.
      OSError: if a file cannot be written.
    """
    spec, directory = run.spec.export, workdir / EXPORT_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    before = _of_this_step(directory, phase.name, step)
    found, steps = frozen.check, frozen.network
    wants_steps = {"qonnx"} if spec.exact else {"onnx", "openvino", "qonnx"}
    if wants_steps.intersection(spec.names):
        # The codes are the same; formats that know steps make more of it.
        shape, about = frozen.network.graph.image_shape, frozen.network.about
        steps = deploy.freeze(frozen.model, shape, integer_thresholds=False, about=about)
        other = freezing.check(run, phase, frozen.model, steps)
        found = max(found, other, key=lambda check: check.mismatches)
    float_epilogues = {
        layer.path: layer.output
        for layer in deploy.layers(frozen.network)
        if layer.has_float_epilogue
    }
    description = {
        "network": frozen.network.about.name,
        "phase": phase.name,
        "step": step,
        "image_shape": frozen.network.graph.image_shape,
        "files": dict(before.get("files", {})),
        "options": dict(before.get("options", {})),
        "check": {
            **dataclasses.asdict(found),
            "codes": found.codes,
            "mismatches": found.mismatches,
        },
        "float_epilogues": float_epilogues,
        "versions": {
            **before.get("versions", {}),
            "uniq_jax": __version__,
            "jax": jax.__version__,
        },
    }
    files: dict[str, dict[str, int]] = {}
    for name in spec.names:
        # Files that are there are described at any time, and no others.
        description["files"].pop(name, None)
        write_json(directory / EXPORT_FILE, description)
        _export(name, frozen.network, steps, directory, spec)
        files[name] = {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in _files(directory, name)
        }
        description["files"][name] = files[name]
        description["options"][name] = {"batch": spec.batch, "exact": spec.exact}
        if name in _EXTRAS:
            description["versions"][name] = importlib.metadata.version(name)
        write_json(directory / EXPORT_FILE, description)
    if spec.sample_images:
        _write_samples(run, directory / SAMPLES_DIRECTORY, spec.sample_images)
    return Exported(directory, files, found, float_epilogues)


def _of_this_step(directory: Path, phase: str, step: int) -> dict[str, Any]:
    """What `export.json` says, if it is of this step; else its files are removed."""
    path = directory / EXPORT_FILE
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    if (before["phase"], before["step"]) == (phase, step):
        return before
    for name in (name for of_format in before["files"].values() for name in of_format):
        (directory / name).unlink(missing_ok=True)
    path.unlink()
    return {}


def table(exported: Exported) -> Table:
    """The files, with their sizes; where float epilogues are; and how many codes differ."""
    files = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    files.add_column("file", overflow="fold")
    files.add_column("bytes", justify="right")
    for sizes in exported.files.values():
        for name, size in sizes.items():
            files.add_row(Text(str(exported.directory / name)), f"{size:,}")
    whole = Table.grid()
    whole.add_row(files)
    whole.add_row("")
    whole.add_row(Text(epilogues(exported.float_epilogues)))
    whole.add_row(Text(exported.check.summary()))
    return whole


def epilogues(layers: Mapping[str, str]) -> str:
    """How many layers have a float epilogue, and why; one line."""
    if not layers:
        return "layers with a float epilogue: none"
    reasons = Counter(output.partition("float epilogue: ")[2] for output in layers.values())
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    return f"layers with a float epilogue: {len(layers)} ({counts}); {EXPORT_FILE} lists them"


def _export(
    name: str,
    network: deploy.FrozenNetwork,
    steps: deploy.FrozenNetwork,
    directory: Path,
    spec: ExportSpec,
) -> None:
    """Writes the files of one format, of the exact network or of `steps`, which is faster there."""
    batch, fast = spec.batch or None, network if spec.exact else steps
    match name:
        case "packed":
            deploy.save(network, directory / PACKED_FILE)
        case "onnx":
            deploy.export_onnx(network, directory / "model.onnx", form="integer", batch=batch)
            deploy.export_onnx(fast, directory / "model_qdq.onnx", form="qdq", batch=batch)
        case "openvino":
            (directory / "openvino").mkdir(exist_ok=True)
            # Binary convolutions take up integer thresholds; others are faster without.
            chosen = network if _has_binary_layers(network) else fast
            deploy.export_openvino(chosen, directory / "openvino" / "model.xml", batch=batch)
        case "qonnx":
            path, batch = directory / "model.qonnx.onnx", batch or 1
            try:
                deploy.export_qonnx(fast, path, batch=batch, levels=spec.exact)
            except NotImplementedError:
                if not spec.exact:
                    raise
                # Integer thresholds that float32 cannot hold: the codes are the same without.
                deploy.export_qonnx(steps, path, batch=batch, levels=True)
        case "stablehlo":
            deploy.export_stablehlo(network, directory / "model.stablehlo", batch=batch)


def _has_binary_layers(network: deploy.FrozenNetwork) -> bool:
    products = [node for node in network.graph.nodes if node.operation == "integer_product"]
    return any(node["activation"][0] == node["weight"][0] == 1 for node in products)


def _files(directory: Path, name: str) -> list[Path]:
    """Those of a format that are there."""
    return sorted(path for pattern in _PATTERNS[name] for path in directory.glob(pattern))


def _write_samples(run: Run, directory: Path, count: int) -> None:
    """Writes test images, each named by its place in the test set and its label."""
    directory.mkdir(exist_ok=True)
    source = run.test_data
    rows = range(min(count, len(source)))
    if isinstance(source, data.ImageData):
        encoded = [decoding.encode_png(source.images[row]) for row in rows]
        labels = [int(source.labels[row]) for row in rows]
    else:
        # As they are stored: the crop is the network's affair.
        records = source.records.read(rows)
        encoded = [record.encoded for record in records]
        labels = [record.label for record in records]
    for row, image, label in zip(rows, encoded, labels):
        name = re.sub(r"[^\w-]+", "_", source.class_names[label])[:40]
        (directory / f"{row:03}_is_{name}.{_suffix(image)}").write_bytes(image)


def _suffix(image: bytes) -> str:
    """Of a file of one of the kinds that are read."""
    begins = {b"\x89PNG": "png", b"BM": "bmp", b"GIF8": "gif"}
    return next((begins[mark] for mark in begins if image.startswith(mark)), "jpg")
