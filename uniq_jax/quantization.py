"""Quantizes any NNX model by rules: layers are replaced, parameters and their paths stay."""

from collections.abc import Iterable, Sequence
from typing import Any

from flax import nnx

from uniq_jax.nn import QuantConv, QuantLinear
from uniq_jax.rules import Rule

_CONV_FIELDS = [
    "in_features",
    "out_features",
    "kernel_size",
    "strides",
    "padding",
    "input_dilation",
    "kernel_dilation",
    "feature_group_count",
    "use_bias",
    "mask",
    "dtype",
    "param_dtype",
    "precision",
    "preferred_element_type",
]
_LINEAR_FIELDS = [
    "in_features",
    "out_features",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "preferred_element_type",
]

# Float layer → its quantized form, and the arguments that both share.
_REPLACEMENTS: dict[type, tuple[type, list[str]]] = {
    nnx.Conv: (QuantConv, _CONV_FIELDS),
    nnx.Linear: (QuantLinear, _LINEAR_FIELDS),
}


def quantize(model: nnx.Module, rules: Sequence[Rule]) -> nnx.Module:
    """Replaces a model's layers by quantized ones, as the first matching rule says.

    `nnx.Conv` and `nnx.Linear` layers are candidates. Their parameters are kept, the same objects
    at the same paths, so that float checkpoints load before or after. Weight steps start from the
    present weights; call `uniq_jax.calibrate` to start activations from data.

    Args:
      model: any NNX module; changed in place.
      rules: in order; the first one that matches a layer's path decides. A layer that none matches
        stays float.

    Returns:
      The same model.

    Raises:
      ValueError: if a rule that is not optional decides about no layer, with the paths there are;
        or if the model was quantized before.

    Example:
      >>> from flax import nnx
      >>> from uniq_jax import rules
      >>> from uniq_jax.models import CifarResNet
      >>> model = CifarResNet(8, num_classes=10, rngs=nnx.Rngs(0))
      >>> type(quantize(model, rules.uniq(bits=2)).layer1[0].conv1).__name__
      'QuantConv'
    """
    layers = _candidates(model)
    paths = [path for path, _, _, _ in layers]
    used = [False] * len(rules)
    for path, parent, key, layer in layers:
        for i, rule in enumerate(rules):
            if rule.matches(path):
                used[i] = True
                if rule.weight is not None or rule.activation is not None:
                    _replace(parent, key, _quantized(layer, rule))
                break
    for rule, was_used in zip(rules, used):
        if not was_used and not rule.optional:
            raise ValueError(
                f"the rule for path={rule.path!r} decides about no layer; the paths are: "
                f"{', '.join(paths)}"
            )
    return model


def _candidates(model: nnx.Module) -> list[tuple[str, Any, Any, Any]]:
    """Path, parent, key in the parent, and layer, of everything that can be quantized."""
    nodes = dict(nnx.iter_graph(model))
    found = []
    for path, node in nodes.items():
        if isinstance(node, QuantConv | QuantLinear):
            raise ValueError(f"model is quantized already, at {_join(path)}")
        if type(node) in _REPLACEMENTS:
            found.append((_join(path), nodes[path[:-1]], path[-1], node))
    if not found:
        raise ValueError("model has no nnx.Conv or nnx.Linear below it that could be quantized")
    return found


def _quantized(layer: Any, rule: Rule) -> Any:
    kind, fields = _REPLACEMENTS[type(layer)]
    options = {name: getattr(layer, name) for name in fields}

    replacement = kind(**options, weight=rule.weight, activation=rule.activation, rngs=nnx.Rngs(0))
    replacement.kernel, replacement.bias = layer.kernel, layer.bias
    if replacement.weight_quantizer is not None:
        replacement.weight_quantizer.calibrate(layer.kernel[...])
    return replacement


def _replace(parent: Any, key: Any, layer: nnx.Module) -> None:
    if isinstance(key, int):
        parent[key] = layer
    else:
        setattr(parent, key, layer)


def _join(path: Iterable[Any]) -> str:
    return "/".join(map(str, path))
