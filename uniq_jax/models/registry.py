"""Networks by name: float, or quantized as their papers do."""

import difflib
import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
from flax import nnx

from uniq_jax import rules
from uniq_jax.models.alexnet import AlexNet
from uniq_jax.models.cifar_preact_resnet import CifarPreactResNet
from uniq_jax.models.cifar_resnet import CifarResNet
from uniq_jax.models.mobilenet_v2 import MobileNetV2
from uniq_jax.models.preact_resnet import PreactResNet
from uniq_jax.models.resnet import ResNet
from uniq_jax.models.vit import VisionTransformer
from uniq_jax.nn import QuantLayer
from uniq_jax.quantization import quantize

Method = Literal["uniq", "n2uq", "uniq_n2uq", "lsq"]

MODELS: Mapping[str, Callable[..., nnx.Module]] = {
    **{
        f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56)
    },
    **{
        f"preact_resnet{depth}": functools.partial(CifarPreactResNet, depth)
        for depth in (8, 14, 20, 32, 44, 56)
    },
    **{f"resnet{depth}": functools.partial(ResNet, depth) for depth in (18, 34, 50, 101)},
    **{f"preact_resnet{depth}": functools.partial(PreactResNet, depth) for depth in (18, 34, 50)},
    "alexnet": AlexNet,
    "mobilenet_v2": MobileNetV2,
    "vit_s16": VisionTransformer,
}
"""By name, what makes a float network: (num_classes=…, rngs=…, …).

ResNets of the depths 6n + 2 are those for images of 32x32 pixels; all others are for ImageNet.
"""

# The shape that a network has in N2UQ's paper.
_N2UQ_SHAPES: Mapping[str, Mapping[str, Any]] = {
    **{f"resnet{depth}": {"activation": "biased_prelu"} for depth in (18, 34, 50, 101)},
    "mobilenet_v2": {"activation": "biased_prelu"},
}

# What the presets have to know about a network.
_SIGNED: Mapping[str, Mapping[str, Any]] = {
    # Linear bottlenecks; the first block's expansion, where there is one, follows a ReLU6.
    "mobilenet_v2": {"signed": r"blocks/[1-9]\d*/conv1|conv2"},
    "vit_s16": {"signed": ".*", "signed_last": True},
}
_PACT: Mapping[str, Mapping[str, Any]] = {"mobilenet_v2": {"pact": "conv2"}}


def create(
    name: str,
    *,
    num_classes: int,
    rngs: nnx.Rngs,
    method: Method | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    granularity: Literal["layer", "channel"] = "layer",
    quantize_downsample: bool = True,
    **options: Any,
) -> nnx.Module:
    """Builds a network by name.

    Without a method it is the float network. With "n2uq" the ResNets-18, -34, -50 and -101 and
    MobileNet-V2 have the shape of N2UQ's paper (`activation="biased_prelu"`, which gives that shape
    without a method too); the others keep theirs. Each method's treatment of first, last and
    shortcut layers is that of its preset in `uniq_jax.rules`. N2UQ's activations have no negative
    levels: in the ViT, and in MobileNet-V2 with "uniq_n2uq", low-bit layers lose the negative part
    of their inputs.

    Layers that a method leaves float, such as N2UQ's first and last, multiply in full float32
    (`precision`), on GPUs and TPUs too, which otherwise round there to ten bits or to seven: the
    codes behind them then are those of the frozen network on any device.

    Args:
      name: a key of `MODELS`.
      num_classes: logits.
      rngs: for the parameters.
      method: "uniq", "n2uq", "uniq_n2uq" (UniQ weights, N2UQ activations), "lsq", or None.
      weight_bits: 1 to 8; given if and only if there is a method.
      activation_bits: 1 to 8, where N2UQ quantizes activations 1 to 5; given if and only if there
        is a method.
      granularity: of learned weight steps: "layer", one, or "channel", one for each output channel.
        N2UQ's weights have none, and take "layer" only; without a method it says nothing.
      quantize_downsample: whether shortcut convolutions are quantized too; at one bit UniQ and
        N2UQ never do.
      **options: further arguments of the network, `in_features` for example.

    Raises:
      TypeError: if the network takes no such option.
      ValueError: if there is no network, method or granularity of that name, `num_classes` is no
        positive integer, or a width is missing or out of range.

    Example:
      >>> from flax import nnx
      >>> from uniq_jax import models
      >>> model = models.create("resnet20", num_classes=10, rngs=nnx.Rngs(0), method="uniq",
      ...                       weight_bits=2, activation_bits=4)
      >>> model.layer1[0].conv1.weight_quantizer.method
      UniqWeight(bits=2, granularity='layer')
    """
    if not isinstance(name, str) or name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name (={name!r}) must be one of {', '.join(sorted(MODELS))}{hint}")
    if not isinstance(num_classes, numbers.Integral) or num_classes < 1:
        raise ValueError(f"num_classes (={num_classes!r}) must be an integer, at least 1")
    if granularity not in ("layer", "channel"):
        raise ValueError(f"granularity (={granularity!r}) must be 'layer' or 'channel'")
    widths = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    if method is None:
        for key, value in widths.items():
            if value is not None:
                raise ValueError(f"{key} (={value}) must be None where method is None")
        return MODELS[name](num_classes=num_classes, rngs=rngs, **options)
    if method not in get_args(Method):
        allowed = ", ".join(map(repr, get_args(Method)))
        raise ValueError(f"method (={method!r}) must be one of {allowed}, or None")
    for key, value in widths.items():
        if value is None:
            raise ValueError(f"{key} (=None) must be given for method {method!r}")
        largest = 5 if key == "activation_bits" and "n2uq" in method else 8
        if value not in range(1, largest + 1):
            raise ValueError(
                f"{key} (={value!r}) must be an integer from 1 to {largest} for method {method!r}"
            )
    arguments: dict[str, Any] = {**widths, "quantize_shortcut": quantize_downsample}
    if method == "n2uq":
        if granularity != "layer":
            raise ValueError(
                f"granularity (={granularity!r}) must be 'layer' for method 'n2uq', whose weights "
                "have no learned step: their scale is one of each output channel"
            )
        options = {**_N2UQ_SHAPES.get(name, {}), **options}
        preset = rules.n2uq(**arguments, **_PACT.get(name, {}))
    elif method == "uniq":
        preset = rules.uniq(**arguments, granularity=granularity, **_SIGNED.get(name, {}))
    elif method == "lsq":
        preset = rules.lsq(**arguments, granularity=granularity, **_SIGNED.get(name, {}))
    else:
        signed_last = _SIGNED.get(name, {}).get("signed_last", False)
        preset = rules.uniq_n2uq(**arguments, granularity=granularity, signed_last=signed_last)
    model = quantize(MODELS[name](num_classes=num_classes, rngs=rngs, **options), preset)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.Linear) and not isinstance(layer, QuantLayer):
            layer.precision = jax.lax.Precision.HIGHEST
    return model
