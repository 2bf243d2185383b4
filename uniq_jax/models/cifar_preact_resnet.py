"""Pre-activation residual networks for small images: ResNet-20, -32, -44, -56.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016 (arXiv:1603.05027), in the shape
that UniQ trains on CIFAR-100: 1x1 convolutions, without batch norm, where a stage begins.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.models.blocks import batch_norm, convolution, dense, stages


class PreactBlock(nnx.Module):
    """bn–relu–conv twice, plus the shortcut, which starts behind the first relu.

    Args:
      in_features, features: channels of the input and of the output.
      stride: of the first convolution, and of the shortcut's.
    """

    def __init__(self, in_features: int, features: int, stride: int, **options: Any):
        self.bn1 = batch_norm(in_features, **options)
        self.conv1 = convolution(in_features, features, 3, stride, **options)
        self.bn2 = batch_norm(features, **options)
        self.conv2 = convolution(features, features, 3, 1, **options)
        changes = stride != 1 or in_features != features
        self.downsample = nnx.data(
            convolution(in_features, features, 1, stride, **options) if changes else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        return self.conv2(nnx.relu(self.bn2(y))) + shortcut


class CifarPreactResNet(nnx.Module):
    """A pre-activation residual network of 6n + 2 layers.

    Args:
      depth: 20, 32, 44, 56 or any other 6n + 2.
      num_classes: logits.
      in_features: channels of the images.
      width: channels of the first stage; the others have twice and four times as many.
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
        width: int = 16,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1 = convolution(in_features, width, 3, 1, **options)
        self.layer1, self.layer2, self.layer3 = stages(PreactBlock, depth, width, **options)
        self.bn = batch_norm(4 * width, **options)
        self.fc = dense(4 * width, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv1(x)
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return self.fc(jnp.mean(nnx.relu(self.bn(x)), axis=(1, 2)))
