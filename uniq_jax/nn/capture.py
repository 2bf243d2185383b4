"""How `uniq_jax.freeze` sees quantized layers: as two marks in a traced program.

A layer that is traced while `recording` says what it would do on integers: it marks where its input
becomes levels, multiplies these with the levels of its kernel, and marks where the sums get their
scale. Everything between and around these marks is ordinary.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Primitive

from uniq_jax import exact
from uniq_jax.nn import levels
from uniq_jax.nn.methods import Method, Parameters

# The layers met so far, in the order of their calls; a mark names a layer by its number here.
_layers: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("layers", default=None)

# The codes met so far, while tapping.
_codes: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("codes", default=None)

# x → its integer levels, of the same shape and dtype. Parameter: layer.
encode_mark = Primitive("uniq_jax_encode")
# sums, scale → their product. Parameter: layer.
rescale_mark = Primitive("uniq_jax_rescale")

for _mark in (encode_mark, rescale_mark):
    _mark.def_abstract_eval(lambda x, *_, layer: x)


class NotRecordableError(Exception):
    """A layer cannot say what it would do on integers.

    Args:
      layer: which.
      reason: that goes on behind the layer's name.
      kind: what `freeze` raises.
    """

    def __init__(self, layer: Any, reason: str, kind: type[Exception]):
        super().__init__(reason)
        self.layer, self.reason, self.kind = layer, reason, kind


@contextlib.contextmanager
def recording() -> Iterator[list[Any]]:
    """While this lasts, layers leave marks, and are listed in what this gives."""
    layers: list[Any] = []
    token = _layers.set(layers)
    try:
        yield layers
    finally:
        _layers.reset(token)


@contextlib.contextmanager
def tapping() -> Iterator[list[jax.Array]]:
    """While this lasts, the codes of every layer's input are listed, uint8, in the order of calls.

    Layers within a transform that JAX traces apart (a scan, a remat) can't be tapped.
    """
    codes: list[jax.Array] = []
    token = _codes.set(codes)
    try:
        yield codes
    finally:
        _codes.reset(token)


def tap(quantizer: Any, inputs: jax.Array) -> None:
    """Lists the codes of a layer's input, if someone is tapping."""
    codes = _codes.get()
    if codes is not None and quantizer is not None:
        codes.append(quantizer.encode(inputs).codes)


@functools.partial(jax.jit, static_argnums=0)
def _levels(method: Method, x: jax.Array, parameters: Parameters) -> tuple[jax.Array, jax.Array]:
    return levels.integer_levels(method.encode(x, parameters, x.dtype), method.grid)


def is_recording() -> bool:
    """Whether layers are to leave marks."""
    return _layers.get() is not None


def product(
    layer: Any,
    inputs: jax.Array,
    kernel: jax.Array,
    multiply: Callable[..., jax.Array],
    dtype: Any,
    place_scale: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """The product of a layer, with marks.

    Args:
      layer: a quantized layer, with at least one quantizer.
      inputs: traced.
      kernel: concrete.
      multiply: the layer's bilinear map.
      dtype: of the result, if not that of `inputs`.
      place_scale: as in `uniq_jax.nn.product.product`.

    Raises:
      NotRecordableError: if the kernel is not concrete, or either is not float32.
    """
    layers = _layers.get()
    assert layers is not None
    if isinstance(kernel, Tracer):
        reason = "lies in a transform that JAX traces apart, such as nnx.remat"
        raise NotRecordableError(layer, reason, NotImplementedError)
    others = [a.dtype.name for a in (inputs, kernel) if a.dtype != jnp.float32]
    if others:
        reason = f"must compute in float32 to be frozen, and not in {others[0]}"
        raise NotRecordableError(layer, reason, ValueError)
    layers.append(layer)
    number = len(layers) - 1
    weight, activation = layer.weight_quantizer, layer.activation_quantizer
    if activation is None:
        quantized = kernel if weight is None else weight(kernel)
        return multiply(inputs, quantized.astype(inputs.dtype), preferred_element_type=dtype)
    traced = encode_mark.bind(inputs, layer=number)
    with jax.ensure_compile_time_eval():
        # Of one number: the scale alone is wanted, which does not depend on the input.
        one = jnp.zeros((), inputs.dtype)
        input_scale = _levels(activation.method, one, activation.parameters)[1]
    if weight is None:
        values = exact.rescale(traced, input_scale)
        return multiply(values, kernel.astype(inputs.dtype), preferred_element_type=dtype)
    with jax.ensure_compile_time_eval():
        columns = weight.to_columns(kernel)
        columns, kernel_scale = _levels(weight.method, columns, weight.column_parameters)
        kernel_levels = weight.from_columns(columns, kernel.shape)
        scale = levels.joint_scale(input_scale, kernel_scale).reshape(-1)
    sums = multiply(traced, kernel_levels, preferred_element_type=dtype)
    if place_scale is not None and scale.size > 1:
        scale = place_scale(scale)
    return rescale_mark.bind(sums, scale, layer=number)
