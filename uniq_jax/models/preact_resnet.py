"""Pre-activation residual networks: ResNet-18, -34, -50.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016 (arXiv:1603.05027), in the shape
that UniQ trains on ImageNet: the shortcut starts behind a block's first relu, and where shapes
differ it is a 1x1 convolution without batch norm.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.exact import exact_mean
from uniq_jax.models.blocks import batch_norm, convolution, dense, imagenet_stages, max_pool


class PreactBlock(nnx.Module):
    """bn–relu–conv twice, plus the shortcut.

    Args:
      in_features, features: channels of the input and of the output.
      stride: of the first convolution, and of the shortcut's.
    """

    expansion = 1

    def __init__(self, in_features: int, features: int, stride: int, **options: Any):
        self.bn1 = batch_norm(in_features, **options)
        self.conv1 = convolution(in_features, features, 3, stride, **options)
        self.bn2 = batch_norm(features, **options)
        self.conv2 = convolution(features, features, 3, 1, **options)
        self.downsample = nnx.data(_downsample(in_features, features, stride, **options))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        return self.conv2(nnx.relu(self.bn2(y))) + shortcut


class PreactBottleneck(nnx.Module):
    """bn–relu–conv three times, 1x1, 3x3 and 1x1, plus the shortcut.

    Args:
      in_features: channels of the input.
      features: channels of the output, a multiple of 4.
      stride: of the 3x3 convolution, and of the shortcut's.
    """

    expansion = 4

    def __init__(self, in_features: int, features: int, stride: int, **options: Any):
        width = features // self.expansion
        self.bn1 = batch_norm(in_features, **options)
        self.conv1 = convolution(in_features, width, 1, 1, **options)
        self.bn2 = batch_norm(width, **options)
        self.conv2 = convolution(width, width, 3, stride, **options)
        self.bn3 = batch_norm(width, **options)
        self.conv3 = convolution(width, features, 1, 1, **options)
        self.downsample = nnx.data(_downsample(in_features, features, stride, **options))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(nnx.relu(self.bn2(y)))
        return self.conv3(nnx.relu(self.bn3(y))) + shortcut


def _downsample(in_features: int, features: int, stride: int, **options: Any) -> nnx.Conv | None:
    if stride == 1 and in_features == features:
        return None
    return convolution(in_features, features, 1, stride, **options)


_BLOCKS = {18: PreactBlock, 34: PreactBlock, 50: PreactBottleneck}


class PreactResNet(nnx.Module):
    """A pre-activation residual network for images of about 224x224.

    Args:
      depth: 18, 34 or 50.
      num_classes: logits.
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
        in_features: int = 3,
        width: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depth not in _BLOCKS:
            raise ValueError(f"depth (={depth}) must be one of {', '.join(map(str, _BLOCKS))}")
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1 = convolution(in_features, width, 7, 2, **options)
        self.bn1 = batch_norm(width, **options)
        self.layer1, self.layer2, self.layer3, self.layer4 = imagenet_stages(
            _BLOCKS[depth], depth, width, **options
        )
        features = 8 * width * _BLOCKS[depth].expansion
        self.bn2 = batch_norm(features, **options)
        self.fc = dense(features, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_pool(nnx.relu(self.bn1(self.conv1(x))))
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = block(x)
        return self.fc(exact_mean(nnx.relu(self.bn2(x))))
