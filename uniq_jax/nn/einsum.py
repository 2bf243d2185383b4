"""`nnx.Einsum` with quantizers on its two operands."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from uniq_jax.nn.layer import QuantLayer
from uniq_jax.nn.methods import ActivationMethod, WeightMethod


class QuantEinsum(QuantLayer, nnx.Einsum):
    """`nnx.Einsum` on quantized inputs and a quantized kernel; otherwise as `QuantConv`.

    Every entry of the kernel's axes that appear in the output is a channel: it has a step of its
    own where steps go by channel, and the step's shape is the kernel's with 1 for each axis that is
    summed over.

    Args:
      einsum_str: the equation, which must say how many products an output sums: the kernel has no
        "..." and no letter twice, at least one of its axes is summed over, and no axis that only
        the input has is. Another one may be given in a call if it keeps the same axes of the
        kernel.
      kernel_shape: shape of the kernel.
      *args: further positional arguments of `nnx.Einsum`.
      weight: a method for the kernel, or None for a float kernel.
      activation: a method for the input, or None for a float input.
      rngs: for the kernel and bias.
      **kwargs: every other argument of `nnx.Einsum`, but `einsum_op` and `promote_dtype`.

    Raises:
      TypeError: if `weight` or `activation` is no method of its kind, or one of the two functions
        is given.
      ValueError: if the equation doesn't say how many products an output sums; or if the levels'
        sums could overflow an int32, see `levels.check_accumulator`.

    Example:
      >>> from flax import nnx
      >>> from uniq_jax.nn import QuantEinsum, UniqWeight
      >>> heads = QuantEinsum("nta,hab->nthb", (8, 2, 4), weight=UniqWeight(2, "channel"),
      ...                     rngs=nnx.Rngs(0))
      >>> heads.weight_quantizer.step.shape
      (8, 1, 4)
    """

    float_type = nnx.Einsum

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        *args: Any,
        weight: WeightMethod | None = None,
        activation: ActivationMethod | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        nnx.Einsum.__init__(self, einsum_str, tuple(kernel_shape), *args, rngs=rngs, **kwargs)
        self._add_quantizers(nnx.Einsum, weight, activation)

    def _kernel_shape(self):
        return tuple(self.kernel_shape)

    def _channel_axes(self):
        return _kept_axes(self.einsum_str)

    def einsum_op(self, einsum_str, inputs, kernel, *, preferred_element_type=None, **kwargs):
        """Called by `nnx.Einsum` in place of `jnp.einsum`."""
        kept = _kept_axes(einsum_str)
        if kept != self._channel_axes():
            raise ValueError(
                f"einsum_str (={einsum_str!r}) must keep the same axes of the kernel as "
                f"{self.einsum_str!r}, for which it was quantized"
            )
        input_axes, kernel_axes, output_axes = _operands(einsum_str)

        def multiply(a, b, **options):
            return jnp.einsum(einsum_str, a, b, **kwargs, **options)

        def place_scale(scale):
            channels = "".join(kernel_axes[axis] for axis in kept)
            scale = scale.reshape([kernel.shape[axis] for axis in kept])
            scale = jnp.einsum(
                f"{channels}->{''.join(sorted(channels, key=output_axes.find))}", scale
            )
            sizes = dict(zip(kernel_axes, kernel.shape))
            ellipsis = "." * (inputs.ndim - len(input_axes.replace("...", "")))
            letters = output_axes.replace("...", ellipsis)
            return scale.reshape([sizes.get(letter, 1) for letter in letters])

        return self._product(inputs, kernel, multiply, preferred_element_type, place_scale)


def _operands(equation: str) -> tuple[str, str, str]:
    """The axes of input, kernel and output."""
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    return inputs, kernel, output


def _kept_axes(equation: str) -> tuple[int, ...]:
    """The kernel's axes that appear in the output, negative."""
    inputs, kernel, output = _operands(equation)
    problem = None
    if "." in kernel or len(set(kernel)) < len(kernel):
        problem = "name each of the kernel's axes, by a letter of its own"
    elif lost := sorted(set(inputs) - set(kernel) - set(output)):
        problem = f"keep the input's axes that the kernel doesn't have (here {''.join(lost)!r})"
    elif not set(kernel) - set(output):
        problem = "sum over an axis of the kernel"
    if problem is not None:
        raise ValueError(f"einsum_str (={equation!r}) must {problem}, or it can't be quantized")
    return tuple(i - len(kernel) for i, letter in enumerate(kernel) if letter in output)
