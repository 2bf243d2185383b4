"""Mixed examples, as pure functions."""

import jax
import jax.numpy as jnp


def share(key: jax.Array, alpha: float) -> jax.Array:
    """The part λ that an example has in its mixture: of Beta(alpha, alpha), the larger one.

    Args:
      key: a random key.
      alpha: above 0; the smaller, the less is mixed.

    Returns:
      float32 (), in [0.5, 1].
    """
    part = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    return jnp.maximum(part, 1 - part)


def mix(values: jax.Array, part: jax.Array) -> jax.Array:
    """`λ · values + (1 - λ) · partners`, where each one's partner is the one before it.

    Training examples come in random order, so that neighbours are as good as any pairing. A loss
    is linear in the labels: λ times that with the example's label and 1 - λ times that with its
    partner's is the loss with mixed labels. A teacher sees the mixed images, as the student does.

    Args:
      values: float (batch, ...).
      part: λ, float ().

    Returns:
      As `values`.

    Example:
      >>> import jax.numpy as jnp
      >>> from uniq_jax.train.mixup import mix
      >>> mix(jnp.array([0.0, 1.0, 2.0]), jnp.array(0.75)).tolist()
      [0.5, 0.75, 1.75]

    References:
      Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018 (arXiv:1710.09412).
    """
    part = part.astype(values.dtype)
    return part * values + (1 - part) * partners(values)


def partners(values: jax.Array) -> jax.Array:
    """For each example of a batch, the one before it."""
    return jnp.roll(values, 1, axis=0)
