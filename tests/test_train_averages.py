"""Batch-norm statistics that are estimated anew."""

import numpy as np

from uniq_jax import config as c
from uniq_jax.train import averages, start
from uniq_jax.train.run import Run


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
