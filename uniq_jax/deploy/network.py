"""The frozen network: an immutable pytree that is called with images."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uniq_jax import exact
from uniq_jax.deploy import operations
from uniq_jax.deploy.graph import Graph

_normalize = jax.jit(exact.normalize, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True)
class About:
    """What a network doesn't compute, but whoever uses it has to know.

    Attributes:
      name: of the network, for people.
      labels: of the classes, in the order of the logits; () where they have none.
      mean, std: of the training images, per channel, in 0..255; () for images as they are.
      resize_size: what the shorter side of a photo is resized to before the crop at its centre; 0
        for the input's size.
    """

    name: str = ""
    labels: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize_size: int = 0

    def normalize(self, images: Any) -> np.ndarray:
        """uint8 images, (…, channels), as the network wants them: float32, `exact.normalize`."""
        return np.asarray(_normalize(np.asarray(images), self.mean, self.std))


# Compared by identity, so that `jax.jit` takes a network for a function; its arrays are constants
# of the compiled program then, which is the fastest form.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenNetwork:
    """An integer network, made by `uniq_jax.freeze`; needs neither the model nor the trainer.

    `jax.jit(network)` compiles it; as a pytree it can also be an argument of what is compiled.

    Attributes:
      graph: its operations; static under JAX's transformations.
      arrays: int8 kernels, int32 and float32 thresholds, and float32 constants, by name.
      about: static, too.
    """

    graph: Graph = dataclasses.field(metadata={"static": True})
    arrays: dict[str, jax.Array]
    about: About = dataclasses.field(default=About(), metadata={"static": True})

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits, float32 (batch, classes).

        Args:
          images: float32 (batch, height, width, channels), normalized as in training.

        Raises:
          ValueError: if the images have another shape or dtype.
        """
        return self.values(images)[self.graph.output]

    def values(self, images: jax.Array) -> dict[str, Any]:
        """The outputs of all nodes, by name; arguments as of a call."""
        shape = getattr(images, "shape", None)
        if shape is None or tuple(shape[1:]) != self.graph.image_shape:
            wanted = ", ".join(map(str, self.graph.image_shape))
            raise ValueError(f"images of shape {shape} must have shape (batch, {wanted})")
        if images.dtype != jnp.float32:
            raise ValueError(f"images of dtype {images.dtype} must be float32")
        batch = images.shape[0]
        return operations.execute(self.graph.nodes, self.arrays, {"input": images}, batch)
