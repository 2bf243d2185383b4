"""Small frozen networks with all that exporters have to write, for several test files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import uniq_jax
from uniq_jax import deploy, rules
from uniq_jax.deploy import integers
from uniq_jax.exact import exact_mean
from uniq_jax.models.activations import BiasedPRelu
from uniq_jax.nn import ActivationMethod, UniqActivation, UniqWeight, WeightMethod

SHAPE = (11, 11, 3)


class Small(nnx.Module):
    """A stem with pooling, a block with a residual sum, a depthwise layer and a linear one."""

    def __init__(self, rngs: nnx.Rngs):
        def conv(inputs, outputs, **options):
            return nnx.Conv(inputs, outputs, (3, 3), padding=1, rngs=rngs, **options)

        self.conv1, self.bn1 = conv(3, 8), nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = conv(8, 16, strides=2, use_bias=False)
        self.bn2 = nnx.BatchNorm(16, rngs=rngs)
        self.conv3, self.act3 = conv(16, 16, use_bias=False), BiasedPRelu(16)
        self.conv4 = conv(16, 16, feature_group_count=16)
        self.conv5 = nnx.Conv(16, 12, (1, 1), use_bias=False, rngs=rngs)
        self.fc = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        y = self.act3(self.conv3(self.bn2(self.conv2(x))))
        x = y + jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4)))
        x = self.conv5(self.conv4(x))
        return self.fc(exact_mean(nnx.relu(x)))


@functools.cache
def small(
    weight: WeightMethod,
    activation: ActivationMethod,
    *,
    signed: ActivationMethod | None = None,
    integer_thresholds: bool = True,
) -> deploy.FrozenNetwork:
    """Frozen, with 8 bits at its ends, so that no float product leaves its sums to a runtime.

    `signed` quantizes the inputs of the depthwise layer and the one behind it, if given.
    """
    rng = np.random.default_rng(0)
    # Without compiled programs for each random kernel.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Small(nnx.Rngs(0))))
    values = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), state)
    for name in ("bn1", "bn2"):
        values[name]["var"] = jax.tree.map(np.square, values[name]["var"])
    model = uniq_jax.quantize(
        nnx.merge(graphdef, values),
        [
            rules.Rule("conv1", UniqWeight(8), UniqActivation(8, True)),
            rules.Rule("fc", UniqWeight(8), UniqActivation(8)),
            rules.Rule("conv4|conv5", weight, signed or activation),
            rules.Rule(".*", weight, activation),
        ],
    )
    return deploy.freeze(model, SHAPE, integer_thresholds=integer_thresholds)


def images(count: int, seed: int = 0) -> np.ndarray:
    """float32, as they come from a normalization."""
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


@functools.cache
def answers(network: deploy.FrozenNetwork, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the codes of all quantizers by the name of their node, for `images(count)`."""
    encodes = [node for node in network.graph.nodes if node.operation.startswith("encode")]

    @jax.jit
    def run(batch):
        values = network.values(batch)
        codes = {
            n.name: integers.codes_of(values[n.name], integers.form(*n["grid"])) for n in encodes
        }
        return values[network.graph.output], codes

    logits, codes = run(images(count))
    return np.asarray(logits), {name: np.asarray(value) for name, value in codes.items()}
