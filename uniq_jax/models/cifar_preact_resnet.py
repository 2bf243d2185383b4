"""Pre-activation residual networks for small images: ResNet-20, -32, -44, -56.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016 (arXiv:1603.05027), in the shape
that UniQ trains on CIFAR-100: 1x1 convolutions, without batch norm, where a stage begins.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.exact import exact_mean
from uniq_jax.models.blocks import batch_norm, cifar_stages, convolution, dense
from uniq_jax.models.preact_resnet import PreactBlock


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
        self.layer1, self.layer2, self.layer3 = cifar_stages(PreactBlock, depth, width, **options)
        self.bn = batch_norm(4 * width, **options)
        self.fc = dense(4 * width, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv1(x)
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return self.fc(exact_mean(nnx.relu(self.bn(x))))
