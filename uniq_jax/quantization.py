"""Quantizes any NNX model by rules: layers are replaced, parameters and their paths stay."""

import re
from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import jax
from flax import nnx

from uniq_jax.nn import (
    BatchNorm,
    QuantConv,
    QuantEinsum,
    QuantLayer,
    QuantLinear,
    QuantLinearGeneral,
)
from uniq_jax.rules import Decisions, Rule

# Float layer → its quantized form.
_REPLACEMENTS: dict[type[nnx.Module], type[QuantLayer]] = {
    quantized.float_type: quantized
    for quantized in (QuantConv, QuantLinear, QuantLinearGeneral, QuantEinsum)
}

# Attributes by which layers know whether they are in evaluation.
_MODES = ("deterministic", "use_running_average")


def quantize(model: nnx.Module, rules: Sequence[Rule]) -> nnx.Module:
    """Replaces a model's layers by quantized ones, as the first matching rule says.

    `nnx.Conv`, `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` layers are candidates, those in
    layers of Flax among them: the projections of `nnx.MultiHeadAttention` have paths such as
    "attention/query". All others (`nnx.Embed`, `nnx.ConvTranspose`, norms) stay float.

    The layers' parameters are kept, the same objects at the same paths, so that float checkpoints
    load before or after. Weight steps start from the present weights; call `uniq_jax.calibrate` to
    start activations from data. A layer that is used in several places becomes one quantized layer
    in all of them; it goes by its first path. Layers that `nnx.vmap` has stacked along the first
    axis of their parameters, for `nnx.scan` for example, have learned scalars of their own each,
    stacked likewise.

    Every `nnx.BatchNorm` becomes a `uniq_jax.nn.BatchNorm`, which differs in evaluation, by
    rounding only: what stands in front of a quantizer must give the same bits in every program.

    A subclass of a candidate is one too. If it only adds a constructor, it is replaced as its base
    class is; if it has a call or other public attributes of its own, which a quantized layer would
    pass over, a rule that asks to quantize it is an error: `Rule("its/path")` keeps it float.

    New layers are in evaluation mode if the model is, that is, if each of its layers that has a
    mode (dropout, batch norm) is in evaluation; otherwise they are in training mode.
    `uniq_jax.dequantize` puts the float layers back.

    Args:
      model: any NNX module; changed in place.
      rules: in order; the first one that matches a layer's path decides. A layer that none matches
        stays float.

    Returns:
      The same model.

    Raises:
      TypeError: if `model` is no NNX module, or `rules` no sequence of `Rule`; if a kernel is a
        ShapeDtypeStruct (quantize within `nnx.eval_shape` rather than its result); if a layer was
        given a function of its own in place of `lax.conv_general_dilated`, `lax.dot_general`,
        `jnp.einsum` or `promote_dtype`, or is a subclass as described.
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
    decisions = Decisions(rules)
    layers = _candidates(model)
    evaluates = _evaluates(model)
    replacements: dict[int, nnx.Module] = {}
    for path, layer, kind in layers:
        rule = decisions.about(path)
        if rule is not None:
            quantized = _quantized(path, layer, kind, rule)
            quantized.deterministic = evaluates
            replacements[id(layer)] = quantized
    decisions.check()
    for _, node in nnx.iter_graph(model):
        if type(node) is nnx.BatchNorm:
            replacements[id(node)] = BatchNorm.from_float(node)
    _replace(model, replacements)
    return model


def dequantize(model: nnx.Module) -> nnx.Module:
    """Puts the float layers back: what `quantize` did, undone.

    The float layers have the present parameters, the same objects at the same paths; learned
    quantizer state is dropped. Quantized layers that the model was built with, and never were
    float, become float too. Quantizers outside of layers stay.

    Args:
      model: any NNX module; changed in place.

    Returns:
      The same model.

    Raises:
      ValueError: if the model has no quantized layer or is one, or a layer lies where it cannot be
        replaced. The model is then unchanged.

    Example:
      >>> from flax import nnx
      >>> from uniq_jax import rules
      >>> from uniq_jax.nn import UniqWeight
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> before = nnx.graphdef(model)
      >>> model = quantize(model, [rules.Rule(".*", UniqWeight(2))])
      >>> nnx.graphdef(dequantize(model)) == before
      True
    """
    if isinstance(model, QuantLayer):
        raise ValueError(
            f"model must hold the layers to replace, and not be one (a {type(model).__name__}); "
            "use its method to_float"
        )
    nodes: list[Any] = [node for _, node in nnx.iter_graph(model)]
    if not any(isinstance(node, QuantLayer) for node in nodes):
        raise ValueError("model has no quantized layer to put a float one in place of")
    _replace(
        model,
        {id(n): n.to_float() for n in nodes if isinstance(n, QuantLayer | BatchNorm)},
    )
    return model


def _candidates(model: nnx.Module) -> list[tuple[str, Any, type[QuantLayer]]]:
    """Path, layer and quantized form of everything that can be quantized, each layer once."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model (a {type(model).__name__}) must be an nnx.Module; for Linen see uniq_jax.linen"
        )
    if _quantized_form(model) is not None:
        raise ValueError(
            f"model must hold the layers to replace, and not be one (a {type(model).__name__}); "
            "put it in an nnx.Sequential"
        )
    found = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, QuantLayer):
            raise ValueError(f"model is quantized already, at {_join(path)}")
        kind = _quantized_form(node)
        if kind is not None:
            found.append((_join(path), node, kind))
    if not found:
        names = ", ".join(f"nnx.{kind.__name__}" for kind in _REPLACEMENTS)
        raise ValueError(f"model has no layer below it that could be quantized (no {names})")
    return found


def _quantized_form(node: Any) -> type[QuantLayer] | None:
    return next((form for base, form in _REPLACEMENTS.items() if isinstance(node, base)), None)


def _quantized(path: str, layer: Any, kind: type[QuantLayer], rule: Rule) -> QuantLayer:
    if own := _own_attributes(type(layer), kind.float_type):
        raise TypeError(
            f"{path}: {type(layer).__name__} is a subclass of nnx.{kind.float_type.__name__} with "
            f"{', '.join(own)} of its own, which {kind.__name__} would pass over; leave it float "
            f"by a rule Rule({re.escape(path)!r}) before the others"
        )
    if isinstance(layer.kernel.get_value(), jax.ShapeDtypeStruct):
        raise TypeError(
            f"{path}: kernel is a ShapeDtypeStruct and must be an array; call quantize within "
            "nnx.eval_shape, on the model as it is built there"
        )
    try:
        return kind.from_float(layer, weight=rule.weight, activation=rule.activation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _own_attributes(cls: type, base: type) -> list[str]:
    """What a subclass has on top of its base; private names serve only its own methods."""
    names = {name for c in cls.__mro__ if c not in base.__mro__ for name in vars(c)}
    return sorted(name for name in names if name == "__call__" or not name.startswith("_"))


def _evaluates(model: nnx.Module) -> bool:
    """Whether every layer that knows its mode is in evaluation; False if there is none."""
    modes = [getattr(m, name, None) for _, m in nnx.iter_modules(model) for name in _MODES]
    known = [mode for mode in modes if isinstance(mode, bool)]
    return bool(known) and all(known)


def _replace(model: nnx.Module, replacements: Mapping[int, nnx.Module]) -> None:
    """Puts modules in place of those of these ids, wherever they are held."""
    for parent, key, layer in _places(model, replacements):
        if isinstance(parent, MutableMapping | MutableSequence):
            parent[key] = replacements[id(layer)]
        else:
            setattr(parent, key, replacements[id(layer)])


def _places(model: nnx.Module, layers: Mapping[int, Any]) -> list[tuple[Any, Any, Any]]:
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
