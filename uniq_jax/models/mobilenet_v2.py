"""MobileNet-V2 of width 1.0, as torchvision has it, but for its dropout, and as N2UQ does.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018
(arXiv:1801.04381).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.exact import exact_mean
from uniq_jax.models.activations import ActivationFactory, BiasedPRelu, identity, relu6
from uniq_jax.models.blocks import batch_norm, convolution, dense

# Expansion, channels, blocks, and stride of the first of them (table 2 of the paper).
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nnx.Module):
    """A 1x1 convolution that expands, a depthwise 3x3 one, and a 1x1 one that projects.

    Each is followed by batch norm; the input is added where shapes allow, and no activation stands
    behind the last batch norm.

    Args:
      in_features, features: channels of the input and of the output.
      stride: of the depthwise convolution.
      width: channels between the convolutions.
      expand: whether there is a first convolution.
      enter: makes what stands before the first convolution, beside the shortcut.
      activation: makes the other activations.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        width: int,
        expand: bool,
        enter: ActivationFactory = identity,
        activation: ActivationFactory = relu6,
        **options: Any,
    ):
        self.adds = stride == 1 and in_features == features
        if expand:
            self.act1 = enter(in_features, **options)
            self.conv1 = nnx.data(convolution(in_features, width, 1, 1, **options))
            self.bn1 = nnx.data(batch_norm(width, **options))
            self.act2 = activation(width, **options)
        else:
            self.conv1 = nnx.data(None)
        self.conv2 = convolution(width, width, 3, stride, feature_group_count=width, **options)
        self.bn2 = batch_norm(width, **options)
        self.act3 = activation(width, **options)
        self.conv3 = convolution(width, features, 1, 1, **options)
        self.bn3 = batch_norm(features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.conv1 is not None:
            y = self.act2(self.bn1(self.conv1(self.act1(y))))
        y = self.act3(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """MobileNet-V2 for images of about 224x224.

    Args:
      num_classes: logits.
      activation: "relu6", or "biased_prelu" for N2UQ's network, whose blocks have one before every
        convolution.
      expand_first: whether the first block has an expanding convolution too (from 32 to 32
        channels), as in N2UQ's and pytorchcv's networks, and unlike the paper and torchvision.
      use_bias: of the last layer.
      in_features: channels of the images.
      dtype: of the computation; None for that of images and parameters.
      param_dtype: of the parameters.
      rngs: for the parameters.

    Call with images (batch, height, width, in_features); returns logits (batch, num_classes).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        activation: Literal["relu6", "biased_prelu"] = "relu6",
        expand_first: bool | None = None,
        use_bias: bool = True,
        in_features: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in ("relu6", "biased_prelu"):
            raise ValueError(f"activation (={activation!r}) must be 'relu6' or 'biased_prelu'")
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        is_biased = activation == "biased_prelu"
        inner: dict[str, Any] = (
            {"enter": BiasedPRelu, "activation": BiasedPRelu} if is_biased else {}
        )
        expand_first = is_biased if expand_first is None else expand_first
        features = 32
        self.conv1 = convolution(in_features, features, 3, 2, **options)
        self.bn1 = batch_norm(features, **options)
        self.act1 = nnx.relu6
        self.blocks = nnx.List([])
        for expansion, channels, count, first_stride in _STAGES:
            for i in range(count):
                block = InvertedResidual(
                    features,
                    channels,
                    first_stride if i == 0 else 1,
                    width=features * expansion,
                    expand=expand_first if expansion == 1 else True,
                    **inner,
                    **options,
                )
                self.blocks.append(block)
                features = channels
        self.conv2 = convolution(features, 1280, 1, 1, **options)
        self.bn2 = batch_norm(1280, **options)
        self.act2 = nnx.relu6
        self.fc = dense(1280, num_classes, use_bias=use_bias, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.act1(self.bn1(self.conv1(x)))
        for block in self.blocks:
            x = block(x)
        x = self.act2(self.bn2(self.conv2(x)))
        return self.fc(exact_mean(x))
