"""Moving averages of weights, and batch-norm statistics that are estimated anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from uniq_jax import config as c
from uniq_jax.train import averages, start
from uniq_jax.train.checkpoints import Checkpoints, Progressed, read_model
from uniq_jax.train.run import Run
from uniq_jax.train.step import moving_average


def make_run(**values):
    config = c.base()
    config.data.batch_size = 32
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.phases = ("float",)
    config.float = c.phase("float", **values)
    run = Run(c.run_spec(config))
    program = run.program(run.spec.phases[0])
    state = start.fresh_state(run.builder(run.spec.phases[0]), program, run.mesh)
    return run, program, state


def test_pooled_statistics_are_those_of_all_examples():
    examples = np.random.default_rng(0).standard_normal((5, 16, 3)) + np.arange(5)[:, None, None]
    batches = [{"bn/mean": batch.mean(0), "bn/var": batch.var(0)} for batch in examples]
    found = averages.pooled(batches)
    whole = examples.reshape(-1, 3)
    np.testing.assert_allclose(found["bn/mean"], whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["bn/var"], whole.var(0), rtol=1e-12)


def test_estimated_statistics_are_the_first_layers_own():
    run, program, state = make_run()
    before = {path: np.asarray(array) for path, array in state.statistics.items()}
    found = run.estimate_statistics(program, state.params, state.statistics, 3)
    assert found.keys() == state.statistics.keys()
    for path, array in found.items():
        assert (array.shape, array.dtype) == (before[path].shape, before[path].dtype)
        assert array.sharding == state.statistics[path].sharding
        assert not np.array_equal(array, before[path]), path
    with run.train_batches() as batches:
        images = np.concatenate([next(batches)["image"] for _ in range(3)])
    model = program.build(state.params, state.statistics)
    outputs = np.asarray(model.conv1(program.normalize(images)), np.float64)
    np.testing.assert_allclose(found["bn1/mean"], outputs.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["bn1/var"], outputs.var((0, 1, 2)), rtol=1e-4)
    # What was kept before does not count, and nothing is left to chance.
    again = run.estimate_statistics(program, state.params, found, 3)
    for path in found:
        np.testing.assert_array_equal(again[path], found[path])


def test_a_moving_average_is_its_formula():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((30, 4)).astype(np.float32)
    average, expected = {"a": jnp.zeros(4)}, np.zeros(4)
    update = jax.jit(lambda average, value, step: moving_average(average, value, step, 0.7))
    for step, value in enumerate(values):
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        average = update(average, {"a": jnp.asarray(value)}, jnp.asarray(step, jnp.int32))
        np.testing.assert_allclose(average["a"], expected, rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_evaluated_and_read(tmp_path):
    run, program, state = make_run(ema_decay=0.7, optimizer={"learning_rate": 0.05})
    # As parameters are that came from elsewhere.
    moved = {path: array + 1 for path, array in state.params.items()}
    state = start.restart_averages(dataclasses.replace(state, params=moved))
    expected = {p: np.asarray(a, np.float64) for p, a in state.averages.items()}
    for path, array in {**state.params, **state.statistics}.items():
        np.testing.assert_array_equal(state.averages[path], array)
    # It takes the states that it gives, or it is an error.
    step_fn, _ = run.compiled_step(run.spec.phases[0], program, state, None)
    with run.train_batches() as batches:
        for step in range(3):
            state, _ = step_fn(state, run.place(next(batches)), None)
            decay = min(0.7, (1 + step) / (10 + step))
            for path, array in {**state.params, **state.statistics}.items():
                expected[path] = decay * expected[path] + (1 - decay) * np.asarray(array)
    params, statistics = state.evaluated
    assert params.keys() == state.params.keys()
    assert statistics.keys() == state.statistics.keys()
    for path, array in {**params, **statistics}.items():
        np.testing.assert_allclose(array, expected[path], rtol=1e-4, atol=1e-6)
    assert not np.array_equal(params["conv1/kernel"], state.params["conv1/kernel"])
    # A checkpoint gives both back; who takes a network from it takes the averages.
    saved = Checkpoints(tmp_path)
    saved.save(3, state, Progressed({}, 0.5, 1.0))
    abstract = start.abstract_state(run.builder(run.spec.phases[0]), program, run.mesh)
    _, restored, _ = saved.restore(abstract)
    saved.close()
    found = read_model(tmp_path)
    for path, array in {**params, **statistics}.items():
        np.testing.assert_array_equal(found[path], array)
    np.testing.assert_array_equal(restored.params["conv1/kernel"], state.params["conv1/kernel"])
    # Other statistics to evaluate leave those of training alone.
    other = state.with_evaluated_statistics({"bn1/mean": params["bn1/bias"]})
    np.testing.assert_array_equal(other.evaluated[1]["bn1/mean"], params["bn1/bias"])
    np.testing.assert_array_equal(other.statistics["bn1/mean"], state.statistics["bn1/mean"])
