"""The product of a quantized input and a quantized kernel, as NNX and Linen layers evaluate it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from uniq_jax.nn import levels
from uniq_jax.nn.methods import ActivationMethod, Parameters, WeightMethod


def product_of_levels(
    inputs: jax.Array,
    kernel: jax.Array,
    weight_parameters: Parameters,
    activation_parameters: Parameters,
    methods: tuple[WeightMethod, ActivationMethod],
    multiply: Callable[..., jax.Array],
    taps: int,
    dtype: Any,
) -> jax.Array:
    """The product of integer levels, scaled once, with the gradients of that of the values.

    Codes have no derivative of their own; a network that is differentiated in evaluation mode (with
    its batch norms frozen, say) takes the one it has in training.
    """
    weight, activation = methods

    def of_values(inputs, kernel, weight_parameters, activation_parameters):
        quantized = activation.quantize(inputs, activation_parameters)
        kernel = weight.quantize(kernel, weight_parameters)
        return multiply(quantized, kernel.astype(inputs.dtype), preferred_element_type=dtype)

    def of_levels(inputs, kernel, weight_parameters, activation_parameters):
        wide = jnp.promote_types(jnp.result_type(inputs, kernel), jnp.float32)
        input_levels, input_scale = levels.integer_levels(
            activation.encode(inputs, activation_parameters, wide), activation.grid
        )
        kernel_levels, kernel_scale = levels.integer_levels(
            weight.encode(kernel, weight_parameters, wide), weight.grid
        )
        sums = levels.accumulate(
            input_levels,
            kernel_levels,
            multiply,
            activation_grid=activation.grid,
            weight_grid=weight.grid,
            taps=taps,
        )
        # A step for each output channel lies along the kernel's last axis, the output's last too.
        scale = (input_scale * kernel_scale).reshape(-1)
        return levels.rescale(sums, scale).astype(dtype or inputs.dtype)

    evaluate = jax.custom_vjp(of_levels)
    evaluate.defvjp(
        lambda *operands: (of_levels(*operands), operands),
        lambda operands, cotangent: jax.vjp(of_values, *operands)[1](cotangent),
    )
    return evaluate(inputs, kernel, weight_parameters, activation_parameters)
