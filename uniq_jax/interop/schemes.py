"""What other programs call the parameters of these networks.

A scheme is an ordered list of substitutions on the dotted path of a variable, for example on
"layer2.0.conv1.weight" for the kernel at layer2/0/conv1/kernel. Each is applied once; later ones
see what earlier ones left.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

from flax import nnx

from uniq_jax import models

Replacement = str | Callable[[re.Match[str]], str]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One program's names.

    Attributes:
      name: "torchvision", "pytorchcv", …
      substitutions: regular expression and replacement, in order.
      convolutions: names of matrices here that are 1x1 convolutions there.
    """

    name: str
    substitutions: tuple[tuple[str, Replacement], ...] = ()
    convolutions: frozenset[str] = frozenset()

    def rename(self, dotted: str) -> str:
        """The name of the variable at this dotted path."""
        for pattern, replacement in self.substitutions:
            dotted = re.sub(pattern, replacement, dotted, count=1)
        return dotted


# Learned quantizer state in UniQ's program and in N2UQ's, where quantizers of the inputs stand
# beside the convolutions.
_QUANTIZERS: tuple[tuple[str, Replacement], ...] = (
    (r"\bweight_quantizer\.step$", "quan_w.delta"),
    (r"\bactivation_quantizer\.step$", "quan_a.delta"),
    (r"\bconv(\d)\.activation_quantizer\.start$", r"quan\1.start"),
    (r"\bconv(\d)\.activation_quantizer\.intervals$", r"quan\1.a"),
    (r"\bconv(\d)\.activation_quantizer\.input_scale$", r"quan\1.scale1"),
    (r"\bconv(\d)\.activation_quantizer\.output_scale$", r"quan\1.scale2"),
    (r"\bconv(\d)\.activation_quantizer\.clip$", r"quan\1.clip_val"),
)

# N2UQ's activations: those behind the sum of a bottleneck have the number 0.
_BIASED_PRELU: tuple[tuple[str, Replacement], ...] = (
    (r"\bact4\.", "act0."),
    (r"\bact(\d)\.before$", r"bias\g<1>1.bias"),
    (r"\bact(\d)\.slope$", r"prelu\1.weight"),
    (r"\bact(\d)\.after$", r"bias\g<1>2.bias"),
)

_SHORTCUT_OF_TWO: tuple[tuple[str, Replacement], ...] = (
    (r"\bdownsample\.", "downsample.0."),
    (r"\bdownsample_bn\.", "downsample.1."),
)

# With N2UQ the shortcut's quantizer is the first of three modules.
_SHORTCUT_OF_THREE: tuple[tuple[str, Replacement], ...] = (
    (r"\bdownsample\.activation_quantizer\.start$", "downsample!0.start"),
    (r"\bdownsample\.activation_quantizer\.intervals$", "downsample!0.a"),
    (r"\bdownsample\.activation_quantizer\.input_scale$", "downsample!0.scale1"),
    (r"\bdownsample\.activation_quantizer\.output_scale$", "downsample!0.scale2"),
    (r"\bdownsample\.", "downsample!1."),
    (r"\bdownsample_bn\.", "downsample!2."),
    ("!", "."),
)


def _later(template: str, shift: int = 1) -> Callable[[re.Match[str]], str]:
    """A replacement in which {0}, {1} … are the groups, the last one a number plus `shift`."""

    def replace(match: re.Match[str]) -> str:
        *others, last = match.groups()
        return template.format(*others, int(last) + shift)

    return replace


_PYTORCHCV_STAGES: tuple[tuple[str, Replacement], ...] = (
    (r"^layer(\d)\.(\d+)\.(?=conv|bn)", _later("features.stage{0}.unit{1}.body.")),
    (r"^layer(\d)\.(\d+)\.", _later("features.stage{0}.unit{1}.")),
    (r"\bbody\.conv(\d)\.", r"body.conv\1.conv."),
    (r"\bbody\.bn(\d)\.", r"body.conv\1.bn."),
)


def _resnet(paths: Collection[str]) -> list[Scheme]:
    has_quantizer = any("downsample/activation_quantizer/start" in path for path in paths)
    is_biased = any("/act1/" in path for path in paths)
    shortcut = _SHORTCUT_OF_THREE if has_quantizer else _SHORTCUT_OF_TWO
    n2uq = Scheme("n2uq", (*_BIASED_PRELU, *shortcut, *_QUANTIZERS))
    vision = Scheme("torchvision", (*_SHORTCUT_OF_TWO, *_QUANTIZERS))
    cv = Scheme(
        "pytorchcv",
        (
            (r"^conv1\.", "features.init_block.conv.conv."),
            (r"^bn1\.", "features.init_block.conv.bn."),
            *_PYTORCHCV_STAGES,
            (r"\bdownsample\.", "identity_conv.conv."),
            (r"\bdownsample_bn\.", "identity_conv.bn."),
            (r"^fc\.", "output."),
        ),
    )
    return [n2uq, vision, cv] if is_biased else [vision, cv]


def _preact_resnet(paths: Collection[str]) -> list[Scheme]:
    del paths
    cv = (
        (r"^conv1\.", "features.init_block.conv."),
        (r"^bn1\.", "features.init_block.bn."),
        *_PYTORCHCV_STAGES,
        (r"^bn2\.", "features.post_activ.bn."),
        (r"\bdownsample\.", "identity_conv."),
        (r"^fc\.", "output."),
    )
    return [
        Scheme("uniq", ((r"\bdownsample\.", "shortcut.0."), *_QUANTIZERS)),
        Scheme("pytorchcv", cv),
    ]


def _cifar_preact_resnet(paths: Collection[str]) -> list[Scheme]:
    del paths
    cv = (
        (r"^conv1\.", "features.init_block."),
        *_PYTORCHCV_STAGES,
        (r"^bn\.", "features.post_activ.bn."),
        (r"\bdownsample\.", "identity_conv."),
        (r"^fc\.", "output."),
    )
    return [
        Scheme("uniq", ((r"\bdownsample\.", "downsample.0."), *_QUANTIZERS)),
        Scheme("pytorchcv", cv),
    ]


def _cifar_resnet(paths: Collection[str]) -> list[Scheme]:
    del paths
    cv = (
        (r"^conv1\.", "features.init_block.conv."),
        (r"^bn1\.", "features.init_block.bn."),
        *_PYTORCHCV_STAGES,
        (r"\bdownsample\.", "identity_conv.conv."),
        (r"\bdownsample_bn\.", "identity_conv.bn."),
        (r"^linear\.", "output."),
    )
    akamaster = (
        (r"\bdownsample\.", "shortcut.0."),
        (r"\bdownsample_bn\.", "shortcut.1."),
        *_QUANTIZERS,
    )
    return [Scheme("akamaster", akamaster), Scheme("pytorchcv", cv)]


# Blocks of MobileNet-V2 before each stage of pytorchcv, which counts a stage from every halving of
# the image.
_PYTORCHCV_MOBILENET = (0, 1, 3, 6, 13)


def _pytorchcv_unit(match: re.Match[str]) -> str:
    block = int(match[1])
    stage = max(i for i, first in enumerate(_PYTORCHCV_MOBILENET) if first <= block)
    return f"features.stage{stage + 1}.unit{block - _PYTORCHCV_MOBILENET[stage] + 1}."


def _mobilenet_v2(paths: Collection[str]) -> list[Scheme]:
    vision = (
        (r"^conv1\.", "features.0.0."),
        (r"^bn1\.", "features.0.1."),
        (r"^conv2\.", "features.18.0."),
        (r"^bn2\.", "features.18.1."),
        (r"^fc\.", "classifier.1."),
        # Its first block does not expand: what does so here has a name that it has nowhere.
        (r"^blocks\.0\.conv1\.", "features.1.expand.0."),
        (r"^blocks\.0\.bn1\.", "features.1.expand.1."),
        (r"^blocks\.0\.conv2\.", "features.1.conv.0.0."),
        (r"^blocks\.0\.bn2\.", "features.1.conv.0.1."),
        (r"^blocks\.0\.conv3\.", "features.1.conv.1."),
        (r"^blocks\.0\.bn3\.", "features.1.conv.2."),
        (r"^blocks\.(\d+)\.conv3\.", _later("features.{0}.conv.2.")),
        (r"^blocks\.(\d+)\.bn3\.", _later("features.{0}.conv.3.")),
        (r"^blocks\.(\d+)\.conv1\.", _later("features.{0}.conv.0.0.")),
        (r"^blocks\.(\d+)\.bn1\.", _later("features.{0}.conv.0.1.")),
        (r"^blocks\.(\d+)\.conv2\.", _later("features.{0}.conv.1.0.")),
        (r"^blocks\.(\d+)\.bn2\.", _later("features.{0}.conv.1.1.")),
        *_QUANTIZERS,
    )
    n2uq = (
        *_QUANTIZERS,
        *_BIASED_PRELU,
        (r"^(conv|bn)1\.", r"feature.0.\g<1>1."),
        (r"^(conv|bn|quan)2\.", r"feature.18.\g<1>1."),
        (r"^blocks\.(\d+)\.", _later("feature.{0}.")),
    )
    cv = (
        (r"^conv1\.", "features.init_block.conv."),
        (r"^bn1\.", "features.init_block.bn."),
        (r"^conv2\.", "features.final_block.conv."),
        (r"^bn2\.", "features.final_block.bn."),
        (r"^fc\.", "output."),
        (r"^blocks\.(\d+)\.", _pytorchcv_unit),
        (r"\bunit(\d+)\.conv(\d)\.", r"unit\1.conv\2.conv."),
        (r"\bunit(\d+)\.bn(\d)\.", r"unit\1.conv\2.bn."),
    )
    is_biased = any("/act1/" in path for path in paths)
    schemes = [Scheme("torchvision", vision), Scheme("n2uq", n2uq)]
    last = Scheme("pytorchcv", cv, frozenset({"output.weight"}))
    return [*(reversed(schemes) if is_biased else schemes), last]


_SCHEMES: Mapping[type[nnx.Module], Callable[[Collection[str]], list[Scheme]]] = {
    models.ResNet: _resnet,
    models.PreactResNet: _preact_resnet,
    models.CifarPreactResNet: _cifar_preact_resnet,
    models.CifarResNet: _cifar_resnet,
    models.MobileNetV2: _mobilenet_v2,
}

# The paths themselves, dotted: for every other model, and everywhere the last to be tried.
PLAIN = Scheme("plain")


def schemes(model: nnx.Module, paths: Collection[str]) -> list[Scheme]:
    """The schemes that a model's parameters are known under, its own program's first.

    Args:
      model: any module.
      paths: of its variables, "layer1/0/conv1/kernel".
    """
    # A class derived from one of these has its parameters, and perhaps more.
    known = next((_SCHEMES[base] for base in type(model).__mro__ if base in _SCHEMES), None)
    return [*(known(paths) if known else ()), PLAIN]
