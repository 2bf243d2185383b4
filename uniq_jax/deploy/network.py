"""The frozen network: an immutable pytree that is called with images."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from uniq_jax.deploy import operations
from uniq_jax.deploy.graph import Graph


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
    """An integer network, made by `uniq_jax.freeze`.

    Attributes:
      graph: its operations; static under JAX's transformations.
      arrays: int8 kernels, int32 and float32 thresholds, and float32 constants, by name.
    """

    graph: Graph = dataclasses.field(metadata={"static": True})
    arrays: dict[str, jax.Array]

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits, float32 (batch, classes).

        Args:
          images: float32 (batch, height, width, channels), normalized as in training.

        Raises:
          ValueError: if the images have another shape or dtype.
        """
        return self.values(images)[self.graph.output]

    def values(self, images: jax.Array) -> dict[str, Any]:
        """The outputs of all nodes, by name."""
        shape = getattr(images, "shape", None)
        if shape is None or tuple(shape[1:]) != self.graph.image_shape:
            wanted = ", ".join(map(str, self.graph.image_shape))
            raise ValueError(f"images of shape {shape} must have shape (batch, {wanted})")
        if images.dtype != jnp.float32:
            raise ValueError(f"images of dtype {images.dtype} must be float32")
        batch = images.shape[0]
        return operations.execute(self.graph.nodes, self.arrays, {"input": images}, batch)
