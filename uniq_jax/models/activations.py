"""Activation functions that blocks are given: plain ones, and the learned one of N2UQ."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.exact import exact_prelu

# What makes an activation for so many channels.
ActivationFactory = Callable[..., Callable[[jax.Array], jax.Array]]


class BiasedPRelu(nnx.Module):
    """N2UQ's activation: a bias, a PReLU and another bias, each learned for every channel.

    prelu(x + before) + after, with prelu(x) = x where x > 0, else slope·x; slopes start at 0.25.
    ReActNet (Liu et al., ECCV 2020, arXiv:2003.03488) introduced it; N2UQ has it in front of every
    quantizer.

    Args:
      features: length of the input's last axis.
      dtype: of the computation; None for that of input and parameters.
      param_dtype: of the parameters.
      rngs: not used: the parameters start as constants.
    """

    def __init__(
        self,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self.before = nnx.Param(jnp.zeros((features,), param_dtype))
        self.slope = nnx.Param(jnp.full((features,), 0.25, param_dtype))
        self.after = nnx.Param(jnp.zeros((features,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        before, slope, after = (
            p[...].astype(self.dtype or p.dtype) for p in (self.before, self.slope, self.after)
        )
        x = x + before
        # The slope's gradient is x where x is not positive, as PyTorch has it.
        return exact_prelu(x, slope) + after


def relu(features: int, **options: Any) -> Callable[[jax.Array], jax.Array]:
    """A factory of plain ReLUs."""
    del features, options
    return nnx.relu


def relu6(features: int, **options: Any) -> Callable[[jax.Array], jax.Array]:
    """A factory of ReLUs clipped at 6."""
    del features, options
    return nnx.relu6


def identity(features: int, **options: Any) -> Callable[[jax.Array], jax.Array]:
    """A factory of nothing at all."""
    del features, options
    return nnx.identity
