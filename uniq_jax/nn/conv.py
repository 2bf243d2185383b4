"""`nnx.Conv` with quantizers on its two operands."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from uniq_jax.nn.layer import QuantLayer
from uniq_jax.nn.methods import ActivationMethod, WeightMethod


class QuantConv(QuantLayer, nnx.Conv):
    """`nnx.Conv` on quantized inputs and a quantized kernel.

    Everything is as in `nnx.Conv`, parameter paths included, so that float checkpoints load;
    learned quantizer state lies in `weight_quantizer` and `activation_quantizer`. Zero padding is
    added to the quantized input, where 0 stands for 0 whether or not the grid has a zero. Circular
    and reflecting padding comes before the quantizer, which counts the copies as inputs.

    In training (`model.train()`) it convolves fake-quantized values with the methods' gradients. In
    evaluation (`model.eval()`) it convolves integer levels exactly and scales the sums once, see
    `uniq_jax.nn.levels`; the two differ by rounding only, and have the same gradients.

    Args:
      in_features: channels of the input, whose shape is (batch, *spatial, in_features).
      out_features: channels of the output.
      kernel_size: an integer or one for each spatial axis.
      *args: further positional arguments of `nnx.Conv`.
      weight: a method for the kernel, `UniqWeight(bits=2)` for example, or None for a float kernel.
      activation: a method for the input, or None for a float input.
      rngs: for the kernel and bias.
      **kwargs: every other argument of `nnx.Conv`, but `conv_general_dilated` and `promote_dtype`.

    Raises:
      TypeError: if `weight` or `activation` is no method of its kind, or one of the two functions
        is given.
      ValueError: if the levels' sums could overflow an int32, see `levels.check_accumulator`; or
        if a kernel is both masked and quantized, since no level is zero.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from uniq_jax.nn import QuantConv, UniqActivation, UniqWeight
      >>> layer = QuantConv(3, 8, (3, 3), weight=UniqWeight(2), activation=UniqActivation(2),
      ...                   rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 5, 5, 3))).shape
      (1, 5, 5, 8)
    """

    float_type = nnx.Conv

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | tuple[int, ...],
        *args: Any,
        weight: WeightMethod | None = None,
        activation: ActivationMethod | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        nnx.Conv.__init__(self, in_features, out_features, kernel_size, *args, rngs=rngs, **kwargs)
        self._add_quantizers(nnx.Conv, weight, activation)

    def _add_quantizers(self, float_class, weight, activation):
        if self.mask is not None and weight is not None:
            raise ValueError("mask must be None where the kernel is quantized: no level is zero")
        super()._add_quantizers(float_class, weight, activation)
        if self.padding == "CAUSAL" and len(self.kernel_size) == 1:
            # `nnx.Conv` would pad before the quantizer, to which zero may mean something else.
            dilation = int(np.ravel(self.kernel_dilation or 1)[0])
            self.replaced = (*self.replaced, ("padding", self.padding))
            self.padding = ((dilation * (self.kernel_size[0] - 1), 0),)

    def _kernel_shape(self):
        return tuple(self.kernel_shape)

    def conv_general_dilated(self, inputs, kernel, *args, preferred_element_type=None, **kwargs):
        """Called by `nnx.Conv` in place of `lax.conv_general_dilated`."""

        def multiply(a, b, **options):
            return jax.lax.conv_general_dilated(a, b, *args, **kwargs, **options)

        return self._product(inputs, kernel, multiply, preferred_element_type)
