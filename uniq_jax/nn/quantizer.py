"""The NNX modules that own a quantizer's learned parameters."""

import contextvars
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jax.typing import DTypeLike

from uniq_jax.nn.methods import ActivationMethod, Method, WeightMethod
from uniq_jax.nn.state import QuantizerParam
from uniq_jax.quantizers import Encoded

MethodT = TypeVar("MethodT", bound=Method)

# What `ActivationQuantizer.start_observing` takes.
Observer = Callable[[ActivationMethod, dict[str, jax.Array], jax.Array], jax.Array]

# The numbers of the quantizers that a calibration batch has reached; None outside of calibration.
reached: contextvars.ContextVar[set[int] | None] = contextvars.ContextVar("reached", default=None)


class Statistic(QuantizerParam):
    """The largest statistic of the calibration batches so far, -1 before any.

    Exists only while calibrating. It is a parameter by type, so that transforms which treat state
    by type (`nnx.StateAxes`) carry it like the parameters beside it.
    """


class Observation(nnx.Variable):
    """What an observer has summed up of a quantizer's inputs; exists only while there is one."""


class _Quantizer(nnx.Module, Generic[MethodT]):
    def __init__(self, method: MethodT, parameters: dict[str, jax.Array]):
        self.method = method
        for name, value in parameters.items():
            setattr(self, name, method.parameter_types[name](value))

    @property
    def parameters(self) -> dict[str, jax.Array]:
        """The learned parameters as they are now, by name."""
        return {name: getattr(self, name)[...] for name in self.method.parameter_types}

    def set_parameters(self, parameters: dict[str, jax.Array]) -> None:
        """Overwrites learned parameters, which keep their dtype."""
        for name, value in parameters.items():
            variable = getattr(self, name)
            variable[...] = value.astype(variable[...].dtype)


class WeightQuantizer(_Quantizer[WeightMethod]):
    """Quantizes a layer's weights by a method, with parameters that start from these weights.

    Args:
      method: the method.
      w: the weights.
      channel_axis: the axis of the output channels, or several, whose every combination of entries
        is a channel then. Where the method has a parameter for each channel, its shape is that of
        `w` with 1 on every other axis.
      stacked: how many leading axes of `w` are of layers that a transform has stacked. Each layer
        has parameters of its own, along the same leading axes; within the transform (`nnx.scan`)
        neither weights nor parameters have them.
    """

    def __init__(
        self,
        method: WeightMethod,
        w: jax.Array,
        *,
        channel_axis: int | tuple[int, ...] = -1,
        stacked: int = 0,
    ):
        self.rank = w.ndim - stacked
        axes = (channel_axis,) if isinstance(channel_axis, int) else channel_axis
        for axis in axes:
            if not -self.rank <= axis < self.rank:
                raise ValueError(
                    f"channel_axis (={channel_axis!r}) must be axes of the weights, of which there "
                    f"are {self.rank}"
                )
        self.channel_axes = tuple(sorted(axis % self.rank - self.rank for axis in axes))
        super().__init__(method, self._initial(method, w))

    def __call__(self, w: jax.Array) -> jax.Array:
        """The fake-quantized weights."""

        def quantize(w, parameters):
            columns = self.method.quantize(self.to_columns(w), self._columns_of(parameters))
            return self.from_columns(columns, w.shape)

        return self._each(quantize, w)(w, self.parameters)

    def encode(self, w: jax.Array, *, dtype: DTypeLike = jnp.uint8) -> Encoded:
        """The codes of the weights, with their scale (which broadcasts against them) and offset."""

        def encode(w, parameters):
            columns = self._columns_of(parameters)
            codes, scale, offset = self.method.encode(self.to_columns(w), columns, dtype)
            scale = self._from_channels(scale, w.shape)
            return Encoded(self.from_columns(codes, w.shape), scale, offset)

        return self._each(encode, w)(w, self.parameters)

    def calibrate(self, w: jax.Array) -> None:
        """Starts the parameters anew from the weights `w`."""
        self.set_parameters(self._initial(self.method, w))

    @property
    def column_parameters(self) -> dict[str, jax.Array]:
        """The learned parameters for weights `to_columns`; of a single layer."""
        return self._columns_of(self.parameters)

    def to_columns(self, array: jax.Array) -> jax.Array:
        """Weights of a single layer with the channels along the last axis.

        The methods know this one place. Where the channels have several axes, or others, the result
        is a matrix.
        """
        if self.channel_axes == (-1,):
            return array
        order = (*self._summed_axes(), *self.channel_axes)
        channels = math.prod(array.shape[axis] for axis in self.channel_axes)
        return array.transpose([axis % self.rank for axis in order]).reshape(-1, channels)

    def from_columns(self, columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The array of this shape that `to_columns` took."""
        if self.channel_axes == (-1,):
            return columns
        order = [axis % self.rank for axis in (*self._summed_axes(), *self.channel_axes)]
        return columns.reshape([shape[i] for i in order]).transpose(
            [order.index(i) for i in range(self.rank)]
        )

    def _summed_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(-self.rank, 0) if axis not in self.channel_axes)

    def _columns_of(self, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {k: self.to_columns(v) if v.ndim else v for k, v in parameters.items()}

    def _from_channels(self, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """One number for each channel, along the channels' axes; or one for all, as it is."""
        if not value.ndim:
            return value
        ones = [shape[axis] if axis in self.channel_axes else 1 for axis in range(-self.rank, 0)]
        return self.from_columns(value, tuple(ones))

    def _initial(self, method: WeightMethod, w: jax.Array) -> dict[str, jax.Array]:
        def initial(w):
            parameters = method.initial(self.to_columns(w), -1)
            return {k: self._from_channels(v, w.shape) for k, v in parameters.items()}

        return self._each(initial, w)(w)

    def _each(self, function: Callable[..., Any], w: jax.Array) -> Callable[..., Any]:
        """The function of a single layer, over all layers that are stacked in `w`."""
        for _ in range(w.ndim - self.rank):
            function = jax.vmap(function)
        return function


class ActivationQuantizer(_Quantizer[ActivationMethod]):
    """Quantizes activations by a method; while calibrating it watches them and changes nothing.

    Args:
      method: the method.
      param_dtype: dtype of the learned parameters.
      stack: leading axes of the learned parameters, for layers that a transform has stacked.
    """

    def __init__(
        self,
        method: ActivationMethod,
        *,
        param_dtype: DTypeLike = jnp.float32,
        stack: tuple[int, ...] = (),
    ):
        initial = method.initial(param_dtype)
        if stack:
            initial = {k: jnp.broadcast_to(v, (*stack, *v.shape)) for k, v in initial.items()}
        super().__init__(method, initial)
        self.statistic = nnx.data(None)
        # While calibrating: what it notes in `reached`.
        self.number: int | None = None
        self.observer: Observer | None = None
        self.observation = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The fake-quantized activations, or `x` itself while calibrating."""
        if self.statistic is None:
            return self.method.quantize(x, self.parameters)
        largest = _larger(self.method)(self.statistic[...], x)
        try:
            self.statistic[...] = largest
        except TraceContextError as error:
            raise ValueError(
                "calibration must carry what it sees out of the model's transforms, and a "
                "transform of JAX (jax.checkpoint, jax.vmap, jax.lax.scan) around a layer is in "
                "the way; use nnx.remat, nnx.vmap or nnx.scan"
            ) from error
        numbers = reached.get()
        if numbers is not None and self.number is not None:
            numbers.add(self.number)
        return x

    def encode(self, x: jax.Array, *, dtype: DTypeLike = jnp.uint8) -> Encoded:
        """The codes of `x`, with their scale and offset."""
        return self.method.encode(x, self.parameters, dtype)

    def start_observing(self, observer: Observer, start: jax.Array) -> None:
        """From now on adds to `observation` what `observer` makes of each input of the layer.

        Args:
          observer: a pure function of the method, its learned parameters and the input, without
            arrays of its own.
          start: what it adds to.
        """
        self.observer = observer
        self.observation = Observation(start)

    def observe(self, x: jax.Array) -> None:
        """Shows the observer, where there is one, an input that is about to be quantized."""
        if self.observer is not None and self.observation is not None:
            seen = self.observer(self.method, self.parameters, x)
            self.observation[...] = self.observation[...] + seen

    def start_calibration(self, number: int) -> None:
        """From now on watches activations, and notes `number` in `reached` when there are any."""
        name, value = next(iter(self.parameters.items()))
        stack = value.shape[: value.ndim - self.method.initial()[name].ndim]
        dtype = jnp.result_type(*self.parameters.values())
        self.statistic = Statistic(jnp.full(stack, -1, dtype))
        self.number = number

    def check_calibration(self, name: str, reached: set[int]) -> None:
        """Raises a ValueError, which names the quantizer `name`, if what was seen is unusable."""
        assert self.statistic is not None
        if not jnp.all(jnp.isfinite(self.statistic[...])):
            raise ValueError(f"batches take nan or infinite activations to {name}")
        if self.number in reached and jnp.all(self.statistic[...] < 0):
            raise ValueError(
                f"batches take activations to {name}, but what it sees doesn't come out of the "
                "model's transforms; use nnx.scan or nnx.vmap in place of jax.lax.scan or "
                "jax.vmap, or update the model from a part that was split and merged"
            )

    def finish_calibration(self) -> None:
        """Sets the parameters from what was seen, if anything was, and quantizes again."""
        assert self.statistic is not None
        largest = self.statistic[...]
        self.abandon_calibration()
        if not jnp.any(largest > 0):
            return
        from_statistic = self.method.from_statistic
        for _ in range(largest.ndim):
            from_statistic = jax.vmap(from_statistic)
        parameters = from_statistic(largest)
        if largest.ndim:
            for name, value in parameters.items():
                seen = largest.reshape(*largest.shape, *(1,) * (value.ndim - largest.ndim)) > 0
                parameters[name] = jnp.where(seen, value, self.parameters[name])
        self.set_parameters(parameters)

    def abandon_calibration(self) -> None:
        """Forgets what was seen and quantizes again, with the parameters as they were."""
        self.statistic = nnx.data(None)
        self.number = None


def _larger(method: ActivationMethod) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The larger of a statistic so far and that of `x`.

    Where `nnx.vmap` maps over examples, and not over layers, all of them are one batch.
    """

    @jax.custom_batching.custom_vmap
    def larger(so_far, x):
        return jnp.maximum(so_far, method.statistic(x).astype(so_far.dtype))

    @larger.def_vmap
    def larger_of_mapped(axis_size, in_batched, so_far, x):
        if not in_batched[0]:
            return larger(so_far, x), False
        if not in_batched[1]:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        # A loop, in which a further vmap finds this rule again.
        return jax.lax.map(lambda pair: larger(*pair), (so_far, x)), True

    del larger_of_mapped
    return larger
