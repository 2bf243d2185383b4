"""A batch cut into microbatches: gradients, statistics, and what the config may say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import uniq_jax
from uniq_jax import config as c
from uniq_jax import rules
from uniq_jax.train import mixup, sharding
from uniq_jax.train.accumulation import cut
from uniq_jax.train.network import Network, Teacher, split
from uniq_jax.train.run import Run
from uniq_jax.train.state import Program, TrainState
from uniq_jax.train.step import train_step

COUNT = 4
BATCH = 16
# Most of the time is compilation.
QUICKLY = {"xla_backend_optimization_level": 0}


class Net(nnx.Module):
    """No batch norm: every example goes through it alone."""

    def __init__(self, rngs):
        initial = nnx.initializers.he_uniform()  # A normal takes seconds to compile.
        options = {"param_dtype": jnp.float64, "kernel_init": initial, "rngs": rngs}
        self.conv1 = nnx.Conv(3, 8, (3, 3), **options)
        self.conv2 = nnx.Conv(8, 8, (3, 3), **options)
        self.fc = nnx.Linear(8, 10, **options)

    def __call__(self, x):
        for layer in (self.conv1, self.conv2):
            x = nnx.relu(layer(x))
        return self.fc(x.mean((1, 2)))


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.bn = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.fc = nnx.Linear(3, 10, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.bn(x).mean((1, 2)))


def program_of(model, **values):
    loss = c.run_spec(_config(c.phase(**values.pop("phase", {})))).phases[0].loss
    rate = optax.constant_schedule(0.1)
    defaults = {
        "mean": (127.0,) * 3,
        "std": (64.0,) * 3,
        "dtype": jnp.dtype(jnp.float64),
        "optimizer": optax.trace(0.9),  # Its state after a step is the gradient.
        "rate": rate,
        "loss": loss,
        "ema_decay": 0.0,
        "seed": 0,
    }
    return Program(network=Network.of(model), **{**defaults, **values})


def state_of(model, program):
    params, statistics = split(model)
    opt_state = program.optimizer.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, statistics, opt_state)


def batch_of(rng):
    images = rng.integers(0, 256, (BATCH, 6, 6, 3), np.uint8)
    labels = rng.integers(0, 10, BATCH).astype(np.int32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(labels)}


def _config(phase):
    config = c.base()
    config.data.batch_size = BATCH
    config.phases = ("float",)
    config.float = phase
    return config


def test_microbatches_add_up_to_the_batch(monkeypatch):
    """With mixup and a teacher, whose partners and outputs must go with their examples."""
    monkeypatch.setattr(mixup, "share", lambda key, alpha: jnp.float64(0.7))
    with jax.enable_x64(True):
        model = Net(nnx.Rngs(0))
        uniq_jax.quantize(model, rules.uniq_n2uq(weight_bits=2, activation_bits=2))
        batch = batch_of(np.random.default_rng(0))
        phase = {"loss": {"mixup_alpha": 0.5, "teacher": "t", "teacher_model": "m"}}
        phase["loss"] |= {"teacher_weight": 0.6, "teacher_temperature": 2.0}
        program = program_of(model, phase=phase)
        uniq_jax.calibrate(model, [program.normalize(batch["image"])])
        teacher = Net(nnx.Rngs(1))
        teacher = Teacher(split(teacher)[0], Network.of(teacher))
        found = []
        for count in (1, COUNT):
            cut_program = dataclasses.replace(program, accumulation_steps=count)
            step = jax.jit(functools.partial(train_step, cut_program), compiler_options=QUICKLY)
            found.append(step(state_of(model, program), batch, teacher))
        (whole, whole_metrics), (parts, metrics) = found
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-12)
        gradients, accumulated = whole.opt_state.trace, parts.opt_state.trace
        assert {g.dtype for g in accumulated.values()} == {np.dtype(np.float64)}
        scaled = 0
        for path, gradient in gradients.items():
            assert np.any(gradient), path
            # The gradient scale of a learned activation step counts the examples that share it.
            counts = path.endswith("activation_quantizer/step")
            scaled += counts
            expected = gradient * math.sqrt(COUNT) if counts else gradient
            limit = 1e-12 * float(jnp.linalg.norm(gradient))
            np.testing.assert_allclose(accumulated[path], expected, rtol=1e-9, atol=limit)
        assert scaled == 2  # Of the ends; thresholds have no such scale.


def test_every_microbatch_moves_the_statistics():
    model = Normalized(nnx.Rngs(0))
    program = program_of(model, dtype=jnp.dtype(jnp.float32), accumulation_steps=COUNT)
    batch = batch_of(np.random.default_rng(0))
    step = jax.jit(functools.partial(train_step, program), compiler_options=QUICKLY)
    state, _ = step(state_of(model, program), batch)
    images = (np.asarray(batch["image"], np.float64) - 127) / 64
    mean, variance = np.zeros(3), np.ones(3)
    for i in range(COUNT):
        micro = images[i::COUNT]
        mean = 0.9 * mean + 0.1 * micro.mean((0, 1, 2))
        variance = 0.9 * variance + 0.1 * micro.var((0, 1, 2))
    np.testing.assert_allclose(state.statistics["bn/mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.statistics["bn/var"], variance, rtol=1e-5)


def test_a_batch_is_cut_into_all_of_its_examples():
    parts = cut({"a": jnp.arange(12), "b": jnp.arange(24).reshape(12, 2)}, 3)
    assert parts["a"].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    np.testing.assert_array_equal(parts["b"][..., 0], 2 * parts["a"])


@pytest.mark.parametrize("count", [0, -1, 3, 32])
def test_a_count_that_does_not_divide_the_batch_is_named(count):
    config = _config(c.phase(accumulation_steps=count))
    message = rf"config.float.accumulation_steps \(={count}\) must be a positive divisor of config"
    with pytest.raises(c.ConfigError, match=message):
        c.run_spec(config)


def test_microbatches_must_spread_over_the_devices():
    class Mesh:
        shape = {"data": 4, "model": 2}

    sharding.check_microbatches(Mesh, "config.float.accumulation_steps", 16, 4)
    message = r"accumulation_steps \(=8\) times the devices along the mesh's data axis, which are 4"
    with pytest.raises(ValueError, match=message):
        sharding.check_microbatches(Mesh, "config.float.accumulation_steps", 16, 8)


def test_a_run_takes_the_count_of_each_phase():
    run = Run(c.run_spec(_config(c.phase(accumulation_steps=2))))
    assert run.program(run.spec.phases[0]).accumulation_steps == 2
