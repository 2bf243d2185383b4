"""Exported networks of any format as one function of images."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uniq_jax import deploy

# Channels of images that files hold: grey, and red, green and blue.
_CHANNELS = (1, 3)


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
      ValueError: if it is of another kind, damaged, needs a package that is not installed, or takes
        no images of files; if it has labels, but not one for each logit.
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
    compiled = jax.jit(network)
    image = jax.ShapeDtypeStruct((1, *network.graph.image_shape), np.float32)
    shape = _image_shape(
        path, network.about, network.graph.image_shape, jax.eval_shape(network, image).shape
    )
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
    try:
        about = deploy.onnx_about(session.get_modelmeta().custom_metadata_map)
    except ValueError as error:
        raise ValueError(
            f"MODEL (={str(path)!r}) must be a file of uniq_jax.deploy.export_onnx: {error}"
        ) from error
    source, result = session.get_inputs()[0], session.get_outputs()[0]
    batch, *sizes = source.shape
    shape = _image_shape(path, about, tuple(sizes), tuple(result.shape))

    def call(images: np.ndarray) -> np.ndarray:
        return session.run(None, {source.name: images})[0]

    is_fixed = isinstance(batch, int) and batch > 0
    return Model(about, shape, batch if is_fixed else None, call)


def _image_shape(
    path: Path, about: deploy.About, shape: tuple[int, ...], output: tuple[Any, ...]
) -> tuple[int, int, int]:
    """The shape of one input, (height, width, channels), of a network that tells classes of images.

    Args:
      path: of its file.
      about: whose labels are those of the logits.
      shape: of one input.
      output: the shape of its output, with the batch.

    Raises:
      ValueError: if it takes no images of files, or its output is no logits of these labels.
    """
    if len(shape) != 3:
        raise ValueError(
            f"MODEL (={str(path)!r}) takes arrays of shape {shape}, which are no image"
        )
    height, width, channels = shape
    if channels not in _CHANNELS:
        raise ValueError(
            f"MODEL (={str(path)!r}) takes images of {channels} channels, and must take those of "
            f"image files: {' or '.join(map(str, _CHANNELS))}"
        )
    if len(output) != 2:
        raise ValueError(
            f"MODEL (={str(path)!r}) gives arrays of shape {output}, which are no logits: these "
            "are (batch, classes)"
        )
    if about.labels and len(about.labels) != output[1]:
        raise ValueError(
            f"MODEL (={str(path)!r}) has {len(about.labels)} labels and {output[1]} logits; it "
            "must have a label for each logit, or none at all"
        )
    return height, width, channels
