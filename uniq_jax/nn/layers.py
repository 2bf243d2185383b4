"""Quantized layers: `nnx.Conv` and `nnx.Linear` with quantizers on their two operands."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from uniq_jax.nn import levels
from uniq_jax.nn.methods import ActivationMethod, WeightMethod
from uniq_jax.nn.product import product_of_levels
from uniq_jax.nn.quantizer import ActivationQuantizer, WeightQuantizer

# What the float layers let one replace, and the quantized layers replace themselves.
_INJECTABLE = {
    "conv_general_dilated": jax.lax.conv_general_dilated,
    "dot_general": jax.lax.dot_general,
    "promote_dtype": promote_dtype,
}


class _Quantized(nnx.Module):
    """What the quantized layers share: the product of two operands, either quantized or not.

    The parent class's call finds `promote_dtype` and its product function (`conv_general_dilated`,
    `dot_general`) as attributes. Here they are methods, so that they read the learned state of the
    instance that is called: a function stored in the instance would go on using the state it
    captured, with a gradient of zero, after the module is split and merged.
    """

    kernel: nnx.Param[jax.Array]
    weight_quantizer: WeightQuantizer | None
    activation_quantizer: ActivationQuantizer | None

    def _drop_injected(self) -> None:
        """Uncovers this class's methods, which the parent's constructor has hidden."""
        for name, default in _INJECTABLE.items():
            if name in vars(self):
                if getattr(self, name) is not default:
                    raise TypeError(
                        f"{name} (={getattr(self, name)!r}) must be left out: "
                        f"{type(self).__name__} has its own"
                    )
                delattr(self, name)

    def _add_quantizers(
        self,
        weight: WeightMethod | None,
        activation: ActivationMethod | None,
        param_dtype: Any,
    ) -> None:
        for name, method, kind in (
            ("weight", weight, WeightMethod),
            ("activation", activation, ActivationMethod),
        ):
            if method is not None and not isinstance(method, kind):
                raise TypeError(
                    f"{name} (={method!r}) must be None or one of uniq_jax.nn's methods for "
                    f"{name}s, such as {'UniqWeight' if name == 'weight' else 'UniqActivation'}"
                    "(bits=2)"
                )
        if weight is not None and activation is not None:
            levels.check_accumulator(activation.grid, weight.grid, self._taps())
        # Set by model.train() and model.eval(): evaluation multiplies integer levels.
        self.deterministic = False
        # Set by calibrate(), which watches the float network.
        self.calibrating = False
        self.weight_quantizer = nnx.data(
            None if weight is None else WeightQuantizer(weight, self.kernel[...])
        )
        self.activation_quantizer = nnx.data(
            None
            if activation is None
            else ActivationQuantizer(
                activation, param_dtype=jnp.promote_types(param_dtype, jnp.float32)
            )
        )

    def _taps(self) -> int:
        """Products that one output sums."""
        return math.prod(self.kernel.shape[:-1])

    def promote_dtype(self, operands: tuple, *, dtype: Any, **kwargs: Any) -> tuple:
        """Promotes input and bias; the kernel keeps its own dtype until it is quantized."""
        inputs, kernel, bias = operands
        promoted = promote_dtype((inputs, kernel, bias), dtype=dtype, **kwargs)
        return promoted[0], kernel, promoted[2]

    def _product(
        self, inputs: jax.Array, kernel: jax.Array, multiply: Callable[..., jax.Array], dtype: Any
    ) -> jax.Array:
        """The product, of which `multiply(inputs, kernel, preferred_element_type=…)` is one."""
        weight, activation = self.weight_quantizer, self.activation_quantizer
        exact = self.deterministic and not self.calibrating
        if exact and weight is not None and activation is not None:
            methods = weight.method, activation.method
            return product_of_levels(
                inputs,
                kernel,
                weight.parameters,
                activation.parameters,
                methods,
                multiply,
                self._taps(),
                dtype,
            )
        quantized = inputs if activation is None else activation(inputs)
        if weight is not None and not self.calibrating:
            kernel = weight(kernel)
        return multiply(quantized, kernel.astype(inputs.dtype), preferred_element_type=dtype)


class QuantConv(_Quantized, nnx.Conv):
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
        self._drop_injected()
        if self.padding == "CAUSAL" and len(self.kernel_size) == 1:
            # `nnx.Conv` would pad before the quantizer, to which zero may mean something else.
            dilation = int(np.ravel(self.kernel_dilation or 1)[0])
            self.padding = [(dilation * (self.kernel_size[0] - 1), 0)]
        if self.mask is not None and weight is not None:
            raise ValueError("mask must be None where the kernel is quantized: no level is zero")
        self._add_quantizers(weight, activation, self.param_dtype)

    def conv_general_dilated(self, inputs, kernel, *args, preferred_element_type=None, **kwargs):
        """Called by `nnx.Conv` in place of `lax.conv_general_dilated`."""

        def multiply(a, b, **options):
            return jax.lax.conv_general_dilated(a, b, *args, **kwargs, **options)

        return self._product(inputs, kernel, multiply, preferred_element_type)


class QuantLinear(_Quantized, nnx.Linear):
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
        self._drop_injected()
        self._add_quantizers(weight, activation, self.param_dtype)

    def dot_general(self, inputs, kernel, *args, preferred_element_type=None, **kwargs):
        """Called by `nnx.Linear` in place of `lax.dot_general`."""

        def multiply(a, b, **options):
            return jax.lax.dot_general(a, b, *args, **kwargs, **options)

        return self._product(inputs, kernel, multiply, preferred_element_type)
