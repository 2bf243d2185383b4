"""A layer and a network in PyTorch, float or quantized by Brevitas; a part of `compare.py`."""

import os
from collections.abc import Callable
from typing import Any

import brevitas.nn as qnn
import numpy as np
import torch
from brevitas.inject.enum import ScalingImplType
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat
from torch import nn
from torch.nn import functional

torch.set_num_threads(len(os.sched_getaffinity(0)))


class LearnedWeightScale(Int8WeightPerTensorFloat):
    """One scale a layer, which starts from the weights and is learned, as UniQ's step."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS


class LearnedInputScale(Uint8ActPerTensorFloat):
    """One scale that is learned from the third batch on, before which nothing is timed.

    The first is measured, and the second makes a parameter of it; Brevitas would measure 300.
    """

    collect_stats_steps = 1


class LearnedSignedInputScale(Int8ActPerTensorFloat):
    """The same for inputs that may be negative."""

    collect_stats_steps = 1


def _convolution(inputs: int, outputs: int, size: int, stride: int, bits: int | None) -> nn.Module:
    options: dict[str, Any] = {"stride": stride, "padding": size // 2, "bias": False}
    if bits is None:
        return nn.Conv2d(inputs, outputs, size, **options)
    return qnn.QuantConv2d(
        inputs,
        outputs,
        size,
        **options,
        weight_quant=LearnedWeightScale,
        weight_bit_width=bits,
    )


def _input(bits: int | None, *, signed: bool = False) -> nn.Module:
    """What quantizes a layer's input, with a learned scale."""
    if bits is None:
        return nn.Identity()
    kind = LearnedSignedInputScale if signed else LearnedInputScale
    return qnn.QuantIdentity(act_quant=kind, bit_width=bits)


def layer(images: np.ndarray, cotangent: np.ndarray, bits: int | None) -> Callable[[], None]:
    """A 3x3 convolution on a quantized input, forward and backward.

    Args:
      images: (batch, height, width, channels).
      cotangent: of the output, which has the same shape.
      bits: of weights and inputs; None for the float layer.
    """
    channels = images.shape[-1]
    module = nn.Sequential(_input(bits), _convolution(channels, channels, 3, 1, bits))
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    g = torch.from_numpy(cotangent.transpose(0, 3, 1, 2).copy())

    def run() -> None:
        module.zero_grad()
        x.grad = None
        module(x).backward(g)

    return run


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, bits: int | None):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.input1, self.input2 = _input(bits), _input(bits)
        self.conv1 = _convolution(inputs, outputs, 3, stride, bits)
        self.conv2 = _convolution(outputs, outputs, 3, 1, bits)
        self.shortcut = (
            None
            if stride == 1 and inputs == outputs
            else nn.Sequential(_input(bits), _convolution(inputs, outputs, 1, stride, bits))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(self.input1(y))
        return self.conv2(self.input2(functional.relu(self.bn2(y)))) + shortcut


class _PreactResNet32(nn.Module):
    def __init__(self, bits: int | None, classes: int = 100):
        super().__init__()
        ends = None if bits is None else 8
        self.first = nn.Sequential(_input(ends, signed=True), _convolution(3, 16, 3, 1, ends))
        blocks, inputs = [], 16
        for stage, outputs in enumerate((16, 32, 64)):
            for i in range(5):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_Block(inputs, outputs, stride, bits))
                inputs = outputs
        self.blocks, self.bn, self.last = nn.Sequential(*blocks), nn.BatchNorm2d(64), _input(ends)
        self.fc = (
            nn.Linear(64, classes)
            if ends is None
            else qnn.QuantLinear(
                64, classes, bias=True, weight_quant=LearnedWeightScale, weight_bit_width=ends
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn(self.blocks(self.first(x))))
        return self.fc(self.last(x.mean((2, 3))))


def network(batch: int, bits: int | None) -> Callable[[], None]:
    """A training step of the pre-activation ResNet-32 on random images.

    Args:
      batch: images.
      bits: of weights and inputs of all layers but the first and the last; None for the float one.
    """
    torch.manual_seed(0)
    module = _PreactResNet32(bits).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 100, (batch,))

    def run() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(module((images - 127.5) / 64), labels).backward()
        optimizer.step()

    return run
