"""Operations of float networks in a written order, so that every program finds the same bits.

A network that is quantized takes a code from what these compute. Those that are jitted are programs
of their own to JAX's tracing, under their names, by which `uniq_jax.freeze` knows them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def rescale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x * scale`, rounded once here, whatever follows.

    Compilers fuse a product into the sum that follows it, with one rounding for both, or don't,
    depending on what surrounds them. The maximum, which changes no finite number, is in the way.
    """
    return jnp.maximum(x * scale, jnp.finfo(x.dtype).min)


def normalize(
    images: Any, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32
) -> jax.Array:
    """`(x − mean) · (1 / std)`: 1 / std is rounded once, as are the difference and the product.

    Compilers divide by a constant, or multiply by its reciprocal; here there is nothing to choose,
    so that training, evaluation and a frozen network see the same numbers.

    Args:
      images: (..., channels), of any real dtype.
      mean: of each channel, in the units of the images; () for images as they are.
      std: of each channel.
      dtype: of the result.

    Example:
      >>> import jax.numpy as jnp
      >>> normalize(jnp.array([[7, 9]], jnp.uint8), (5.0, 5.0), (2.0, 8.0)).tolist()
      [[1.0, 0.5]]
    """
    values = jnp.asarray(images).astype(dtype)
    if not len(mean):
        return values
    reciprocals = (1 / np.asarray(std, np.float64)).astype(dtype)
    return rescale(values - jnp.asarray(mean, dtype), jnp.asarray(reciprocals))


@jax.jit
def exact_prelu(x: jax.Array, slope: jax.Array) -> jax.Array:
    """`x` where it is positive, else `slope * x`, a product that is rounded before what follows.

    Args:
      x: floating, (..., channels).
      slope: (channels,), of the same dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> exact_prelu(jnp.array([-2.0, 3.0]), jnp.array([0.25, 0.25])).tolist()
      [-0.5, 3.0]
    """
    return jnp.where(x > 0, x, rescale(x, slope))


@jax.jit
def exact_mean(x: jax.Array) -> jax.Array:
    """The mean over the pixels: rows are summed from the top, then columns from the left.

    `jnp.mean` leaves the order, and with it the last bit, to the compiler.

    Args:
      x: floating, (batch, height, width, channels).

    Returns:
      (batch, channels), of x's dtype: the sum times 1 / (height · width), in float32 at least.

    Example:
      >>> import jax.numpy as jnp
      >>> exact_mean(jnp.arange(4.0).reshape(1, 2, 2, 1)).tolist()
      [[1.5]]
    """
    height, width, dtype = *x.shape[1:3], x.dtype
    x = x.astype(jnp.promote_types(dtype, jnp.float32))
    rows = jax.lax.index_in_dim(x, 0, 1, keepdims=False)
    for i in range(1, height):
        rows = rows + jax.lax.index_in_dim(x, i, 1, keepdims=False)
    total = jax.lax.index_in_dim(rows, 0, 1, keepdims=False)
    for j in range(1, width):
        total = total + jax.lax.index_in_dim(rows, j, 1, keepdims=False)
    return rescale(total, jnp.asarray(1 / (height * width), total.dtype)).astype(dtype)
