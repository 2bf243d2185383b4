"""The frozen network: an immutable pytree that is called with images."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
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
      mean, std: of the training images, in 0..255, for each channel or one for all; () for images
        as they are.
      resize_size: what the shorter side of a photo is resized to before the crop at its centre; 0
        for the input's size.

    Raises:
      ValueError: if `mean` and `std` are of different lengths, or a `std` is not positive.

    Warns:
      UserWarning: if every `std` is below 1, as those of pixels from 0 to 1 are.
    """

    name: str = ""
    labels: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize_size: int = 0

    def __post_init__(self) -> None:
        # JAX compares them, as static arguments, which lists cannot be.
        for name, kind in (("labels", str), ("mean", float), ("std", float)):
            object.__setattr__(self, name, tuple(map(kind, getattr(self, name))))
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean (={self.mean}) must have as many entries as std (={self.std})")
        if not all(0 < deviation < float("inf") for deviation in self.std):
            raise ValueError(f"std (={self.std}) must be positive")
        if self.std and max(self.std) < 1:
            warnings.warn(
                f"std (={self.std}) is of pixels from 0 to 255, where it would be below 1; that of "
                "pixels from 0 to 1, as config.data.std is, goes here times 255, and mean too",
                stacklevel=3,
            )

    def normalize(self, images: Any) -> np.ndarray:
        """uint8 images, (…, channels), as the network wants them: float32, `exact.normalize`."""
        return np.asarray(_normalize(np.asarray(images), self.mean, self.std))


@jax.tree_util.register_pytree_with_keys_class
class Arrays(Mapping[str, Any]):
    """Arrays by name, which stay as they are; a pytree.

    Args:
      items: that are copied.
    """

    def __init__(self, items: Mapping[str, Any]):
        self._items = dict(items)

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Arrays({self._items!r})"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        """As `jax.tree_util` asks for."""
        names = tuple(sorted(self._items))
        return [(jax.tree_util.DictKey(name), self._items[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Any) -> "Arrays":
        """As `jax.tree_util` asks for."""
        return cls(dict(zip(names, values)))


# Compared by identity, so that `jax.jit` takes a network for a function; its arrays are constants
# of the compiled program then, which is the fastest form.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenNetwork:
    """An integer network, made by `uniq_jax.freeze`; needs neither the model nor the trainer.

    `jax.jit(network)` compiles it; as a pytree it can also be an argument of what is compiled.

    Attributes:
      graph: its operations; static under JAX's transformations.
      arrays: int8 kernels, int32 and float32 thresholds, and float32 constants, by name; a mapping
        that cannot be changed.
      about: static, too.
    """

    graph: Graph = dataclasses.field(metadata={"static": True})
    arrays: Mapping[str, jax.Array]
    about: About = dataclasses.field(default=About(), metadata={"static": True})

    def __post_init__(self) -> None:
        if type(self.arrays) is dict:  # Under JAX's transformations it may be anything.
            object.__setattr__(self, "arrays", Arrays(self.arrays))

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
