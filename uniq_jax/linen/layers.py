"""`nn.Conv` and `nn.Dense` with quantizers on their two operands."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from uniq_jax.linen.state import quantized_product
from uniq_jax.nn import ActivationMethod, WeightMethod
from uniq_jax.nn.product import check_methods

# What the float layers let one replace, and the quantized layers replace themselves.
_INJECTABLE = (
    "conv_general_dilated",
    "conv_general_dilated_cls",
    "dot_general",
    "dot_general_cls",
    "promote_dtype",
)


class _Quantized(nn.Module):
    """What the quantized layers share: the fields, and how they use the float layer."""

    weight: WeightMethod | None = None
    activation: ActivationMethod | None = None
    deterministic: bool | None = None

    def __post_init__(self):
        check_methods(self.weight, self.activation)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _INJECTABLE and value is not field.default:
                raise TypeError(
                    f"{field.name} (={value!r}) must be left out: "
                    f"{type(self).__qualname__} has its own"
                )
        super().__post_init__()

    def _through(
        self,
        float_class: type[nn.Module],
        function_name: str,
        function: Callable[..., jax.Array],
        inputs: jax.Array,
        deterministic: bool | None,
        **fields: Any,
    ) -> jax.Array:
        """Calls the float layer, with the product of quantized operands in place of `function`.

        The float layer's fields are this one's, but for `fields`; so is its scope.
        """
        exact = False
        if self.deterministic is not None or deterministic is not None:
            exact = bool(nn.merge_param("deterministic", self.deterministic, deterministic))

        def quantized(inputs, kernel, *args, **kwargs):
            def multiply(a, b, **options):
                return function(a, b, *args, **kwargs, **options)

            return quantized_product(
                self,
                inputs,
                kernel,
                self.weight,
                self.activation,
                multiply,
                exact=exact,
                param_dtype=fields["param_dtype"],
            )

        for field in dataclasses.fields(float_class):
            if field.init and field.name not in ("parent", "name", *_INJECTABLE, *fields):
                fields[field.name] = getattr(self, field.name)
        replaced = {function_name: quantized, "promote_dtype": _promote_all_but_kernel}
        layer = float_class(**fields, **replaced)
        nn.share_scope(self, layer)
        return layer(inputs)


def _promote_all_but_kernel(inputs, kernel, bias, *, dtype):
    """The kernel keeps its own dtype until it is quantized."""
    promoted = promote_dtype(inputs, kernel, bias, dtype=dtype)
    return promoted[0], kernel, promoted[2]


class QuantConv(_Quantized, nn.Conv):
    """`nn.Conv` on quantized inputs and a quantized kernel.

    Equal to `uniq_jax.nn.QuantConv`, of NNX, in values, gradients and parameter paths. Zero padding
    is added to the quantized input, where 0 stands for 0 whether or not the grid has a zero.
    Circular and reflecting padding comes before the quantizer. Unnamed, it gets the name that an
    `nn.Conv` would get, "Conv_0" for example.

    Attributes:
      features, …: every field of `nn.Conv`, but `conv_general_dilated`, `conv_general_dilated_cls`
        and `promote_dtype`.
      weight: a method for the kernel, `UniqWeight(bits=2)` for example, or None for a float kernel.
      activation: a method for the input, or None for a float input.
      deterministic: whether to evaluate rather than train; None to let the call say it. Where
        neither does, the layer trains; both at once are an error, as of Flax's own modules.

    Raises:
      TypeError: if `weight` or `activation` is no method of its kind, or one of the three functions
        is given.
      ValueError: when called, if the levels' sums could overflow an int32; or if a kernel is both
        masked and quantized, since no level is zero.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from uniq_jax.linen import QuantConv
      >>> from uniq_jax.nn import UniqActivation, UniqWeight
      >>> conv = functools.partial(QuantConv, weight=UniqWeight(2), activation=UniqActivation(2))
      >>> layer = conv(8, (3, 3), deterministic=True)
      >>> x = jnp.ones((1, 5, 5, 3))
      >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
      >>> y.shape, sorted(variables["params"])
      ((1, 5, 5, 8), ['activation_quantizer', 'bias', 'kernel', 'weight_quantizer'])
    """

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """The convolution of `inputs`, shape (*batch, *spatial, channels)."""
        if self.mask is not None and self.weight is not None:
            raise ValueError("mask must be None where the kernel is quantized: no level is zero")
        padding, kernel_size = self.padding, np.ravel(self.kernel_size)
        if padding == "CAUSAL" and len(kernel_size) == 1:
            # `nn.Conv` would pad before the quantizer, to which zero may mean something else.
            dilation = int(np.ravel(self.kernel_dilation or 1)[0])
            padding = [(dilation * (int(kernel_size[0]) - 1), 0)]
        return self._through(
            nn.Conv,
            "conv_general_dilated",
            jax.lax.conv_general_dilated,
            inputs,
            deterministic,
            padding=padding,
        )


class QuantDense(_Quantized, nn.Dense):
    """`nn.Dense` on quantized inputs and a quantized kernel; otherwise as `QuantConv`.

    Attributes:
      features, …: every field of `nn.Dense`, but `dot_general`, `dot_general_cls` and
        `promote_dtype`.
      weight: a method for the kernel, or None for a float kernel.
      activation: a method for the input, or None for a float input.
      deterministic: as in `QuantConv`.

    Raises:
      TypeError: if `weight` or `activation` is no method of its kind, or one of the three functions
        is given.
      ValueError: when called, if the levels' sums could overflow an int32.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """The product of `inputs`, shape (…, features), with the kernel."""
        return self._through(nn.Dense, "dot_general", jax.lax.dot_general, inputs, deterministic)


# Linen names unnamed submodules after their class. Quantized ones are to be found where the float
# ones are in a checkpoint, at "Conv_0" and not at "QuantConv_0".
QuantConv.__name__ = nn.Conv.__name__
QuantDense.__name__ = nn.Dense.__name__
