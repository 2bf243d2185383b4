"""Residual networks: ResNet-18, -34, -50, -101, as torchvision has them and as N2UQ does.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv:1512.03385), with the
stride of a bottleneck on its 3x3 convolution. Liu et al., "Nonuniform-to-Uniform Quantization",
CVPR 2022 (arXiv:2111.14826), keep the shape and put learned channel biases and PReLUs in front of
every convolution that they quantize.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.exact import exact_mean
from uniq_jax.models.activations import ActivationFactory, BiasedPRelu, identity, relu
from uniq_jax.models.blocks import batch_norm, convolution, dense, imagenet_stages, max_pool


class _Block(nnx.Module):
    """What residual blocks share: the shortcut."""

    def _add_shortcut(
        self, in_features: int, features: int, stride: int, shortcut: str, **options: Any
    ) -> None:
        self.stride = stride
        self.extra_features = features - in_features
        changes = stride != 1 or in_features != features
        projects = changes and shortcut == "B"
        self.downsample = nnx.data(
            convolution(in_features, features, 1, stride, **options) if projects else None
        )
        self.downsample_bn = nnx.data(batch_norm(features, **options) if projects else None)

    def _shortcut(self, x: jax.Array) -> jax.Array:
        if self.downsample is not None and self.downsample_bn is not None:
            return self.downsample_bn(self.downsample(x))
        before = self.extra_features // 2
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, [(0, 0)] * 3 + [(before, self.extra_features - before)])


class BasicBlock(_Block):
    """conv–bn twice, each behind its activation, plus the shortcut, then another activation.

    Args:
      in_features, features: channels of the input and of the output.
      stride: of the first convolution.
      shortcut: where shapes differ, "A" subsamples the input and pads its channels with zeros, "B"
        is a 1x1 convolution with batch norm.
      enter: makes what stands before the first convolution, beside the shortcut.
      activation: makes the other activations.
    """

    expansion = 1

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        shortcut: Literal["A", "B"] = "B",
        enter: ActivationFactory = identity,
        activation: ActivationFactory = relu,
        **options: Any,
    ):
        self.act1 = enter(in_features, **options)
        self.conv1 = convolution(in_features, features, 3, stride, **options)
        self.bn1 = batch_norm(features, **options)
        self.act2 = activation(features, **options)
        self.conv2 = convolution(features, features, 3, 1, **options)
        self.bn2 = batch_norm(features, **options)
        self._add_shortcut(in_features, features, stride, shortcut, **options)
        self.act3 = activation(features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.bn1(self.conv1(self.act1(x)))
        y = self.bn2(self.conv2(self.act2(y)))
        return self.act3(y + self._shortcut(x))


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions, the last of which has four times as many channels.

    Args:
      in_features: channels of the input.
      features: channels of the output, a multiple of 4.
      stride: of the 3x3 convolution.
      enter, activation: as in `BasicBlock`.
    """

    expansion = 4

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        enter: ActivationFactory = identity,
        activation: ActivationFactory = relu,
        **options: Any,
    ):
        width = features // self.expansion
        self.act1 = enter(in_features, **options)
        self.conv1 = convolution(in_features, width, 1, 1, **options)
        self.bn1 = batch_norm(width, **options)
        self.act2 = activation(width, **options)
        self.conv2 = convolution(width, width, 3, stride, **options)
        self.bn2 = batch_norm(width, **options)
        self.act3 = activation(width, **options)
        self.conv3 = convolution(width, features, 1, 1, **options)
        self.bn3 = batch_norm(features, **options)
        self._add_shortcut(in_features, features, stride, "B", **options)
        self.act4 = activation(features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.bn1(self.conv1(self.act1(x)))
        y = self.bn2(self.conv2(self.act2(y)))
        y = self.bn3(self.conv3(self.act3(y)))
        return self.act4(y + self._shortcut(x))


_BLOCKS = {18: BasicBlock, 34: BasicBlock, 50: Bottleneck, 101: Bottleneck}


class ResNet(nnx.Module):
    """A residual network for images of about 224x224.

    Args:
      depth: 18, 34, 50 or 101.
      num_classes: logits.
      activation: "relu", or "biased_prelu" for N2UQ's network, which has one before every
        convolution but the first, and one behind every residual sum.
      in_features: channels of the images.
      width: channels of the first stage's 3x3 convolutions.
      dtype: of the computation; None for that of images and parameters.
      param_dtype: of the parameters.
      rngs: for the parameters.

    Call with images (batch, height, width, in_features); returns logits (batch, num_classes).
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        activation: Literal["relu", "biased_prelu"] = "relu",
        in_features: int = 3,
        width: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depth not in _BLOCKS:
            raise ValueError(f"depth (={depth}) must be one of {', '.join(map(str, _BLOCKS))}")
        if activation not in ("relu", "biased_prelu"):
            raise ValueError(f"activation (={activation!r}) must be 'relu' or 'biased_prelu'")
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inner: dict[str, Any] = {}
        if activation == "biased_prelu":
            inner = {"enter": BiasedPRelu, "activation": BiasedPRelu}
        self.conv1 = convolution(in_features, width, 7, 2, **options)
        self.bn1 = batch_norm(width, **options)
        self.layer1, self.layer2, self.layer3, self.layer4 = imagenet_stages(
            _BLOCKS[depth], depth, width, **inner, **options
        )
        self.fc = dense(8 * width * _BLOCKS[depth].expansion, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_pool(nnx.relu(self.bn1(self.conv1(x))))
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = block(x)
        return self.fc(exact_mean(x))
