"""Exported networks of any format as one function of images."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uniq_jax import deploy

# The properties of an ONNX file of `deploy.export_onnx`: what it is, and its `deploy.About`.
_FORMAT = ("format", "uniq_jax.onnx")
_ABOUT = "about"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One class that an image may be of.

    Attributes:
      index: of the class, in the order of the logits.
      label: its name, or the index where it has none.
      probability: by softmax, in 0..1.
    """

    index: int
    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Model:
    """A network from a file.

    Attributes:
      about: labels, and how images are prepared.
      image_shape: of one input: (height, width, channels).
      batch: images that a call takes; None for any number.
      call: of normalized images, float32 (batch, height, width, channels), to logits.
    """

    about: deploy.About
    image_shape: tuple[int, int, int]
    batch: int | None
    call: Callable[[np.ndarray], np.ndarray]

    def logits(self, images: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
        """The logits, float32 (n, classes), of uint8 images of the network's size.

        Args:
          images: (n, height, width, channels).
          batch_size: images of one call, where the file leaves it open. Batches are filled up, as
            every size takes a compilation.
        """
        size = self.batch or batch_size
        found = []
        for start in range(0, len(images), size):
            some = images[start : start + size]
            filled = np.zeros((size, *self.image_shape), np.uint8)
            filled[: len(some)] = some
            found.append(self.call(self.about.normalize(filled))[: len(some)])
        return np.concatenate(found)

    def predictions(self, logits: np.ndarray, top: int) -> list[Prediction]:
        """The most probable classes of one image's logits, (classes,), in their order."""
        shifted = logits.astype(np.float64) - logits.max()
        probabilities = np.exp(shifted) / np.exp(shifted).sum()
        order = np.argsort(-probabilities, kind="stable")[:top].tolist()
        labels = self.about.labels or tuple(map(str, range(len(logits))))
        return [Prediction(i, labels[i], float(probabilities[i])) for i in order]


def open_model(path: Path | str) -> Model:
    """Opens a packed file of `uniq_jax.deploy.save`, or an ONNX file of `deploy.export_onnx`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is of another kind, damaged, or needs a package that is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"MODEL (={str(path)!r}) is not a file")
    match path.suffix:
        case ".safetensors":
            return _of_packed(path)
        case ".onnx":
            return _of_onnx(path)
    raise ValueError(
        f"MODEL (={str(path)!r}) must be a packed file, .safetensors, or an ONNX file, .onnx"
    )


def _of_packed(path: Path) -> Model:
    network = deploy.load(path)
    shape: Any = network.graph.image_shape
    if len(shape) != 3:
        raise ValueError(
            f"MODEL (={str(path)!r}) takes arrays of shape {shape}, which are no image"
        )
    compiled = jax.jit(network)
    return Model(network.about, shape, None, lambda images: np.asarray(compiled(images)))


def _of_onnx(path: Path) -> Model:
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        raise ValueError(
            f"MODEL (={str(path)!r}) needs ONNX Runtime, of the extra uniq_jax[onnx]: "
            "pip install 'uniq_jax[onnx]'"
        ) from None
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # Its errors have no base of their own.
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"MODEL (={str(path)!r}) is none that ONNX Runtime runs: {reason}"
        ) from error
    properties = session.get_modelmeta().custom_metadata_map
    if _FORMAT not in properties.items():
        raise ValueError(
            f"MODEL (={str(path)!r}) must be a file of uniq_jax.deploy.export_onnx, which has the "
            f"property {_FORMAT[0]}={_FORMAT[1]}"
        )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in json.loads(properties[_ABOUT]).items()
    }
    source = session.get_inputs()[0]
    batch, *shape = source.shape

    def call(images: np.ndarray) -> np.ndarray:
        return session.run(None, {source.name: images})[0]

    height, width, channels = shape
    is_fixed = isinstance(batch, int) and batch > 0
    return Model(
        deploy.About(**values), (height, width, channels), batch if is_fixed else None, call
    )
