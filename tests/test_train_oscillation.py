"""Oscillating weights: counted, damped, frozen; and nothing of it by default."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import config as c
from uniq_jax.nn import LsqWeight, N2uqWeight, QuantLinear, UniqWeight
from uniq_jax.quantizers import decode
from uniq_jax.spec import ConfigError, OscillationSpec
from uniq_jax.train import oscillation, start
from uniq_jax.train.checkpoints import Checkpoints, Progressed
from uniq_jax.train.network import Network, split
from uniq_jax.train.run import Run

OFF = OscillationSpec(False, 0.01, 0.005, 0.0, 0.0, 0.0)
METHODS = {"uniq": UniqWeight(2, "channel"), "n2uq": N2uqWeight(2), "lsq": LsqWeight(3)}


def a_plan(total_steps=100, **values):
    found = oscillation.plan(dataclasses.replace(OFF, **values), total_steps)
    assert found is not None
    return found


def a_layer(method, shape=(40, 8)):
    layer = QuantLinear(*shape, use_bias=False, weight=method, rngs=nnx.Rngs(0))
    params, statistics = split(layer)
    network = Network.of(layer)
    return params, lambda params: network.build(params, statistics)


def frequencies_by_loops(codes, momentum):
    """The paper's definition, weight by weight: the last change, however long ago, counts."""
    frequency = np.zeros(codes.shape[1:])
    for index in np.ndindex(frequency.shape):
        last = 0
        for t in range(1, len(codes)):
            change = int(codes[t][index]) - int(codes[t - 1][index])
            oscillates = change != 0 and last != 0 and np.sign(change) != np.sign(last)
            last = change or last
            frequency[index] = momentum * oscillates + (1 - momentum) * frequency[index]
    return frequency


@pytest.mark.parametrize("kind", METHODS)
def test_frequencies_of_a_trajectory_are_the_papers(kind):
    params, build = a_layer(METHODS[kind], (10, 4))
    rng = np.random.default_rng(0)
    kernels = params["kernel"] + 0.3 * rng.standard_normal((30, 10, 4)).astype(np.float32)
    plan = a_plan(measure=True, momentum=0.2, threshold=0.4)
    state = oscillation.initial(build({**params, "kernel": kernels[0]}), plan)
    assert state.frozen is None
    assert state.averages is None

    @jax.jit
    def step(state, kernel, number):
        after = {**params, "kernel": kernel}
        found, state, metrics = oscillation.advance(plan, build, after, after, state, number)
        return found["kernel"], state, metrics

    encode = jax.jit(lambda kernel: oscillation.encode(build({**params, "kernel": kernel})))
    codes = [np.asarray(encode(kernel)["kernel"].codes) for kernel in kernels]
    for number, kernel in enumerate(kernels[1:]):
        same, state, metrics = step(state, kernel, number)
        np.testing.assert_array_equal(same, kernel)
    np.testing.assert_array_equal(state.codes["kernel"], codes[-1])
    expected = frequencies_by_loops(np.stack(codes), 0.2)
    np.testing.assert_allclose(state.frequencies["kernel"], expected, rtol=1e-5, atol=1e-7)
    assert 0 < (expected > 0.4).mean() < 1
    assert metrics.keys() == {"oscillating_weights"}
    np.testing.assert_allclose(metrics["oscillating_weights"], (expected > 0.4).mean(), rtol=1e-6)
    share = oscillation.shares(state, 0.4)
    np.testing.assert_allclose(share["kernel"], (expected > 0.4).mean(), rtol=1e-6)
    assert "most in kernel" in oscillation.summary(state, 0.4)


@pytest.mark.parametrize("kind", METHODS)
def test_damping_has_the_gradient_of_its_formula(kind):
    params, build = a_layer(METHODS[kind])
    params["kernel"] *= 3
    model = build(params)
    w = np.asarray(params["kernel"], np.float64)
    encoded = oscillation.encode(model)["kernel"]
    levels = np.asarray(decode(encoded), np.float64)
    scale = np.asarray(encoded.scale, np.float64)
    n = model.weight_quantizer.method.grid.max_code
    inside = (w >= -scale * encoded.offset) & (w <= scale * (n - encoded.offset))
    assert 0 < inside.mean() < 1
    plan = a_plan(damping=0.3, total_steps=40)
    zeros = {path: jnp.zeros_like(array) for path, array in params.items()}
    grads, metrics = jax.jit(lambda grads, step: oscillation.damped(plan, model, grads, step))(
        zeros, 10
    )
    strength = 0.3 * (1 - np.cos(np.pi / 4)) / 2
    expected = np.where(inside, 2 * strength * (w - levels), 0)
    np.testing.assert_allclose(grads["kernel"], expected, rtol=1e-4, atol=1e-7)
    loss = strength * np.square(np.where(inside, w - levels, 0)).sum()
    np.testing.assert_allclose(metrics["damping_loss"], loss, rtol=1e-4)
    for path in grads.keys() - {"kernel"}:  # Learned steps are not damped.
        np.testing.assert_array_equal(grads[path], 0)


@pytest.mark.parametrize("kind", METHODS)
def test_frozen_weights_keep_their_codes(kind):
    """Random walks of weights and steps: what is frozen keeps its code whatever moves beside it."""
    params, build = a_layer(METHODS[kind])
    plan = a_plan(freeze_threshold=0.02, freeze_threshold_start=0.2, momentum=0.1, total_steps=60)
    state = oscillation.initial(build(params), plan)

    @jax.jit
    def step(params, state, key, number):
        noise = {
            path: array * (1 + 0.02 * jax.random.normal(key, array.shape))
            for path, array in params.items()
        }
        noise["kernel"] += 0.1 * jax.random.normal(key, params["kernel"].shape)
        params, state, metrics = oscillation.advance(plan, build, params, noise, state, number)
        return params, state, metrics, oscillation.encode(build(params))["kernel"].codes

    frozen, codes, shares = np.zeros((40, 8), bool), None, []
    for number in range(60):
        kernel = np.asarray(params["kernel"])
        key = jax.random.key(number)
        params, state, metrics, now = step(params, state, key, number)
        now = np.asarray(now)
        np.testing.assert_array_equal(now[frozen], codes[frozen] if codes is not None else 0)
        moved = np.asarray(params["kernel"]) != kernel
        assert moved[~frozen].mean() > 0.9
        assert moved[frozen].sum() <= 0.3 * frozen.sum()  # Few stray, and are put back.
        assert (np.asarray(state.frozen["kernel"]) >= frozen).all()
        frozen, codes = np.asarray(state.frozen["kernel"]), now
        np.testing.assert_array_equal(np.asarray(state.codes["kernel"])[frozen], codes[frozen])
        shares.append(float(metrics["frozen_weights"]))
    assert shares[0] == 0
    assert shares[-1] > 0.2
    np.testing.assert_allclose(shares[-1], frozen.mean(), rtol=1e-6)


def toy(steps=400, **values):
    """The paper's regression of one weight, whose best value lies between two levels.

    Returns:
      How often the weight oscillates at the end, how often its code changed in the last quarter,
      and the share of frozen weights.
    """
    params, build = a_layer(LsqWeight(3), (1, 1))
    params = {"kernel": jnp.full((1, 1), 0.3), "weight_quantizer/step": jnp.asarray(1.0)}
    target = 0.4
    plan = a_plan(steps, **{"measure": True, **values})

    def loss(params):
        value = build(params).weight_quantizer(params["kernel"])
        return 0.5 * jnp.sum(jnp.square(value - target))

    def step(carry, number):
        params, state = carry
        grads = jax.grad(loss)(params)
        if plan.spec.damping:
            grads, _ = oscillation.damped(plan, build(params), grads, number)
        after = {**params, "kernel": params["kernel"] - 0.05 * grads["kernel"]}
        old = state.codes["kernel"]
        after, state, metrics = oscillation.advance(plan, build, params, after, state, number)
        frozen = metrics.get("frozen_weights", jnp.zeros(()))
        return (after, state), (jnp.sum(state.codes["kernel"] != old), frozen)

    carry = params, oscillation.initial(build(params), plan)
    (_, state), (changes, frozen) = jax.jit(
        lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))
    )(carry)
    changes = np.asarray(changes)[-steps // 4 :].sum()
    return float(state.frequencies["kernel"][0, 0]), int(changes), float(frozen[-1])


def test_damping_and_freezing_end_the_oscillation_of_the_papers_regression():
    frequency, changes, _ = toy(momentum=0.05)
    assert frequency > 0.1
    assert changes > 20
    damped_frequency, damped_changes, _ = toy(momentum=0.05, damping=1.0)
    assert damped_frequency < 0.02
    assert damped_changes == 0
    frozen_frequency, frozen_changes, frozen = toy(momentum=0.05, freeze_threshold=0.08)
    assert frozen == 1
    assert frozen_frequency < 0.02
    assert frozen_changes == 0


def make_run(method="uniq", **values):
    config = c.base()
    config.data.batch_size = 32
    config.data.train_split = "train[:64]"
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.phases = ("quantized",)
    config.quantized = c.phase(method, weight_bits=2, activation_bits=2, **values)
    run = Run(c.run_spec(config))
    phase = run.spec.phases[0]
    return run, phase, run.program(phase)


def test_by_default_nothing_of_it_is_in_the_step():
    run, phase, program = make_run()
    assert program.oscillation is None
    state = start.abstract_state(run.builder(phase), program, run.mesh)
    assert state.oscillation is None
    from uniq_jax.train.step import train_step

    batch = {
        "image": jax.ShapeDtypeStruct((32, 8, 8, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((32,), jnp.int32),
    }
    after, metrics = jax.eval_shape(lambda s, b: train_step(program, s, b), state, batch)
    assert metrics.keys() == {"loss", "accuracy", "gradient_norm", "learning_rate"}
    assert jax.tree.structure(after) == jax.tree.structure(state)
    # A measured step has the same and more.
    run, phase, program = make_run(oscillation={"measure": True})
    state = start.abstract_state(run.builder(phase), program, run.mesh)
    assert state.oscillation is not None
    # Of the low-bit layers; the first and last one have 8 bits.
    assert "layer1/0/conv1/kernel" in state.oscillation.codes
    assert not {"conv1/kernel", "linear/kernel"} & state.oscillation.codes.keys()
    _, metrics = jax.eval_shape(lambda s, b: train_step(program, s, b), state, batch)
    assert "oscillating_weights" in metrics


@pytest.mark.slow
def test_a_step_with_all_of_it_counts_and_is_restored(tmp_path):
    everything = {
        "measure": True,
        "damping": 0.01,
        "freeze_threshold": 0.001,
        "freeze_threshold_start": 0.002,
        "momentum": 0.5,
    }
    run, phase, program = make_run(
        oscillation=everything, ema_decay=0.5, optimizer={"learning_rate": 1.0}
    )
    state = start.fresh_state(run.builder(phase), program, run.mesh)
    state = start.restart_oscillation(program, start.restart_averages(state))
    # It takes the states that it gives, or it is an error.
    step_fn, _ = run.compiled_step(phase, program, state, None)
    metrics = {}
    with run.train_batches() as batches:
        for _ in range(6):
            state, metrics = step_fn(state, run.place(next(batches)), None)
    assert metrics.keys() >= {"damping_loss", "oscillating_weights", "frozen_weights"}
    assert 0 < metrics["frozen_weights"] < 1
    encode = jax.jit(lambda p, s: oscillation.encode(program.build(p, s)))
    found = encode(state.params, state.statistics)
    for path, frozen in state.oscillation.frozen.items():
        codes = np.asarray(found[path].codes)
        np.testing.assert_array_equal(codes[frozen], state.oscillation.codes[path][frozen])
        place = state.params[path].sharding
        assert state.oscillation.codes[path].sharding.is_equivalent_to(place, codes.ndim)
    saved = Checkpoints(tmp_path)
    saved.save(6, state, Progressed({}, 0.5, 1.0))
    abstract = start.abstract_state(run.builder(phase), program, run.mesh)
    _, restored, _ = saved.restore(abstract)
    saved.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"momentum": 0.0}, r"quantized\.oscillation\.momentum \(=0\.0\) must be in \(0, 1\]"),
        ({"threshold": 1.0}, r"oscillation\.threshold \(=1\.0\) must be in \[0, 1\)"),
        ({"damping": -1.0}, r"oscillation\.damping \(=-1\.0\) must be at least 0"),
        (
            {"freeze_threshold": 0.2, "freeze_threshold_start": 0.1},
            r"freeze_threshold_start \(=0\.1\) must be 0, or at least freeze_threshold \(=0\.2\)",
        ),
        ({"freeze_threshold_start": 0.1}, r"freeze_threshold_start \(=0\.1\) must be 0, or"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        make_run(oscillation=values)


def test_a_float_phase_has_no_levels_to_oscillate_between():
    config = c.base()
    config.phases = ("float",)
    config.float = c.phase("float", oscillation={"measure": True})
    with pytest.raises(ConfigError, match=r"float\.oscillation\.measure \(=True\) must be off"):
        c.run_spec(config)
