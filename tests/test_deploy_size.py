"""Bytes of a network against a count by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import deploy, rules
from uniq_jax.nn import N2uqActivation, N2uqWeight, UniqActivation, UniqWeight
from uniq_jax.quantization import quantize
from uniq_jax.quantizers import pack_codes


class Network(nnx.Module):
    """81 + 3 + 2·3 + 2·3 + 15 + 5 = 116 numbers in float."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)  # 81 + 3
        self.norm = nnx.BatchNorm(3, rngs=rngs)  # 6 and 6
        self.head = nnx.Linear(3, 5, rngs=rngs)  # 15 + 5


FLOAT = 4 * 116


def test_a_float_network():
    assert deploy.model_size(Network()) == deploy.Size(FLOAT, FLOAT)


def ceil_bytes(bits):
    return -(-bits // 8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("granularity", "conv_steps", "head_steps"), [("layer", 1, 1), ("channel", 3, 5)]
)
def test_uniq(bits, granularity, conv_steps, head_steps):
    model = quantize(
        Network(), [rules.Rule(".*", UniqWeight(bits, granularity), UniqActivation(bits))]
    )
    kernels = ceil_bytes(81 * bits) + ceil_bytes(15 * bits)
    steps = conv_steps + head_steps + 2
    assert deploy.model_size(model) == deploy.Size(
        float_bytes=FLOAT, packed_bytes=kernels + 4 * (steps + 3 + 12 + 5)
    )


def test_scales_that_are_not_learned_count_too():
    """N2UQ's weights have one for each output channel; its activations have n + 3 numbers."""
    model = quantize(Network(), [rules.Rule(".*", N2uqWeight(3), N2uqActivation(2))])
    kernels = ceil_bytes(81 * 3) + ceil_bytes(15 * 3)
    scales, thresholds = 3 + 5, 2 * (3 + 3)
    assert deploy.model_size(model) == deploy.Size(
        float_bytes=FLOAT, packed_bytes=kernels + 4 * (scales + thresholds + 3 + 12 + 5)
    )


def test_layers_that_stay_float_and_activations_alone():
    model = quantize(
        Network(), [rules.Rule("conv", UniqWeight(2)), rules.Rule("head", None, UniqActivation(2))]
    )
    packed = ceil_bytes(81 * 2) + 4 * (1 + 3 + 12 + 1 + 15 + 5)
    assert deploy.model_size(model) == deploy.Size(float_bytes=FLOAT, packed_bytes=packed)


def test_narrow_parameters_count_as_float32():
    class Narrow(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(3, 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    assert deploy.model_size(Narrow()) == deploy.Size(80, 80)


def test_shared_layers_count_once_and_random_keys_not_at_all():
    class Shared(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.z = nnx.Linear(4, 4, rngs=rngs)
            self.a = nnx.List([self.z])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    model = Shared()
    assert deploy.model_size(model) == deploy.Size(80, 80)
    quantize(model, [rules.Rule(".*", UniqWeight(2), UniqActivation(2))])
    assert deploy.model_size(model) == deploy.Size(80, 4 + 16 + 4 + 4)


def test_packed_bytes_are_those_of_the_packer():
    model = quantize(Network(), [rules.Rule(".*", UniqWeight(3))])
    packed = 0
    for layer in (model.conv, model.head):
        codes = layer.weight_quantizer.encode(layer.kernel[...]).codes
        packed += pack_codes(np.asarray(codes), bits=3).nbytes
    others = 4 * (2 + 3 + 12 + 5)
    assert deploy.model_size(model).packed_bytes == packed + others
