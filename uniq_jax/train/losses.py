"""Losses of a batch of logits, as pure functions: one value for each example."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Cross entropy with labels, smoothed where asked.

    With p = softmax(logits) over C classes and y the one-hot label, `-Σ_c q_c · log p_c` where
    `q = (1 - smoothing)·y + smoothing/C`.

    Args:
      logits: float (..., classes).
      labels: integer (...).
      smoothing: in [0, 1); 0 is the plain cross entropy.

    Returns:
      Of the logits' dtype, (...).

    Example:
      >>> import jax.numpy as jnp
      >>> from uniq_jax.train.losses import cross_entropy
      >>> print(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), smoothing=0.1).round(4))
      [1.3863]

    References:
      Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016
      (arXiv:1512.00567), section 7.
    """
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing))


def distillation(
    logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Cross entropy with a teacher's output, which gets no gradient.

    `-T² · Σ_c softmax(teacher/T)_c · log softmax(logits/T)_c`, whose gradient with respect to the
    logits is `T · (softmax(logits/T) - softmax(teacher/T))`: by the factor T² of about the same
    size at every temperature T, and zero where the softmaxes agree. The loss itself then is T²
    times the teacher's entropy.

    Args:
      logits: float (..., classes).
      teacher_logits: float (..., classes).
      temperature: T, above 0; a higher one tells more of the unlikely classes.

    Returns:
      Of the logits' dtype, (...).

    Example:
      >>> import jax.numpy as jnp
      >>> from uniq_jax.train.losses import distillation
      >>> print(distillation(jnp.zeros((1, 4)), jnp.zeros((1, 4))).round(4))
      [1.3863]

    References:
      Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).
    """
    soft = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    return temperature**2 * optax.softmax_cross_entropy(logits / temperature, soft)


def mixed(
    logits: jax.Array,
    labels: jax.Array,
    teacher_logits: jax.Array,
    *,
    smoothing: float = 0.0,
    weight: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:
    """`weight · distillation + (1 - weight) · cross_entropy`.

    N2UQ's program (Liu et al., CVPR 2022, arXiv:2111.14826) has the weight and the temperature 1:
    soft labels alone.

    Args:
      logits: float (..., classes).
      labels: integer (...); they don't count at weight 1.
      teacher_logits: float (..., classes).
      smoothing: of the labels, see `cross_entropy`.
      weight: of the teacher, in [0, 1].
      temperature: see `distillation`.

    Returns:
      Of the logits' dtype, (...).
    """
    soft = distillation(logits, teacher_logits, temperature=temperature)
    if weight == 1:
        return soft
    hard = cross_entropy(logits, labels, smoothing=smoothing)
    return jnp.asarray(weight, soft.dtype) * soft + jnp.asarray(1 - weight, soft.dtype) * hard
