"""The float networks of both papers; quantized through `uniq_jax.quantize` and its rules only."""

from uniq_jax.models.cifar_preact_resnet import CifarPreactResNet as CifarPreactResNet
from uniq_jax.models.cifar_resnet import CifarResNet as CifarResNet
from uniq_jax.models.registry import MODELS as MODELS
from uniq_jax.models.registry import create as create
