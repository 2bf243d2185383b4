"""The networks of both papers, float by themselves; quantized through `uniq_jax.quantize` only."""

from uniq_jax.models.alexnet import AlexNet as AlexNet
from uniq_jax.models.cifar_preact_resnet import CifarPreactResNet as CifarPreactResNet
from uniq_jax.models.cifar_resnet import CifarResNet as CifarResNet
from uniq_jax.models.mobilenet_v2 import MobileNetV2 as MobileNetV2
from uniq_jax.models.preact_resnet import PreactResNet as PreactResNet
from uniq_jax.models.registry import MODELS as MODELS
from uniq_jax.models.registry import create as create
from uniq_jax.models.resnet import ResNet as ResNet
from uniq_jax.models.vit import VisionTransformer as VisionTransformer
