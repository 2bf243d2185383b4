# %% [markdown]
# # A quantizer of your own, and a look inside learned thresholds
#
# The package has no ternary weights. Here they are written, drawn, trained together with N2UQ's
# learned thresholds, looked at, and frozen to integers. This page is
# `docs/notebooks/own_quantizer.py`, run when the documentation was built.
#
# ## A function
#
# A quantizer is *thresholds in, equally spaced levels out*: it makes integer codes, and `decode`
# makes values of them. Ternary weights with a learned step Δ are −Δ, 0 and Δ:
#
# ```text
# forward   code  = 1 + [w > −Δ/2] + [w > Δ/2]           1, 2 or 3
#           value = Δ · (code − 2)
# backward  ∂value/∂w = [|w| < 3Δ/2]
#           ∂value/∂Δ = code − 2 − [|w| < 3Δ/2] · w/Δ     summed, over the root of their number
# ```

# %%
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import uniq_jax
from uniq_jax import deploy, plots
from uniq_jax.nn import N2uqActivation, Step, WeightMethod
from uniq_jax.quantizers import Encoded, Grid, decode, n2uq_activation, n2uq_activation_edges


def ternary_encode(w, step, dtype=jnp.uint8):
    codes = 1 + (w > -step / 2).astype(dtype) + (w > step / 2).astype(dtype)
    return Encoded(codes, step, offset=2.0)


@jax.custom_vjp
def ternary(w, step):
    return decode(ternary_encode(w, step))


def _forward(w, step):
    return ternary(w, step), (w, step)


def _backward(residuals, cotangent):
    w, step = residuals
    inside = jnp.abs(w) < 1.5 * step
    level = ternary_encode(w, step, w.dtype).codes - 2
    grad_step = jnp.sum(cotangent * (level - inside * w / step)) / np.sqrt(w.size)
    return cotangent * inside, grad_step


ternary.defvjp(_forward, _backward)

w = jnp.linspace(-2.5, 2.5, 501)
slopes = jax.vmap(jax.grad(ternary, argnums=(0, 1)), in_axes=(0, None))(w, 1.0)
names = ("value/Δ", "∂value/∂w", "∂value/∂Δ")
panels = [plots.Panel(name, {"": y}) for name, y in zip(names, (ternary(w, 1.0), *slopes))]
plots.functions(w, panels, "w/Δ", "ternary weights, forward and backward")

# %% [markdown]
# Thresholds are halves of the step, which floating point has exactly, so that a weight has the
# same code in every program that it is compiled into.
#
# ## A method
#
# What layers take is a *method*: the functions, the learned parameters and their first values.
# The grid says which levels codes stand for: `twos_complement(2)` has −2, −1, 0 and 1, of which
# three are used.


# %%
@dataclasses.dataclass(frozen=True)
class TernaryWeight(WeightMethod):
    bits: int = 2
    kind: ClassVar[str] = "ternary"
    parameter_types: ClassVar = {"step": Step}

    @property
    def grid(self):
        return Grid.twos_complement(self.bits)

    def initial(self, w, channel_axis):
        return {"step": 1.5 * jnp.abs(w).mean()}

    def quantize(self, x, parameters):
        return ternary(x, parameters["step"])

    def encode(self, x, parameters, dtype):
        return ternary_encode(x, parameters["step"], dtype)


# %% [markdown]
# ## A network
#
# The digits again, and a network of four dense layers. The first and the last one stay float.


# %%
class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.bn1 = nnx.BatchNorm(128, rngs=rngs)
        self.body1 = nnx.Linear(128, 128, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(128, rngs=rngs)
        self.body2 = nnx.Linear(128, 128, use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def input_of_body2(self, x):
        x = nnx.relu(self.bn1(self.first(x)))
        return nnx.relu(self.bn2(self.body1(x)))

    def __call__(self, x):
        return self.head(nnx.relu(self.bn3(self.body2(self.input_of_body2(x)))))


digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = (digits.data[order] / 8 - 1).astype(np.float32)
labels = digits.target[order].astype(np.int32)

model = Network(nnx.Rngs(0))
uniq_jax.quantize(model, [uniq_jax.Rule("body.", TernaryWeight(), N2uqActivation(bits=2))])
_ = uniq_jax.calibrate(model, [images[:256]])


# %% [markdown]
# `calibrate` starts N2UQ as a uniform quantizer. Its thresholds, in the input of `body2`, are
# the middles of its segments:


# %%
def thresholds(quantizer):
    p = quantizer.parameters
    edges = n2uq_activation_edges(p["start"], p["intervals"], p["input_scale"])
    return (edges[1:] + edges[:-1]) / 2


quantizer = model.body2.activation_quantizer
calibrated = quantizer.parameters
print("thresholds, calibrated:", *(f"{t:.2f}" for t in thresholds(quantizer)))

# %% [markdown]
# ## Training
#
# Learned steps and thresholds get a rate of their own: `is_quantizer_state` says which they are.

# %%
model.train()
learned = uniq_jax.nn.is_quantizer_state(model)
groups = jax.tree.map(lambda is_learned: "quantizer" if is_learned else "rest", learned)
rates = {"quantizer": optax.adam(1e-2), "rest": optax.adam(4e-3)}
optimizer = nnx.Optimizer(model, optax.multi_transform(rates, groups), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_of(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


shuffle = np.random.default_rng(0)
for _ in range(12):
    for chosen in np.split(shuffle.permutation(1408), 22):
        train_step(model, optimizer, images[chosen], labels[chosen])

model.eval()
predicted = model(images[1437:]).argmax(-1)
print(f"accuracy: {(predicted == labels[1437:]).mean():.1%} of 360 test images")

# %% [markdown]
# ## Inside
#
# The thresholds have left their even places. Here they are on the histogram of what `body2`
# gets:

# %%
after = thresholds(quantizer)
print("thresholds, trained:", *(f"{t:.2f}" for t in after))
hidden = model.input_of_body2(images[1437:])
high = float(hidden.max())
counts, _ = np.histogram(hidden, bins=80, range=(0, high))
layer = {
    "input": {
        "histogram": {"counts": counts, "low": 0, "high": high},
        "thresholds": after.tolist(),
        "levels": [0, high],
        "bits": 2,
        "method": "n2uq",
    }
}
plots.histograms(layer, "Inputs of body2 and learned thresholds")

# %% [markdown]
# The whole quantizer, before and after: levels stay evenly spaced.

# %%
x = jnp.linspace(0, 1.5 * float(after.max()), 501)
lines = {
    "trained": n2uq_activation(x, **quantizer.parameters),
    "calibrated": n2uq_activation(x, **calibrated),
}
plots.functions(
    x,
    [plots.Panel("value, and thresholds after training", lines, faint=x, marks=after.tolist())],
    "x",
    "N2UQ's quantizer of body2, calibrated and trained",
)

# %% [markdown]
# How the ternary weights of `body2` are shared out:

# %%
codes, step, _ = ternary_encode(model.body2.kernel[...], model.body2.weight_quantizer.step[...])
shares = np.bincount(np.asarray(codes).ravel(), minlength=4)[1:] / codes.size
print("weights at −Δ, 0, Δ:", *(f"{share:.0%}" for share in shares))

# %% [markdown]
# ## Integers
#
# `freeze` knows neither ternary weights nor where thresholds lie. It asks the method for the
# weights' codes, and finds thresholds by bisection; so your own quantizers are frozen as exactly
# as the package's.

# %%
frozen = uniq_jax.freeze(model, (64,))
print(deploy.verify(model, frozen, [images[1437:]]).summary())
print(deploy.summary(frozen))
