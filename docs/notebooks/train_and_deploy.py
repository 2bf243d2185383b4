# %% [markdown]
# # Train and deploy a 2-bit network in a minute
#
# A small network learns scikit-learn's digits in float, is quantized to 2 bits, trained on,
# frozen to integers, saved, and loaded again. All of it takes less than a minute of one CPU
# core. This page is `docs/notebooks/train_and_deploy.py`, run when the documentation was built.
#
# ## Data and a float network

# %%
import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import uniq_jax
from uniq_jax import deploy, rules

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = (digits.images[order, :, :, None] / 8 - 1).astype(np.float32)
labels = digits.target[order].astype(np.int32)
train_images, train_labels = images[:1437], labels[:1437]
test_images, test_labels = images[1437:], labels[1437:]


class Network(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, rngs=rngs)
        self.body1 = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, rngs=rngs)
        self.body2 = nnx.Conv(32, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(32, rngs=rngs)
        self.head = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.stem(x)))
        x = nnx.relu(self.bn2(self.body1(x)))
        x = nnx.relu(self.bn3(self.body2(x)))
        return self.head(x.reshape(x.shape[0], -1))


# %% [markdown]
# The loop is nothing special: an `nnx.Optimizer` around optax's Adam. It will train the float
# network and the quantized one.


# %%
@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_of(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


def train(model, epochs, learning_rate, seed):
    model.train()
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)
    shuffle = np.random.default_rng(seed)
    for _ in range(epochs):
        for chosen in np.split(shuffle.permutation(1408), 22):
            train_step(model, optimizer, train_images[chosen], train_labels[chosen])


@nnx.jit
def predict(model, images):
    return model(images).argmax(-1)


def accuracy(predicted):
    return np.mean(np.asarray(predicted) == test_labels)


model = Network(nnx.Rngs(0))
train(model, epochs=5, learning_rate=5e-3, seed=0)
model.eval()
print(f"float: {accuracy(predict(model, test_images)):.1%} of {len(test_labels)} test images")

# %% [markdown]
# ## Two bits
#
# `quantize` replaces the layers in place, and `calibrate` sets the steps of their quantizers
# from the weights and from a batch. `rules.uniq(2)` keeps 8 bits in the first and the last
# layer.

# %%
uniq_jax.quantize(model, rules.uniq(bits=2))
uniq_jax.calibrate(model, [train_images[:256]])
print(uniq_jax.summary(model, jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")))

# %%
print(f"2 bits, calibrated: {accuracy(predict(model, test_images)):.1%}")
train(model, epochs=6, learning_rate=2e-3, seed=1)
model.eval()
print(f"2 bits, trained: {accuracy(predict(model, test_images)):.1%}")

# %% [markdown]
# ## Integers
#
# `freeze` makes a network of int8 products and integer thresholds. `verify` compares its codes
# with those of the model, layer by layer: none differs, as [What is exact, and
# why](../exactness.md) says.

# %%
frozen = uniq_jax.freeze(model, (8, 8, 1))
print(deploy.verify(model, frozen, [test_images]).summary())
print(deploy.summary(frozen))

# %% [markdown]
# The file holds 2-bit kernels as dense bits. Loading it needs JAX, NumPy and safetensors, and
# neither Flax nor optax.

# %%
size = deploy.save(frozen, "digits.safetensors")
loaded = deploy.load("digits.safetensors")
logits = jax.jit(loaded)(test_images)
print(f"{size} bytes; integers: {accuracy(logits.argmax(-1)):.1%}")
