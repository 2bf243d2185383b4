"""Residual networks for small images: ResNet-20, -32, -44, -56.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv:1512.03385), section
4.2. A 3x3 stem without pooling and a mean over whatever remains of the image, so that 8x8, 28x28
and 32x32 images pass alike.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.exact import exact_mean
from uniq_jax.models.activations import BiasedPRelu
from uniq_jax.models.blocks import batch_norm, cifar_stages, convolution, dense
from uniq_jax.models.resnet import BasicBlock


class CifarResNet(nnx.Module):
    """A residual network of 6n + 2 layers.

    Args:
      depth: 20, 32, 44, 56 or any other 6n + 2.
      num_classes: logits.
      in_features: channels of the images.
      width: channels of the first stage; the others have twice and four times as many.
      shortcut: "A" (parameter-free) or "B" (1x1 convolutions), where a stage begins.
      activation: "relu", or "biased_prelu" for one of N2UQ's before every convolution of a block
        and behind every residual sum. Parameters of a network with ReLUs fit, as far as they go.
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
        shortcut: Literal["A", "B"] = "A",
        activation: Literal["relu", "biased_prelu"] = "relu",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut (={shortcut!r}) must be 'A' or 'B'")
        if activation not in ("relu", "biased_prelu"):
            raise ValueError(f"activation (={activation!r}) must be 'relu' or 'biased_prelu'")
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inner: dict[str, Any] = {}
        if activation == "biased_prelu":
            inner = {"enter": BiasedPRelu, "activation": BiasedPRelu}
        self.conv1 = convolution(in_features, width, 3, 1, **options)
        self.bn1 = batch_norm(width, **options)
        self.layer1, self.layer2, self.layer3 = cifar_stages(
            BasicBlock, depth, width, shortcut=shortcut, **inner, **options
        )
        self.linear = dense(4 * width, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return self.linear(exact_mean(x))
