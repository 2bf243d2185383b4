"""Quantizes any NNX model by rules: layers are replaced, parameters and their paths stay."""

from collections.abc import Container, Iterable, MutableMapping, MutableSequence, Sequence
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
    "conv_general_dilated",
    "promote_dtype",
]
_LINEAR_FIELDS = [
    "in_features",
    "out_features",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "preferred_element_type",
    "dot_general",
    "promote_dtype",
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
    present weights; call `uniq_jax.calibrate` to start activations from data. A layer that is
    used in several places becomes one quantized layer in all of them; it goes by its first path.

    Args:
      model: any NNX module; changed in place.
      rules: in order; the first one that matches a layer's path decides. A layer that none matches
        stays float.

    Returns:
      The same model. The new layers are in training mode, whatever mode the model is in.

    Raises:
      TypeError: if a layer was given a function of its own in place of `lax.conv_general_dilated`,
        `lax.dot_general` or `promote_dtype`.
      ValueError: if a rule that is not optional decides about no layer, with the paths there are;
        if the model was quantized before; if a layer cannot be quantized as its rule says, or
        lies where it cannot be replaced. The model is then unchanged.

    Example:
      >>> from flax import nnx
      >>> from uniq_jax import rules
      >>> from uniq_jax.models import CifarResNet
      >>> model = CifarResNet(8, num_classes=10, rngs=nnx.Rngs(0))
      >>> type(quantize(model, rules.uniq(bits=2)).layer1[0].conv1).__name__
      'QuantConv'
    """
    layers = _candidates(model)
    used = [False] * len(rules)
    replacements = {}
    for path, layer in layers:
        decisive = next((i for i, rule in enumerate(rules) if rule.matches(path)), None)
        if decisive is None:
            continue
        used[decisive] = True
        rule = rules[decisive]
        if rule.weight is not None or rule.activation is not None:
            replacements[id(layer)] = _quantized(path, layer, rule)
    for rule, was_used in zip(rules, used):
        if not was_used and not rule.optional:
            raise ValueError(
                f"the rule for path={rule.path!r} decides about no layer; the paths are: "
                f"{', '.join(path for path, _ in layers)}"
            )
    for parent, key, layer in _places(model, replacements.keys()):
        if isinstance(parent, MutableMapping | MutableSequence):
            parent[key] = replacements[id(layer)]
        else:
            setattr(parent, key, replacements[id(layer)])
    return model


def _candidates(model: nnx.Module) -> list[tuple[str, Any]]:
    """Path and layer of everything that can be quantized, each layer once."""
    if type(model) in _REPLACEMENTS:
        raise ValueError(
            f"model must hold the layers to replace, and not be one (a {type(model).__name__}); "
            "put it in an nnx.Sequential"
        )
    found = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, QuantConv | QuantLinear):
            raise ValueError(f"model is quantized already, at {_join(path)}")
        if type(node) in _REPLACEMENTS:
            found.append((_join(path), node))
    if not found:
        raise ValueError("model has no nnx.Conv or nnx.Linear below it that could be quantized")
    return found


def _quantized(path: str, layer: Any, rule: Rule) -> Any:
    kind, fields = _REPLACEMENTS[type(layer)]
    options = {name: getattr(layer, name) for name in fields}
    try:
        replacement = kind(
            **options, weight=rule.weight, activation=rule.activation, rngs=nnx.Rngs(0)
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
    replacement.kernel, replacement.bias = layer.kernel, layer.bias
    if replacement.weight_quantizer is not None:
        replacement.weight_quantizer.calibrate(layer.kernel[...])
    return replacement


def _places(model: nnx.Module, layers: Container[int]) -> list[tuple[Any, Any, Any]]:
    """Parent, key in the parent, and layer, wherever one of the layers of these ids is held."""
    places = []
    for path, parent in nnx.iter_graph(model):
        if not nnx.graph.is_node(parent):
            continue
        for key, layer in nnx.iter_children(parent):
            if id(layer) not in layers:
                continue
            if not isinstance(parent, nnx.Pytree | MutableMapping | MutableSequence):
                raise ValueError(
                    f"{_join((*path, key))} lies in a {type(parent).__name__}, where it can't be "
                    "replaced; use an nnx.List or nnx.Dict"
                )
            places.append((parent, key, layer))
    return places


def _join(path: Iterable[Any]) -> str:
    return "/".join(map(str, path))
