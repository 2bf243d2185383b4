"""Operations of float networks in a written order, so that every program finds the same bits.

A network that is quantized takes a code from what these compute. Those that are jitted are programs
of their own to JAX's tracing, under their names, by which `uniq_jax.freeze` knows them.
"""

import jax
import jax.numpy as jnp


def rescale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x * scale`, rounded once here, whatever follows.

    Compilers fuse a product into the sum that follows it, with one rounding for both, or don't,
    depending on what surrounds them. The maximum, which changes no finite number, is in the way.
    """
    return jnp.maximum(x * scale, jnp.finfo(x.dtype).min)


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
      (batch, channels): the sum times 1 / (height · width).

    Example:
      >>> import jax.numpy as jnp
      >>> exact_mean(jnp.arange(4.0).reshape(1, 2, 2, 1)).tolist()
      [[1.5]]
    """
    height, width = x.shape[1:3]
    rows = jax.lax.index_in_dim(x, 0, 1, keepdims=False)
    for i in range(1, height):
        rows = rows + jax.lax.index_in_dim(x, i, 1, keepdims=False)
    total = jax.lax.index_in_dim(rows, 0, 1, keepdims=False)
    for j in range(1, width):
        total = total + jax.lax.index_in_dim(rows, j, 1, keepdims=False)
    return rescale(total, jnp.asarray(1 / (height * width), total.dtype))
