"""The mesh, and where arrays lie on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# In elements; see `state_shardings`.
_SMALLEST_SHARDED = 4096


def create_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes "data" and "model" over all devices.

    Args:
      axes: devices along each axis; one of them may be -1, for all the rest.
      devices: by default all of them, of every process.

    Raises:
      ValueError: if the axes do not multiply to the number of devices.
    """
    if devices is None:
        # By process, so that the rows of a batch that one process reads lie next to each other.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    sizes = [axes["data"], axes["model"]]
    if sizes.count(-1) == 1:
        rest = -sizes[0] * sizes[1]
        sizes[sizes.index(-1)] = len(devices) // rest
    if min(sizes) < 1 or sizes[0] * sizes[1] != len(devices):
        raise ValueError(
            f"config.mesh (={dict(axes)}) must multiply to the number of devices, which is "
            f"{len(devices)}; one axis may be -1"
        )
    return Mesh(np.asarray(devices).reshape(sizes), ("data", "model"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples spread over the axis "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(value: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, where it is to lie; no process sends it to another."""
    return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


def whole(array: jax.Array) -> np.ndarray | None:
    """The array on the host; None where this process holds only a part of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    shards = {str(shard.index): shard for shard in array.addressable_shards}
    if sum(shard.data.size for shard in shards.values()) < array.size:
        return None
    result = np.empty(array.shape, array.dtype)
    for shard in shards.values():
        result[shard.index] = shard.data
    return result


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """For each array of a state: its largest axis that "model" divides, or a copy everywhere.

    Of axes of one size it is the last, that of a kernel's outputs: their sums then need no other
    device. Vectors and scalars (biases, batch norms, learned steps and thresholds), and arrays of
    fewer than 4096 elements, lie on every device: together they are a thousandth of a network, and
    to fetch one costs what a message costs, more than the memory is worth.

    Args:
      mesh: with the axis "model".
      abstract_state: a tree of arrays or ShapeDtypeStructs.

    Returns:
      A tree of shardings. Optimizer state and averages lie as the parameters of their shape do.
    """

    def place(array: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = mesh.shape["model"]
        divisible = [i for i, n in enumerate(array.shape) if n % parts == 0]
        is_small = len(array.shape) < 2 or math.prod(array.shape) < _SMALLEST_SHARDED
        if parts == 1 or is_small or not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda i: (array.shape[i], i))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))

    return jax.tree.map(place, abstract_state)


def check_batch(mesh: Mesh, key: str, batch_size: int) -> None:
    """Raises a ValueError unless a batch spreads evenly over the axis "data"."""
    parts = mesh.shape["data"]
    if batch_size % parts:
        raise ValueError(
            f"config.data.{key} (={batch_size}) must be a multiple of the devices along the mesh's "
            f"data axis, which are {parts}"
        )


def check_microbatches(mesh: Mesh, key: str, batch_size: int, count: int) -> None:
    """Raises a ValueError unless each of `count` microbatches spreads evenly over "data"."""
    parts = mesh.shape["data"]
    if batch_size % (parts * count):
        raise ValueError(
            f"{key} (={count}) times the devices along the mesh's data axis, which are {parts}, "
            f"must divide config.data.batch_size (={batch_size})"
        )


def to_devices(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Puts this process's part of a global batch on its devices."""
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
