"""`nnx.BatchNorm` in one written order of operations: in evaluation, and among devices."""

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax import data_parallel, exact


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm`, evaluated so that every program finds the same bits.

    Behind a batch norm a threshold decides on a code, and the last bit may decide on the threshold.
    In evaluation this layer therefore computes, each operation rounded once,

        factor = scale / sqrt(var + epsilon)
        y      = (x - mean) * factor + bias

    Compilers may not join the product and the sum, nor take an approximate reciprocal root, as they
    may in `nnx.BatchNorm`; the two differ by rounding only. In bfloat16 it is `nnx.BatchNorm`'s.

    Training is that of `nnx.BatchNorm`, but that devices which share a batch (see
    `uniq_jax.data_parallel`) add up its sums, and those of the gradient, in one order, whichever
    processes they belong to. With a `mask` or an `axis_name`, without `use_fast_variance`, or where
    features have several axes or the first one, it is `nnx.BatchNorm` altogether.

    `uniq_jax.quantize` puts it in place of a model's batch norms, with the same parameters at the
    same paths.
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
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        kept = {axis % x_.ndim for axis in axes}
        trains = evaluates is not None and not evaluates  # None is an error there.
        is_plain = mask is None and self.axis_name is None and self.use_fast_variance
        if trains and is_plain and len(kept) == 1 and 0 not in kept:
            count = data_parallel.parts(x_.shape[0])
            if count > 1:
                return self._train(data_parallel.cut(x_, count), kept, scale, bias).reshape(x.shape)
        if not evaluates or x_.dtype not in (jnp.float32, jnp.float64):
            return super().__call__(x, use_running_average, mask=mask)
        shape = [n if i in kept else 1 for i, n in enumerate(x_.shape)]
        factor = inverse_deviation(var, self.epsilon, scale)
        y = exact.rescale(x_ - mean.reshape(shape), factor.reshape(shape))
        return y if bias is None else y + bias.reshape(shape)

    def _train(self, x: jax.Array, kept: set[int], scale: Any, bias: Any) -> jax.Array:
        """Normalizes by the batch's own statistics, and moves the running ones.

        Args:
          x: (parts, batch / parts, ...), each part on a device of its own.
          kept: the axis of features, counted without that of parts.
          scale: of the features, or None.
          bias: of the features, or None.
        """
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = [i + 1 for i in range(x.ndim - 1) if i not in kept]
        sums = [jnp.sum(v, axes) for v in (wide, jnp.square(wide))]
        examples = x.shape[0] * math.prod(x.shape[axis] for axis in axes)
        mean, square = data_parallel.total(jnp.stack(sums, 1)) / examples
        var = jnp.maximum(square - jnp.square(mean), 0)
        for running, value in ((self.mean, mean), (self.var, var)):
            moved = self.momentum * running[...] + (1 - self.momentum) * value
            running[...] = jax.lax.stop_gradient(moved)
        factor = jax.lax.rsqrt(var + self.epsilon)
        if scale is not None:
            factor = factor * scale
        shift = jnp.zeros_like(mean) if bias is None else bias.astype(mean.dtype)
        # Each part has a copy, so that their gradients are sums over the part, and meet in `total`.
        copies: jax.Array = data_parallel.copies(jnp.stack([mean, factor, shift]), x.shape[0])
        shape = [n if i == 0 or i - 1 in kept else 1 for i, n in enumerate(x.shape)]
        mean, factor, shift = (copies[:, i].reshape(shape) for i in range(3))
        return ((wide - mean) * factor + shift).astype(x.dtype)


def inverse_deviation(var: jax.Array, epsilon: float, scale: Any) -> jax.Array:
    """`scale / sqrt(var + epsilon)`, a root and a division that are rounded correctly."""
    # The maximum keeps compilers from making one approximate operation of the two.
    deviation = jnp.maximum(jnp.sqrt(var + epsilon), jnp.finfo(var.dtype).tiny)
    return (jnp.ones_like(var) if scale is None else scale) / deviation
