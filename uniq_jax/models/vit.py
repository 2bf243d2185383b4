"""Vision transformers: ViT-S/16.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv:2010.11929), in the size of
Touvron et al. (DeiT, arXiv:2012.12877), with timm's names.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uniq_jax.models.blocks import check_image_size

_normal = nnx.initializers.normal(stddev=0.02)


class PatchEmbedding(nnx.Module):
    """Patches (batch, count, features) of an image, each by one linear map."""

    def __init__(self, in_features: int, features: int, patch_size: int, **options: Any):
        window = (patch_size, patch_size)
        self.proj = nnx.Conv(
            in_features, features, window, strides=window, padding="VALID", **options
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.proj(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Attention(nnx.Module):
    """Multi-head self-attention, with one layer for queries, keys and values."""

    def __init__(self, features: int, heads: int, **options: Any):
        self.heads = heads
        self.qkv = nnx.Linear(features, 3 * features, kernel_init=_normal, **options)
        self.proj = nnx.Linear(features, features, kernel_init=_normal, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            part.reshape(*x.shape[:2], self.heads, -1)
            for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        return self.proj(nnx.dot_product_attention(query, key, value).reshape(x.shape))


class Mlp(nnx.Module):
    """Two dense layers with GELU between them."""

    def __init__(self, features: int, hidden: int, **options: Any):
        self.fc1 = nnx.Linear(features, hidden, kernel_init=_normal, **options)
        self.fc2 = nnx.Linear(hidden, features, kernel_init=_normal, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class TransformerBlock(nnx.Module):
    """Attention and MLP, each behind a layer norm and beside a shortcut."""

    def __init__(self, features: int, heads: int, **options: Any):
        self.norm1 = nnx.LayerNorm(features, epsilon=1e-6, **options)
        self.attn = Attention(features, heads, **options)
        self.norm2 = nnx.LayerNorm(features, epsilon=1e-6, **options)
        self.mlp = Mlp(features, 4 * features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """A vision transformer that classifies by its class token.

    Args:
      num_classes: logits.
      features: width of the tokens; a multiple of `heads`.
      depth: blocks.
      heads: of each attention.
      patch_size: height and width of a patch.
      image_size: height and width of the images, a multiple of `patch_size`.
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
        features: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch_size: int = 16,
        image_size: int = 224,
        in_features: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % heads:
            raise ValueError(f"features (={features}) must be a multiple of heads (={heads})")
        if image_size % patch_size:
            raise ValueError(
                f"image_size (={image_size}) must be a multiple of patch_size (={patch_size})"
            )
        self.image_size = image_size
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patch_embed = PatchEmbedding(in_features, features, patch_size, **options)
        tokens = (image_size // patch_size) ** 2 + 1
        self.cls_token = nnx.Param(jnp.zeros((1, 1, features), param_dtype))
        self.pos_embed = nnx.Param(_normal(rngs.params(), (1, tokens, features), param_dtype))
        self.blocks = nnx.List([TransformerBlock(features, heads, **options) for _ in range(depth)])
        self.norm = nnx.LayerNorm(features, epsilon=1e-6, **options)
        self.head = nnx.Linear(features, num_classes, kernel_init=_normal, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        check_image_size(x, self.image_size)
        x = self.patch_embed(x)
        first = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
