"""`nnx.BatchNorm` whose evaluation is one written order of rounded operations."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax import exact


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm`, evaluated so that every program finds the same bits.

    Behind a batch norm a threshold decides on a code, and the last bit may decide on the threshold.
    In evaluation this layer therefore computes, each operation rounded once,

        factor = scale / sqrt(var + epsilon)
        y      = (x - mean) * factor + bias

    Compilers may not join the product and the sum, nor take an approximate reciprocal root, as they
    may in `nnx.BatchNorm`; the two differ by rounding only. Training is that of `nnx.BatchNorm`.
    `uniq_jax.quantize` puts it in place of a model's batch norms, with the same parameters at the
    same paths. In bfloat16 it is `nnx.BatchNorm` altogether.
    """

    @classmethod
    def from_float(cls, layer: nnx.BatchNorm) -> Self:
        """The same layer, evaluated in this way; it shares the parameters of `layer`."""
        exact = object.__new__(cls)
        exact.__setstate__(layer.__getstate__())
        return exact

    def to_float(self) -> nnx.BatchNorm:
        """The `nnx.BatchNorm` with the parameters of this layer, the same objects."""
        layer = object.__new__(nnx.BatchNorm)
        layer.__setstate__(self.__getstate__())
        return layer

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`; arguments as those of `nnx.BatchNorm`."""
        evaluates = self.use_running_average if use_running_average is None else use_running_average
        operands = [None if v is None else v[...] for v in (self.scale, self.bias)]
        x_, mean, var, scale, bias = self.promote_dtype(
            (x, self.mean[...], self.var[...], *operands), dtype=self.dtype
        )
        if not evaluates or x_.dtype not in (jnp.float32, jnp.float64):
            return super().__call__(x, use_running_average, mask=mask)
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        kept = {axis % x_.ndim for axis in axes}
        shape = [n if i in kept else 1 for i, n in enumerate(x_.shape)]
        factor = inverse_deviation(var, self.epsilon, scale)
        y = exact.rescale(x_ - mean.reshape(shape), factor.reshape(shape))
        return y if bias is None else y + bias.reshape(shape)


def inverse_deviation(var: jax.Array, epsilon: float, scale: Any) -> jax.Array:
    """`scale / sqrt(var + epsilon)`, a root and a division that are rounded correctly."""
    # The maximum keeps compilers from making one approximate operation of the two.
    deviation = jnp.maximum(jnp.sqrt(var + epsilon), jnp.finfo(var.dtype).tiny)
    return (jnp.ones_like(var) if scale is None else scale) / deviation
