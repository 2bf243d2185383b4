"""The NNX module that owns a quantizer's learned parameters."""

from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from uniq_jax.nn.methods import ActivationMethod, Method, WeightMethod
from uniq_jax.quantizers import Encoded

MethodT = TypeVar("MethodT", bound=Method)


class Statistic(nnx.Variable):
    """The largest statistic of the calibration batches so far; exists only while calibrating."""


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

    def encode(self, x: jax.Array, *, dtype: DTypeLike = jnp.uint8) -> Encoded:
        """The codes of `x`, with their scale and offset."""
        return self.method.encode(x, self.parameters, dtype)


class WeightQuantizer(_Quantizer[WeightMethod]):
    """Quantizes a layer's weights by a method, with parameters that start from these weights."""

    def __init__(self, method: WeightMethod, w: jax.Array, *, channel_axis: int = -1):
        super().__init__(method, method.initial(w, channel_axis))
        self.channel_axis = channel_axis

    def __call__(self, w: jax.Array) -> jax.Array:
        """The fake-quantized weights."""
        return self.method.quantize(w, self.parameters)

    def calibrate(self, w: jax.Array) -> None:
        """Starts the parameters anew from the weights `w`."""
        self.set_parameters(self.method.initial(w, self.channel_axis))


class ActivationQuantizer(_Quantizer[ActivationMethod]):
    """Quantizes activations by a method; while calibrating it watches them and changes nothing."""

    def __init__(self, method: ActivationMethod, *, param_dtype: DTypeLike = jnp.float32):
        super().__init__(method, method.initial(param_dtype))
        self.statistic = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The fake-quantized activations, or `x` itself while calibrating."""
        if self.statistic is None:
            return self.method.quantize(x, self.parameters)
        seen = self.method.statistic(x).astype(self.statistic[...].dtype)
        self.statistic[...] = jnp.maximum(self.statistic[...], seen)
        return x

    def start_calibration(self) -> None:
        """From now on watches activations."""
        dtype = jnp.result_type(*self.parameters.values())
        self.statistic = Statistic(jnp.zeros((), dtype))

    def check_calibration(self, name: str) -> None:
        """Raises a ValueError, which names the quantizer `name`, if what was seen is not finite."""
        assert self.statistic is not None
        if not jnp.isfinite(self.statistic[...]):
            raise ValueError(f"batches take nan or infinite activations to {name}")

    def finish_calibration(self) -> None:
        """Sets the parameters from what was seen, if anything was, and quantizes again."""
        assert self.statistic is not None
        largest = self.statistic[...]
        self.statistic = nnx.data(None)
        if largest > 0:
            self.set_parameters(self.method.from_statistic(largest))

    def abandon_calibration(self) -> None:
        """Forgets what was seen and quantizes again, with the parameters as they were."""
        self.statistic = nnx.data(None)
