"""`nnx.Linear` and `nnx.LinearGeneral` with quantizers on their two operands."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from uniq_jax.nn.layer import QuantLayer
from uniq_jax.nn.methods import ActivationMethod, WeightMethod


class QuantLinear(QuantLayer, nnx.Linear):
    """`nnx.Linear` on quantized inputs and a quantized kernel; otherwise as `QuantConv`.

    Args:
      in_features: length of the input's last axis.
      out_features: length of the output's last axis.
      weight: a method for the kernel, or None for a float kernel.
      activation: a method for the input, or None for a float input.
      rngs: for the kernel and bias.
      **kwargs: every other argument of `nnx.Linear`, but `dot_general` and `promote_dtype`.

    Raises:
      TypeError: if `weight` or `activation` is no method of its kind, or one of the two functions
        is given.
      ValueError: if the levels' sums could overflow an int32, see `levels.check_accumulator`.
    """

    float_type = nnx.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: WeightMethod | None = None,
        activation: ActivationMethod | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **kwargs)
        self._add_quantizers(nnx.Linear, weight, activation)

    def _kernel_shape(self):
        return (self.in_features, self.out_features)

    def dot_general(self, inputs, kernel, *args, preferred_element_type=None, **kwargs):
        """Called by `nnx.Linear` in place of `lax.dot_general`."""

        def multiply(a, b, **options):
            return jax.lax.dot_general(a, b, *args, **kwargs, **options)

        return self._product(inputs, kernel, multiply, preferred_element_type)


class QuantLinearGeneral(QuantLayer, nnx.LinearGeneral):
    """`nnx.LinearGeneral` on quantized inputs and a quantized kernel; otherwise as `QuantConv`.

    Every output feature, over all axes of `out_features` and of `batch_axis`, is a channel: it has
    a step of its own where steps go by channel, and the step's shape is the kernel's with 1 for
    each axis of `in_features`.

    Args:
      in_features: length of the input's axis or axes that are summed over.
      out_features: length of the output's last axis or axes.
      weight: a method for the kernel, or None for a float kernel.
      activation: a method for the input, or None for a float input.
      rngs: for the kernel and bias.
      **kwargs: every other argument of `nnx.LinearGeneral`, but `dot_general`, `dot_general_cls`
        and `promote_dtype`.

    Raises:
      TypeError: if `weight` or `activation` is no method of its kind, or one of the three functions
        is given.
      ValueError: if the levels' sums could overflow an int32, see `levels.check_accumulator`.

    Example:
      >>> from flax import nnx
      >>> from uniq_jax.nn import QuantLinearGeneral, UniqWeight
      >>> heads = QuantLinearGeneral(6, (2, 3), weight=UniqWeight(2, "channel"), rngs=nnx.Rngs(0))
      >>> heads.kernel.shape, heads.weight_quantizer.step.shape
      ((6, 2, 3), (1, 2, 3))
    """

    float_type = nnx.LinearGeneral

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        weight: WeightMethod | None = None,
        activation: ActivationMethod | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        nnx.LinearGeneral.__init__(self, in_features, out_features, rngs=rngs, **kwargs)
        self._add_quantizers(nnx.LinearGeneral, weight, activation)

    def _kernel_shape(self):
        return (*self.batch_axis.values(), *self.in_features, *self.out_features)

    def _channel_axes(self):
        rank, batch, outputs = (
            len(self._kernel_shape()),
            len(self.batch_axis),
            len(self.out_features),
        )
        return (*range(-rank, batch - rank), *range(-outputs, 0))

    def dot_general(
        self, inputs, kernel, dimension_numbers, *args, preferred_element_type=None, **kwargs
    ):
        """Called by `nnx.LinearGeneral` in place of `lax.dot_general`."""
        (summed, _), (batch, _) = dimension_numbers
        free = inputs.ndim - len(summed) - len(batch)

        def multiply(a, b, **options):
            return jax.lax.dot_general(a, b, dimension_numbers, *args, **kwargs, **options)

        def place_scale(scale):
            return scale.reshape(*kernel.shape[: len(batch)], *(1,) * free, *self.out_features)

        return self._product(inputs, kernel, multiply, preferred_element_type, place_scale)
