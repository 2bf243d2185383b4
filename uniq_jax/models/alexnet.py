"""AlexNet with batch norm.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997), in
torchvision's sizes, with batch norm in place of biases and dropout, as networks of few bits need.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.models.blocks import batch_norm, check_image_size, convolution, dense

# Channels, size and stride of the convolutions, and whether a max-pool follows.
_CONVOLUTIONS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)

# Channels of the two hidden fully connected layers.
_HIDDEN = 4096


class AlexNet(nnx.Module):
    """Five convolutions and three fully connected layers, each but the last with batch norm.

    Args:
      num_classes: logits.
      image_size: height and width of the images, at least 63.
      in_features: channels of the images.
      dtype: of the computation; None for that of images and parameters.
      param_dtype: of the parameters.
      rngs: for the parameters.

    Call with images (batch, image_size, image_size, in_features); returns logits
    (batch, num_classes).

    Raises:
      ValueError: when called with images of another size.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int = 224,
        in_features: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        # The first convolution and three max-pools shrink the image.
        size = (image_size - 7) // 4 + 1
        for _ in range(3):
            size = (size - 3) // 2 + 1
        if size < 1:
            raise ValueError(f"image_size (={image_size}) must be at least 63")
        self.image_size = image_size
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        for i, (features, window, stride, padding, _) in enumerate(_CONVOLUTIONS, start=1):
            layer = convolution(in_features, features, window, stride, padding=padding, **options)
            setattr(self, f"conv{i}", layer)
            setattr(self, f"bn{i}", batch_norm(features, **options))
            in_features = features
        self.fc1 = dense(in_features * size * size, _HIDDEN, use_bias=False, **options)
        self.fc1_bn = batch_norm(_HIDDEN, **options)
        self.fc2 = dense(_HIDDEN, _HIDDEN, use_bias=False, **options)
        self.fc2_bn = batch_norm(_HIDDEN, **options)
        self.fc = dense(_HIDDEN, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        check_image_size(x, self.image_size)
        for i, (*_, is_pooled) in enumerate(_CONVOLUTIONS, start=1):
            x = nnx.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
            if is_pooled:
                x = nnx.max_pool(x, (3, 3), strides=(2, 2))
        # Channel by channel, so that fc1's weights are those of a network in PyTorch.
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
        x = nnx.relu(self.fc1_bn(self.fc1(x)))
        x = nnx.relu(self.fc2_bn(self.fc2(x)))
        return self.fc(x)
