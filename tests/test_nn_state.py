"""Learned quantizer state: its types and paths, and that what is merged is what is used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uniq_jax import nn
from uniq_jax.nn import (
    LsqActivation,
    LsqWeight,
    N2uqActivation,
    N2uqWeight,
    PactActivation,
    QuantConv,
    QuantLinear,
    UniqActivation,
    UniqWeight,
)

UNIQ = {"weight": UniqWeight(2), "activation": UniqActivation(2)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)


def linear(**methods):
    return QuantLinear(6, 6, **(methods or UNIQ), rngs=nnx.Rngs(0))


def variables(model):
    return {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize(
    ("methods", "types"),
    [
        (
            UNIQ,
            {"weight_quantizer/step": (nn.Step, ()), "activation_quantizer/step": (nn.Step, ())},
        ),
        (
            {"weight": UniqWeight(3, "channel"), "activation": None},
            {"weight_quantizer/step": (nn.Step, (1, 6))},
        ),
        (
            {"weight": LsqWeight(3, "channel"), "activation": LsqActivation(3)},
            {
                "weight_quantizer/step": (nn.Step, (1, 6)),
                "activation_quantizer/step": (nn.Step, ()),
            },
        ),
        (
            {"weight": N2uqWeight(2), "activation": N2uqActivation(2)},
            {
                "activation_quantizer/start": (nn.Threshold, ()),
                "activation_quantizer/intervals": (nn.Threshold, (3,)),
                "activation_quantizer/input_scale": (nn.Scale, ()),
                "activation_quantizer/output_scale": (nn.Scale, ()),
            },
        ),
        (
            {"weight": None, "activation": PactActivation(2)},
            {"activation_quantizer/clip": (nn.Clip, ())},
        ),
        ({"weight": None, "activation": None}, {}),
    ],
)
def test_types_paths_and_shapes(methods, types):
    found = variables(linear(**methods))
    assert type(found.pop("kernel")) is nnx.Param
    assert type(found.pop("bias")) is nnx.Param
    assert {path: (type(v), v[...].shape) for path, v in found.items()} == types
    assert all(isinstance(v, nn.QuantizerParam) for v in found.values())
    assert all(isinstance(v, nnx.Param) for v in found.values())
    assert all(v[...].dtype == jnp.float32 for v in found.values())


def test_a_step_for_each_output_channel_of_a_convolution():
    layer = QuantConv(3, 5, (3, 3), weight=UniqWeight(2, "channel"), rngs=nnx.Rngs(0))
    assert layer.weight_quantizer.step.shape == (1, 1, 1, 5)


def test_weight_steps_start_from_the_kernel():
    layer = linear()
    wanted = UniqWeight(2).initial(layer.kernel[...], -1)["step"]
    assert layer.weight_quantizer.step[...] == wanted


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("copy", ["merge", "clone", "jit", "nnx.jit"])
def test_the_state_that_is_merged_is_the_state_that_is_used(copy, mode):
    """A function that captured the step would go on with the old one."""
    layer = linear()
    getattr(layer, mode)()
    before = np.asarray(layer(X))
    graphdef, state = nnx.split(layer)
    for quantizer in ("weight_quantizer", "activation_quantizer"):
        state[quantizer]["step"] = state[quantizer]["step"].replace(
            state[quantizer]["step"][...] * 1.7
        )
    if copy == "merge":
        after = nnx.merge(graphdef, state)(X)
    elif copy == "clone":
        clone = nnx.clone(layer)
        nnx.update(clone, state)
        after = clone(X)
    elif copy == "jit":
        after = jax.jit(lambda state: nnx.merge(graphdef, state)(X))(state)
    else:
        run = nnx.jit(lambda layer: layer(X))
        np.testing.assert_allclose(run(layer), before, atol=1e-6)
        other = nnx.merge(graphdef, state)
        after = run(other)
    wanted = linear()
    getattr(wanted, mode)()
    for quantizer in (wanted.weight_quantizer, wanted.activation_quantizer):
        quantizer.step[...] = quantizer.step[...] * 1.7
    np.testing.assert_allclose(after, wanted(X), atol=1e-6)
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_array_equal(layer(X), before)


def test_gradients_of_merged_state_are_not_zero():
    graphdef, state = nnx.split(linear())

    @jax.jit
    @jax.grad
    def gradient(state):
        return jnp.sum(nnx.merge(graphdef, state)(X) ** 2)

    gradients = variables(gradient(state))
    assert gradients.keys() == variables(state).keys()
    for path, value in gradients.items():
        assert np.any(value[...] != 0), path
    of_module = nnx.jit(nnx.grad(lambda m: jnp.sum(m(X) ** 2)))(linear())
    assert variables(of_module).keys() == gradients.keys()


@pytest.mark.parametrize(
    "methods",
    [
        UNIQ,
        {"weight": N2uqWeight(2, "clipped"), "activation": N2uqActivation(2)},
        {"weight": LsqWeight(2), "activation": LsqActivation(2)},
        {"weight": UniqWeight(1, "channel"), "activation": PactActivation(2)},
    ],
)
def test_a_plain_optimizer_trains_every_parameter(methods):
    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(1)), nnx.relu, linear(**methods))
    target = jnp.sin(3 * X)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = {path: np.asarray(v[...]) for path, v in variables(model).items()}

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(X) - target) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]
    for path, variable in variables(model).items():
        assert np.any(variable[...] != before[path]), path


def test_optimizer_groups_select_by_type():
    state = nnx.state(linear(), nn.QuantizerParam)
    assert variables(state).keys() == {"weight_quantizer/step", "activation_quantizer/step"}
    state = nnx.state(linear(), nnx.All(nnx.Param, nnx.Not(nn.QuantizerParam)))
    assert variables(state).keys() == {"kernel", "bias"}


def test_train_and_eval_switch_the_mode():
    model = nnx.Sequential(linear(), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    assert not model.layers[0].deterministic
    model.eval()
    assert model.layers[0].deterministic
    model.train()
    assert not model.layers[0].deterministic


def test_layers_vectorize_over_their_state():
    """As in ensembles, and in scanned stacks of layers."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return QuantLinear(6, 6, kernel_init=jax.random.normal, **UNIQ, rngs=rngs)

    stack = make(nnx.Rngs(0))
    assert stack.weight_quantizer.step.shape == (3,)
    together = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(stack, X)
    graphdef, state = nnx.split(stack)
    for i in range(3):
        one = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
        np.testing.assert_allclose(together[i], one(X), atol=1e-6)


def test_methods_are_values():
    """Equal and hashable, so that equal models share a compilation."""
    assert UniqWeight(2) == UniqWeight(2, "layer") != UniqWeight(3)
    assert len({UniqWeight(2), UniqWeight(2), LsqWeight(2)}) == 2
    assert dataclasses.replace(UniqActivation(2), bits=3) == UniqActivation(3)
    assert nnx.split(linear())[0] == nnx.split(linear())[0]
    assert hash(nnx.split(linear())[0]) == hash(nnx.split(linear())[0])


def test_optimizers_tell_quantizers_from_weights():
    """Groups and masks in `nnx.Optimizer`, within jit."""
    model = nnx.Sequential(linear(), nnx.relu, nnx.BatchNorm(6, rngs=nnx.Rngs(0)))
    learned = nn.is_quantizer_state(model)
    paths = {path for path, is_learned in nnx.to_flat_state(learned) if is_learned}
    assert paths == {path for path, _ in nnx.to_flat_state(nnx.state(model, nn.QuantizerParam))}
    groups = jax.tree.map(lambda is_learned: "steps" if is_learned else "weights", learned)
    rates = {"steps": optax.sgd(0.25), "weights": optax.sgd(0.5)}
    decayed = jax.tree.map(lambda is_learned: not is_learned, learned)
    optimizer = nnx.Optimizer(
        model,
        optax.chain(
            optax.add_decayed_weights(1.0, mask=decayed), optax.multi_transform(rates, groups)
        ),
        wrt=nnx.Param,
    )

    @nnx.jit
    def update(model, optimizer):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))

    before = nnx.to_flat_state(nnx.state(nnx.clone(model), nnx.Param))
    update(model, optimizer)
    after = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert any(path in paths for path, _ in before)
    for path, old in before:
        wanted = old[...] - (0.25 if path in paths else 0.5 * (1 + old[...]))
        np.testing.assert_allclose(after[path][...], wanted, rtol=1e-6, err_msg=str(path))
