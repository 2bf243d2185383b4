"""The product of a quantized input and a quantized kernel, as NNX and Linen layers evaluate it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from uniq_jax import exact as exactly
from uniq_jax.nn import levels
from uniq_jax.nn.methods import ActivationMethod, Parameters, WeightMethod


def check_methods(weight: WeightMethod | None, activation: ActivationMethod | None) -> None:
    """Raises a TypeError if one of them is neither None nor a method of its kind."""
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


def product(
    inputs: jax.Array,
    kernel: jax.Array,
    weight: tuple[WeightMethod, Parameters] | None,
    activation: tuple[ActivationMethod, Parameters] | None,
    multiply: Callable[..., jax.Array],
    *,
    exact: bool,
    dtype: Any = None,
    place_scale: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The product of two operands, each of them quantized or not.

    Args:
      inputs: in the dtype of the computation.
      kernel: in its own dtype; outputs along the last axis, and sums over all others.
      weight: the kernel's method and its learned parameters, or None.
      activation: the input's method and its learned parameters, or None.
      multiply: the bilinear map, which takes `preferred_element_type`.
      exact: whether to multiply integer levels, where both operands have some.
      dtype: of the product, if not that of `inputs`.
      place_scale: takes one number for each of the kernel's channels, flat, and gives them the
        product's axes; without it they lie along the last one.

    Raises:
      ValueError: if the levels' sums could overflow an int32.
    """
    if weight is not None and activation is not None:
        taps = math.prod(kernel.shape[:-1])
        methods = weight[0], activation[0]
        levels.check_accumulator(activation[0].grid, weight[0].grid, taps)
        if exact:
            return _product_of_levels(
                inputs,
                kernel,
                weight[1],
                activation[1],
                methods,
                multiply,
                taps,
                dtype,
                place_scale,
            )
    quantized = inputs
    if activation is not None:
        quantize = activation[0].quantize if exact else functools.partial(_stored, activation[0])
        quantized = quantize(inputs, activation[1])
    if weight is not None:
        kernel = weight[0].quantize(kernel, weight[1])
        if kernel.ndim > 2:
            # XLA:GPU tells the gradient of a convolution's input by its mirrored kernel, but moves
            # the mirroring into the quantizer, and then convolves a cotangent dilated in memory.
            kernel = jax.lax.optimization_barrier(kernel)
    return multiply(quantized, kernel.astype(inputs.dtype), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stored(method: ActivationMethod, x: jax.Array, parameters: Parameters) -> jax.Array:
    """`method.quantize(x, parameters)`, calculated once.

    XLA:CPU fuses a quantizer into everything that reads its values. The gradient of a convolution's
    kernel reads them in another order, and most of a training step went into quantizing the inputs
    again, element by element. What a branch of a conditional gives is stored. Parameters that are
    nan or infinite make values that are nan.
    """

    def at_once(x, parameters):
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(parameters)]
        return jax.lax.cond(
            functools.reduce(jnp.logical_and, finite, jnp.asarray(True)),
            method.quantize,
            lambda x, parameters: jnp.full_like(x, jnp.nan),
            x,
            parameters,
        )

    return jax.lax.platform_dependent(x, parameters, cpu=at_once, default=method.quantize)


def _stored_fwd(method, x, parameters):
    return _stored(method, x, parameters), (x, parameters)


def _stored_bwd(method, operands, cotangent):
    return jax.vjp(method.quantize, *operands)[1](cotangent)


_stored.defvjp(_stored_fwd, _stored_bwd)


def _product_of_levels(
    inputs: jax.Array,
    kernel: jax.Array,
    weight_parameters: Parameters,
    activation_parameters: Parameters,
    methods: tuple[WeightMethod, ActivationMethod],
    multiply: Callable[..., jax.Array],
    taps: int,
    dtype: Any,
    place_scale: Callable[[jax.Array], jax.Array] | None,
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
        scale = levels.joint_scale(input_scale, kernel_scale).reshape(-1)
        if place_scale is not None and scale.size > 1:
            scale = place_scale(scale)
        return exactly.rescale(sums, scale).astype(dtype or inputs.dtype)

    evaluate = jax.custom_vjp(of_levels)
    evaluate.defvjp(
        lambda *operands: (of_levels(*operands), operands),
        lambda operands, cotangent: jax.vjp(of_values, *operands)[1](cotangent),
    )
    return evaluate(inputs, kernel, weight_parameters, activation_parameters)
