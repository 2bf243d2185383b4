"""What is said when numbers stop being finite."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import StopAt, get_config, train

from uniq_jax import config as c
from uniq_jax.train import diagnosis, start, watching
from uniq_jax.train.diagnosis import DivergedError
from uniq_jax.train.run import Run
from uniq_jax.train.watching import Finding


@pytest.fixture(scope="module")
def fresh(kept_compilations):
    """A run, and for each phase what `examine` takes."""
    config = get_config()
    run = Run(c.run_spec(config))
    with run.train_batches() as batches:
        batch = run.place(next(batches))
    return run, batch


def examine(fresh, number, **changes):
    """Examines the first step of a phase from parameters that are changed."""
    run, batch = fresh
    phase = run.spec.phases[number]
    program = run.program(phase)
    state = start.fresh_state(run.builder(phase), program, run.mesh)
    params = dict(state.params)
    for name, value in changes.items():
        path = name.replace("__", "/")
        params[path] = jax.device_put(jnp.full_like(params[path], value), params[path].sharding)
    state = dataclasses.replace(state, params=params)
    model = nnx.eval_shape(run.builder(phase))
    return watching.examine(run, program, model, state, batch, None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_quantizer_whose_step_is_not_finite_is_named(fresh, value):
    found = examine(fresh, 1, conv2__weight_quantizer__step=value)
    assert found == Finding("conv2", f"its weight_quantizer/step holds {value}")


def test_the_layer_whose_output_overflows_is_named(fresh):
    assert examine(fresh, 0, conv2__kernel=3e38) == Finding("conv2", "its output holds inf")


def test_what_the_update_breaks_is_named(fresh):
    run, _ = fresh
    (phase, _) = run.spec.phases
    spec = dataclasses.replace(phase.optimizer, learning_rate=3e38, momentum=0.0, weight_decay=1e3)
    wild = dataclasses.replace(phase, optimizer=spec)
    spec = dataclasses.replace(run.spec, phases=(wild, *run.spec.phases[1:]))
    found = examine((Run(spec), fresh[1]), 0)
    assert found.layer == "conv1"
    assert found.what == "its gradients are finite, but the step's update makes its kernel inf"


def test_nothing_is_found_where_all_is_finite(fresh):
    assert examine(fresh, 1) is None


def test_the_order_of_layers_decides():
    before, after = watching._INPUT, watching._OUTPUT
    events = [("", before), ("a", before), ("a/b", before), ("a/b", after), ("a", after)]
    clean = {"watched_input": 0, "a/watched_input": 0, "a/b/watched_input": 0}
    clean |= {name.replace("input", "output"): 0 for name in clean}
    forward = watching._in_forward
    assert forward(events, {"a/b/q/step": 0, "a/x": 0}, clean) is None
    found = forward(events, {"a/b/q/step": 2, "a/x": 1}, clean | {"a/b/watched_output": 1})
    assert found == Finding("a", "its x holds inf")
    found = forward(events, {"a/b/q/step": 2, "a/x": 0}, clean | {"a/b/watched_output": 1})
    assert found == Finding("a/b", "its q/step holds nan")
    found = forward(events, {}, clean | {"a/watched_output": 1, "a/b/watched_input": 1})
    assert found == Finding("a/b", "its input holds inf")
    found = watching._in_backward(["a", "b"], {"a/kernel": 2, "b/kernel": 1, "b/bias": 0})
    assert found == Finding("b", "its output is finite, but the gradient of its kernel holds inf")


def test_estimated_statistics_that_are_not_finite_are_told_from_training(fresh):
    run, _ = fresh
    phase = run.spec.phases[0]
    state = start.fresh_state(run.builder(phase), run.program(phase), run.mesh)
    diagnosis.check_estimated("float", 12, 3, state)
    broken = jax.tree.map(lambda x: x * np.nan, state.statistics)
    with pytest.raises(DivergedError, match=r"estimated on 3 batches after step 12, are not") as e:
        diagnosis.check_estimated("float", 12, 3, state.with_evaluated_statistics(broken))
    assert (e.value.phase, e.value.step, e.value.layer) == ("float", 12, None)
    assert "config.float.batch_norm_batches=0" in str(e.value)


def test_a_run_that_diverges_says_when_where_and_what_is_left(kept_compilations, tmp_path):
    config = get_config()
    config.float.total_epochs = 4.0
    config.float.optimizer.learning_rate = 1e30
    config.log_every_steps = 5
    config.eval_every_epochs = 4.0
    with pytest.raises(DivergedError) as caught:
        train(config, tmp_path)
    error = caught.value
    assert (error.phase, error.step, error.first_step) == ("float", 5, 2)
    assert error.layer in ("conv1", "bn1")
    assert error.checkpoint_step is None
    assert "the loss of phase 'float' is nan at step 5 (first at step 2)" in str(error)
    assert f"the first layer that went bad is {error.layer}: its " in str(error)
    assert "there is no checkpoint of this phase yet" in str(error)
    assert "config.float.optimizer.learning_rate may help" in str(error)

    # Stopped while all is finite; and a state that is not finite is never saved.
    workdir = tmp_path / "stopped"
    assert "stopped after step 1 of 12" in train(config, workdir, StopAt(2))
    third = iter([False, False, True])  # Later calls are of the search for the step.
    with pytest.raises(DivergedError) as caught:
        train(config, workdir, lambda: next(third, False))
    error = caught.value
    assert (error.step, error.first_step, error.checkpoint_step) == (3, 2, 1)
    assert "the state of phase 'float' is not finite at step 3 (first at step 2)" in str(error)
    assert str(workdir / "float" / "checkpoints" / "1") in str(error)
    (saved,) = (workdir / "float" / "checkpoints").iterdir()
    assert json.loads((saved / "meta" / "metadata").read_text())["data"]["step"] == 1
