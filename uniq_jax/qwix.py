"""The quantizers as a qwix provider: `qwix.quantize_model` then quantizes an unmodified model.

    model = qwix.quantize_model(linen_model, RuleProvider(rules.uniq(bits=2)))
    variables = uniq_jax.linen.calibrate(model, model.init(key, x), batches)

    model = qwix.quantize_model(nnx_model, RuleProvider(rules.uniq(bits=2)), x)
    uniq_jax.calibrate(model, batches)

Learned steps are params of the layer whose kernel they belong to, at the paths of
`uniq_jax.linen`'s and `uniq_jax.nn`'s layers; values and gradients are those of these layers.

What it rests on. qwix patches functions of JAX while the model's method runs. A provider replaces
them, and asks which module is running. Of all that only `QuantizationProvider` is public, and
neither it nor what follows is promised to stay; so this works with the pinned qwix only:

- `QuantizationProvider.get_intercept_map`, `process_model_inputs`, `process_model_output`: when
  they are called, and with what.
- `qwix._src.utils.flax_util.get_current_module`: the Linen module that is running.

An NNX model's layers are replaced by `uniq_jax.quantize`, in the copy that `quantize_model` makes
and before it runs: nothing is patched, and `model.eval()` evaluates on integer levels. Without a
need for qwix, call that function. Linen models, which have no layers before they run, take the
patched functions; where a model can take its layers from factories, `uniq_jax.linen` is simpler.
"""

import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from uniq_jax.linen import quantized_product
from uniq_jax.quantization import quantize
from uniq_jax.rules import Decisions, Rule

# The releases whose hooks are as above: from the first, below the second.
_SUPPORTED = "0.1.8", "0.1.9"

_WANTED = "uniq_jax.qwix needs qwix>={},<{}; pip install 'uniq_jax[qwix]'".format(*_SUPPORTED)
try:
    _version = importlib.metadata.version("qwix")
except importlib.metadata.PackageNotFoundError as _error:
    raise ImportError(f"{_WANTED} (none is installed)") from _error
_first, _next, _found = (
    tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    for version in (*_SUPPORTED, _version)
)
if not _first <= _found < _next:
    raise ImportError(f"{_WANTED} ({_version} is installed)")

import qwix  # noqa: E402
from qwix._src.utils import flax_util  # noqa: E402

# The product functions that a Linen layer may be given; if it is, it isn't ours to quantize.
_REPLACEABLE = (
    "conv_general_dilated",
    "conv_general_dilated_cls",
    "dot_general",
    "dot_general_cls",
)

# The attribute of an NNX model whose layers a provider has replaced: by which rules. It stays when
# the model is split, merged or cloned.
_MARK = "quantized_by_qwix"


class RuleProvider(qwix.QuantizationProvider):
    """Quantizes the layers of a model as rules say.

    Candidates are `nn.Conv`, `nn.Dense` and `nn.DenseGeneral` of Linen, also those inside Flax's
    own attention, and all that `uniq_jax.quantize` takes of NNX. Their paths look like
    "Block_0/Conv_1". A Linen layer with a product function of its own stays as it is.

    Of a `nn.DenseGeneral` every output feature, over all its output axes, is a channel. Causal
    padding of Linen's `nn.Conv` comes before the quantizer, so that on a signed grid it isn't 0.

    Args:
      rules: in order; the first one that matches a layer's path decides. A layer that none matches
        stays float.
      deterministic: whether Linen models evaluate, on integer levels. The variables are the same:
        quantize the model by one provider to train, and by another to evaluate. NNX models go by
        `model.train()` and `model.eval()`.

    Raises:
      TypeError: if `rules` is no sequence of `Rule`.
      ValueError: from the first run of the quantized model (of `quantize_model` itself where the
        model is NNX), if a rule that is not optional decides about no layer, with the paths there
        are; if a layer can't be quantized as its rule says; or if an NNX model holds quantized
        layers already.

    Example:
      >>> import jax, jax.numpy as jnp, qwix
      >>> from flax import linen as nn
      >>> from uniq_jax import rules
      >>> from uniq_jax.nn import UniqActivation, UniqWeight
      >>> from uniq_jax.qwix import RuleProvider
      >>> provider = RuleProvider([rules.Rule("layers_2", UniqWeight(2), UniqActivation(2))])
      >>> model = qwix.quantize_model(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), provider)
      >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 5)))["params"]
      >>> sorted(params["layers_0"]), sorted(params["layers_2"])
      (['bias', 'kernel'], ['activation_quantizer', 'bias', 'kernel', 'weight_quantizer'])
    """

    def __init__(self, rules: Sequence[Rule], *, deterministic: bool = False):
        super().__init__([])
        self.deterministic = deterministic
        self._decisions = Decisions(rules)
        self._model_is_nnx = False

    def get_intercept_map(self) -> dict[str, Any]:
        """What takes the place of JAX's functions while the model runs."""
        return super().get_intercept_map() | {
            "jax.lax.conv_general_dilated": self._conv_general_dilated,
            "jax.lax.dot_general": self._dot_general,
        }

    def process_model_inputs(self, model: Any, model_args: Any, model_kwargs: Any) -> Any:
        """Called before the model's method: replaces the layers of an NNX model, the first time."""
        self._model_is_nnx = isinstance(model, nnx.Module)
        mark = repr(self._decisions.rules)
        if self._model_is_nnx and getattr(model, _MARK, None) != mark:
            quantize(model, self._decisions.rules)
            setattr(model, _MARK, mark)
        return super().process_model_inputs(model, model_args, model_kwargs)

    def process_model_output(self, method_name: str, model_output: Any) -> Any:
        """Called after the model's method: by now every rule has decided about a Linen layer."""
        if not self._model_is_nnx:
            self._decisions.check()
        return super().process_model_output(method_name, model_output)

    def _conv_general_dilated(self, lhs, rhs, *args, **kwargs):
        def multiply(a, b, **options):
            return jax.lax.conv_general_dilated(a, b, *args, **kwargs, **options)

        layer = self._layer(rhs, nn.Conv)
        rule = None if layer is None else self._decisions.about("/".join(layer.path))
        if layer is None or rule is None:
            return multiply(lhs, rhs)
        if layer.mask is not None and rule.weight is not None:
            raise ValueError(
                f"{'/'.join(layer.path)}: mask must be None where the kernel is quantized: no "
                "level is zero"
            )
        kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
        return self._product(layer, rule, lhs, rhs if rule.weight is None else kernel, multiply)

    def _dot_general(self, lhs, rhs, dimension_numbers, *args, **kwargs):
        def multiply(a, b, **options):
            return jax.lax.dot_general(a, b, dimension_numbers, *args, **kwargs, **options)

        layer = self._layer(rhs, nn.Dense | nn.DenseGeneral)
        rule = None if layer is None else self._decisions.about("/".join(layer.path))
        if layer is None or rule is None:
            return multiply(lhs, rhs)
        (_, summed), (batch, _) = dimension_numbers
        if batch:
            raise ValueError(
                f"{'/'.join(layer.path)}: batch_dims (={layer.batch_dims!r}) must be () where the "
                "layer is quantized"
            )
        outputs = rhs.shape[len(summed) :]

        def multiply_columns(a, columns, **options):
            product = multiply(a, columns.reshape(rhs.shape), **options)
            return product.reshape(*product.shape[: -len(outputs)], -1)

        kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
        columns = kernel.reshape(-1, math.prod(outputs))
        product = self._product(layer, rule, lhs, columns, multiply_columns)
        return product.reshape(*product.shape[:-1], *outputs)

    def _product(self, layer, rule, inputs, kernel, multiply):
        return quantized_product(
            layer,
            inputs,
            kernel,
            rule.weight,
            rule.activation,
            multiply,
            exact=self.deterministic,
            param_dtype=layer.param_dtype,
        )

    def _layer(self, kernel: jax.Array, kinds: Any) -> Any:
        """The Linen layer that is multiplying by its kernel, if one is."""
        module = flax_util.get_current_module()
        if not isinstance(module, nn.Module) or not isinstance(module, kinds):
            return None
        if any(getattr(module, name, None) is not None for name in _REPLACEABLE):
            return None
        own = module.get_variable("params", "kernel")
        return module if nn.meta.unbox(own).shape == kernel.shape else None
