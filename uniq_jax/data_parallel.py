"""Sums over a batch that lies on several devices, in one written order.

A sum over devices that the compiler makes is an all-reduce, and its order is that of the library of
collectives: another one between the devices of one process than between those of several. The last
bit of a mean, such as a batch norm's, then puts a few of millions of activations on the other side
of a threshold. Here every device gets the sums of all the others, each for itself, and adds them
up: the bits are those of any arrangement of as many devices in processes. Gradients go back the
same way.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

AXIS = "data"
"""Name of the mesh's axis that a batch lies along."""


def on_mesh(
    mesh: Mesh | AbstractMesh, function: Callable[..., Any], *arguments: Any
) -> Callable[..., Any]:
    """`function` with first arguments, to be jitted: what it sums over a batch is summed as here.

    Args:
      mesh: of the arrays that the function will get; its axis "data" is that of the batch.
      function: that is traced.
      *arguments: static ones, that come first.

    Example:
      >>> import jax
      >>> from uniq_jax import data_parallel
      >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
      >>> parts = data_parallel.on_mesh(mesh, data_parallel.parts)
      >>> parts(8)
      1
    """

    @functools.wraps(function)
    def on_it(*more: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments, *more)

    return on_it


def parts(examples: int) -> int:
    """On how many devices a batch of so many examples lies: 1 outside of `on_mesh`.

    It is 1 too where the batch cannot be cut evenly, or the caller takes care of devices itself
    (`jax.shard_map`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names:
        return 1
    count = mesh.shape[AXIS]
    is_automatic = mesh.axis_types[mesh.axis_names.index(AXIS)] == AxisType.Auto
    return count if is_automatic and examples % count == 0 else 1


def cut(x: jax.Array, count: int) -> jax.Array:
    """(batch, ...) as (count, batch / count, ...), of which each device has its own part."""
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])


def total(sums: jax.Array) -> jax.Array:
    """Adds up what every device has: (parts, ...) to (...), on all of them."""
    count = sums.shape[0]
    sums = jax.lax.with_sharding_constraint(sums, PartitionSpec(AXIS))
    # Every device's part at its own place, and zeros elsewhere: whatever order these are added up
    # in over devices, no bit of a part changes. (Gathering them says the same, but with Gloo some
    # devices found other numbers in what they gathered.)
    own = jnp.eye(count, dtype=bool).reshape(count, count, *[1] * (sums.ndim - 1))
    placed = jnp.where(own, sums[:, None], jnp.zeros((), sums.dtype))
    placed = jax.lax.with_sharding_constraint(placed, PartitionSpec(AXIS))
    everyones = jax.lax.with_sharding_constraint(jnp.sum(placed, axis=0), PartitionSpec())
    return jnp.sum(everyones, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def copies(value: jax.Array, count: int) -> jax.Array:
    """A copy for each device: (...) to (count, ...). Its gradient is `total` of theirs."""
    value = jnp.broadcast_to(value, (count, *value.shape))
    value = jax.lax.with_sharding_constraint(value, PartitionSpec())
    return jax.lax.with_sharding_constraint(value, PartitionSpec(AXIS))


def _copies_fwd(value: jax.Array, count: int) -> tuple[jax.Array, None]:
    return copies(value, count), None


def _copies_bwd(count: int, residuals: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del count, residuals
    return (total(cotangent),)


copies.defvjp(_copies_fwd, _copies_bwd)


def mean(x: jax.Array, axes: Sequence[int], *, keepdims: bool = False) -> jax.Array:
    """`jnp.mean` of floats; where the first axis is among `axes`, it is taken for the batch."""
    count = parts(x.shape[0]) if 0 in axes else 1
    if count == 1:
        return jnp.mean(x, axis=tuple(axes), keepdims=keepdims)
    sums = jnp.sum(cut(x, count), axis=[axis + 1 for axis in axes], keepdims=keepdims)
    return total(sums) / math.prod(x.shape[axis] for axis in axes)


def std(x: jax.Array, axes: Sequence[int], *, ddof: int = 0, keepdims: bool = False) -> jax.Array:
    """`jnp.std` of floats; where the first axis is among `axes`, it is taken for the batch."""
    if 0 not in axes or parts(x.shape[0]) == 1:
        return jnp.std(x, axis=tuple(axes), ddof=ddof, keepdims=keepdims)
    count = math.prod(x.shape[axis] for axis in axes)
    squares = jnp.square(x - mean(x, axes, keepdims=True))
    return jnp.sqrt(mean(squares, axes, keepdims=keepdims) * (count / (count - ddof)))
