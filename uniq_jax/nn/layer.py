"""What the quantized layers share: quantizers on the two operands of a float layer's product."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from uniq_jax.nn import capture, levels
from uniq_jax.nn.methods import ActivationMethod, WeightMethod
from uniq_jax.nn.product import check_methods, product
from uniq_jax.nn.quantizer import ActivationQuantizer, WeightQuantizer

# What float layers let one replace, by name, with what it may be: the quantized layers replace
# it themselves.
_INJECTABLE: dict[str, tuple[Any, ...]] = {
    "conv_general_dilated": (jax.lax.conv_general_dilated,),
    "dot_general": (jax.lax.dot_general, None),
    "dot_general_cls": (None,),
    "einsum_op": (jnp.einsum,),
    "promote_dtype": (promote_dtype,),
}

# What a quantized layer has in addition to its float layer's attributes.
_ADDED = (
    "float_class",
    "replaced",
    "deterministic",
    "calibrating",
    "weight_quantizer",
    "activation_quantizer",
)


class QuantLayer(nnx.Module):
    """Base of the quantized layers, each of which is a float layer of NNX too.

    The float layer's call finds `promote_dtype` and its product function (`conv_general_dilated`,
    `dot_general`, `einsum_op`) as attributes. Here they are methods, so that they read the learned
    state of the instance that is called: a function stored in the instance would go on using the
    state it captured, with a gradient of zero, after the module is split and merged.

    Attributes:
      weight_quantizer: of the kernel, or None.
      activation_quantizer: of the input, or None.
      float_class: what `to_float` makes of it.
      replaced: attributes of the float layer that have another value here, or none.
      deterministic: set by `model.train()` and `model.eval()`; evaluation multiplies levels.
      calibrating: set by `calibrate`, which watches the float network.
    """

    float_type: ClassVar[type[nnx.Module]]

    kernel: nnx.Param[jax.Array]
    weight_quantizer: WeightQuantizer | None
    activation_quantizer: ActivationQuantizer | None

    @classmethod
    def from_float(
        cls,
        layer: nnx.Module,
        *,
        weight: WeightMethod | None = None,
        activation: ActivationMethod | None = None,
    ) -> Self:
        """The quantized form of a float layer, which stays as it is.

        Args:
          layer: a float layer of this class's kind. Its parameters and other attributes become
            those of the result, the same objects. A kernel with more leading axes than the layer's
            own (made by `nnx.vmap`) is that of as many layers, with learned scalars of their own.
          weight: as in the constructor.
          activation: as in the constructor.

        Raises:
          TypeError, ValueError: as in the constructor.
        """
        quantized = object.__new__(cls)
        quantized.__setstate__(layer.__getstate__())
        quantized._add_quantizers(type(layer), weight, activation)
        return quantized

    def to_float(self) -> Any:
        """The float layer, with the parameters of this one, the same objects."""
        layer = object.__new__(self.float_class)
        layer.__setstate__(self.__getstate__())
        for name in _ADDED:
            delattr(layer, name)
        for name, value in self.replaced:
            setattr(layer, name, value)
        return layer

    def set_view(self, deterministic: bool | None = None) -> None:
        """Called by `nnx.view`.

        Args:
          deterministic: whether to evaluate, on levels, rather than train.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _add_quantizers(
        self,
        float_class: type[nnx.Module],
        weight: WeightMethod | None,
        activation: ActivationMethod | None,
    ) -> None:
        check_methods(weight, activation)
        self.float_class = float_class
        self.replaced: tuple[tuple[str, Any], ...] = ()
        self._drop_injected()
        stack = self._stack()
        if weight is not None and activation is not None:
            levels.check_accumulator(activation.grid, weight.grid, self._taps())
        self.deterministic = False
        self.calibrating = False
        self.weight_quantizer = nnx.data(
            None
            if weight is None
            else WeightQuantizer(
                weight, self.kernel[...], channel_axis=self._channel_axes(), stacked=len(stack)
            )
        )
        self.activation_quantizer = nnx.data(
            None
            if activation is None
            else ActivationQuantizer(
                activation,
                param_dtype=jnp.promote_types(self.kernel.dtype, jnp.float32),
                stack=stack,
            )
        )

    def _drop_injected(self) -> None:
        """Uncovers this class's methods, which the float layer's attributes hide."""
        for name, allowed in _INJECTABLE.items():
            if name not in vars(self):
                continue
            value = getattr(self, name)
            if value not in allowed:
                raise TypeError(
                    f"{name} (={value!r}) must be left out: {type(self).__name__} has its own"
                )
            if hasattr(type(self), name):
                self.replaced = (*self.replaced, (name, value))
                delattr(self, name)

    @abc.abstractmethod
    def _kernel_shape(self) -> tuple[int, ...]:
        """The kernel's shape without the axes that transforms stack layers along."""

    def _channel_axes(self) -> tuple[int, ...]:
        """The kernel's axes that the product keeps, negative, in order."""
        return (-1,)

    def _stack(self) -> tuple[int, ...]:
        """The leading axes along which a transform has stacked layers, none in a single layer."""
        shape, own = self.kernel.shape, self._kernel_shape()
        count = len(shape) - len(own)
        if count < 0 or shape[count:] != own:
            raise ValueError(
                f"kernel of shape {shape} must have shape {own}, or that behind further axes (of "
                "layers that a transform has stacked, along the first axis)"
            )
        return shape[:count]

    def _taps(self) -> int:
        """Products that one output sums."""
        shape = self._kernel_shape()
        return math.prod(shape) // max(math.prod(shape[axis] for axis in self._channel_axes()), 1)

    def promote_dtype(self, operands: tuple, *, dtype: Any, **kwargs: Any) -> tuple:
        """Promotes input and bias; the kernel keeps its own dtype until it is quantized."""
        inputs, kernel, bias = operands
        promoted = promote_dtype((inputs, kernel, bias), dtype=dtype, **kwargs)
        return promoted[0], kernel, promoted[2]

    def _product(
        self,
        inputs: jax.Array,
        kernel: jax.Array,
        multiply: Callable[..., jax.Array],
        dtype: Any,
        place_scale: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """The product, of which `multiply(inputs, kernel, preferred_element_type=…)` is one.

        `place_scale` takes one number for each of the kernel's channels, flat, and gives them the
        output's axes; without it they lie along the last one.
        """
        weight, activation = self.weight_quantizer, self.activation_quantizer
        if self.calibrating:
            watched = inputs if activation is None else activation(inputs)
            return multiply(watched, kernel.astype(inputs.dtype), preferred_element_type=dtype)

        if capture.is_recording() and (weight is not None or activation is not None):
            return capture.product(self, inputs, kernel, multiply, dtype, place_scale)
        if activation is not None:
            activation.observe(inputs)
        capture.tap(activation, inputs)

        def multiply_columns(a, columns, **options):
            restored = columns if weight is None else weight.from_columns(columns, kernel.shape)
            return multiply(a, restored, **options)

        return product(
            inputs,
            kernel if weight is None else weight.to_columns(kernel),
            None if weight is None else (weight.method, weight.column_parameters),
            None if activation is None else (activation.method, activation.parameters),
            multiply_columns,
            exact=self.deterministic,
            dtype=dtype,
            place_scale=place_scale,
        )
