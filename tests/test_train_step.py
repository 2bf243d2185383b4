"""The pure step and the optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uniq_jax import config as c
from uniq_jax import interop
from uniq_jax.quantizers import uniq_weight_initial_step
from uniq_jax.train import optimizer, start
from uniq_jax.train.run import Run


def make_spec(method="uniq", *, name="sgd", **optimizer_values):
    config = c.base()
    config.data.batch_size = 32
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.phases = ("quantized",)
    bits = {} if method == "float" else {"weight_bits": 2, "activation_bits": 2}
    config.quantized = c.phase(method, **bits, optimizer={"name": name, **optimizer_values})
    return c.run_spec(config)


def make_run(spec):
    run = Run(spec)
    program = run.program(spec.phases[0])
    state = start.fresh_state(run.builder(spec.phases[0]), program, run.mesh)
    return run, program, state


def batches_of(run, count):
    with run.train_batches() as batches:
        return [run.place(next(batches)) for _ in range(count)]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_decay_never_touches_learned_quantizer_state(name):
    spec = (
        make_spec("uniq_n2uq", name=name, learning_rate=0.1, weight_decay=0.5).phases[0].optimizer
    )
    params = {"conv/kernel": jnp.ones(3), "q/step": jnp.ones(()), "bn/scale": jnp.ones(3)}
    rate = optax.constant_schedule(0.1)
    transform = optimizer.optimizer(
        spec, rate, {"conv/kernel": False, "q/step": True, "bn/scale": False}, total_steps=9
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    np.testing.assert_allclose(updates["conv/kernel"], -0.1 * 0.5 * np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(updates["bn/scale"], -0.1 * 0.5 * np.ones(3), rtol=1e-6)
    np.testing.assert_array_equal(updates["q/step"], 0)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_multiplier_scales_the_rate_of_quantizer_state_only(name):
    values = {"learning_rate": 0.1, "weight_decay": 0.0}
    params = {"kernel": jnp.ones(3), "step": jnp.ones(())}
    grads = {"kernel": jnp.full(3, 0.3), "step": jnp.full((), 0.3)}
    updates = []
    for multiplier in (1.0, 0.1):
        spec = make_spec(name=name, quantizer_rate_multiplier=multiplier, **values)
        transform = optimizer.optimizer(
            spec.phases[0].optimizer,
            optax.constant_schedule(0.1),
            {"kernel": False, "step": True},
            total_steps=9,
        )
        updates.append(transform.update(grads, transform.init(params), params)[0])
    np.testing.assert_array_equal(updates[0]["kernel"], updates[1]["kernel"])
    np.testing.assert_allclose(updates[1]["step"], 0.1 * updates[0]["step"], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_quantizer_state_stays_in_the_last_part_of_a_phase(name):
    moved = []
    for fraction in (0.0, 0.4):
        spec = make_spec(name=name, quantizer_freeze_fraction=fraction).phases[0].optimizer
        transform = optimizer.optimizer(
            spec, optax.constant_schedule(0.1), {"kernel": False, "step": True}, total_steps=10
        )
        params = {"kernel": jnp.ones(3), "step": jnp.ones(())}
        state, update = transform.init(params), jax.jit(transform.update)
        updates = []
        for step in range(10):
            grads = {"kernel": jnp.full(3, 0.3 + step), "step": jnp.full((), 0.3)}
            given, state = update(grads, state, params)
            updates.append(given)
        moved.append({key: np.stack([u[key] for u in updates]) for key in params})
    free, frozen = moved
    np.testing.assert_array_equal(frozen["kernel"], free["kernel"])
    np.testing.assert_array_equal(frozen["step"][:6], free["step"][:6])
    np.testing.assert_array_equal(frozen["step"][6:], 0)
    assert np.all(free["step"] != 0)


def test_sgd_is_that_of_pytorch():
    """Decay joins the gradient, then momentum: buf = m·buf + (g + d·p); p −= r·buf."""
    rng = np.random.default_rng(0)
    p = rng.standard_normal(5)
    grads = rng.standard_normal((4, 5))
    spec = make_spec(learning_rate=0.3, momentum=0.9, weight_decay=0.01).phases[0].optimizer
    transform = optimizer.optimizer(spec, optax.constant_schedule(0.3), {"p": False}, total_steps=9)
    params = {"p": jnp.asarray(p, jnp.float32)}
    state = transform.init(params)
    buffer = np.zeros(5)
    for grad in grads:
        updates, state = transform.update({"p": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        buffer = 0.9 * buffer + grad + 0.01 * p
        p = p - 0.3 * buffer
    np.testing.assert_allclose(params["p"], p, rtol=1e-5)


def test_schedules_warm_up_and_end_at_zero():
    def rates(**values):
        spec = make_spec(learning_rate=0.4, **values).phases[0].optimizer
        # Warm-up is given in epochs; 10 steps make one.
        schedule = optimizer.schedule(spec, total_steps=100, steps_per_epoch=10)
        return np.array([float(schedule(step)) for step in range(101)])

    steps = np.arange(101)
    cosine = rates(schedule="cosine")
    np.testing.assert_allclose(cosine, 0.2 * (1 + np.cos(np.pi * steps / 100)), atol=1e-7)
    np.testing.assert_allclose(rates(schedule="linear"), 0.4 * (1 - steps / 100), atol=1e-7)
    np.testing.assert_allclose(rates(schedule="constant"), 0.4, rtol=1e-6)
    warm = rates(schedule="linear", warmup_epochs=0.5, warmup_learning_rate=0.1)
    np.testing.assert_allclose(warm[:5], 0.1 + 0.3 * steps[:5] / 5, rtol=1e-6)
    np.testing.assert_allclose(warm[5:], 0.4 * (1 - steps[:96] / 95), atol=1e-7)
    held = rates(warmup_epochs=0.5, warmup_learning_rate=0.1, warmup_shape="constant")
    np.testing.assert_allclose(held[:5], 0.1, rtol=1e-6)
    assert held[5] == pytest.approx(0.4)


@pytest.mark.parametrize("method", ["float", "uniq", "n2uq", "uniq_n2uq", "lsq"])
def test_every_method_trains(method):
    spec = make_spec(method, name="adam", learning_rate=1e-2, schedule="constant")
    run, program, state = make_run(spec)
    batches = batches_of(run, 60)
    if method != "float":
        state = start.calibrate(program, state, batches[:4], 4)
    before = jax.tree.map(np.asarray, state.params)
    # It takes the states that it gives, or it is an error.
    step_fn, _ = run.compiled_step(run.spec.phases[0], program, state, None)
    losses = []
    for batch in batches:
        state, metrics = step_fn(state, batch, None)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8]), losses
    unmoved = [path for path in before if np.array_equal(before[path], state.params[path])]
    assert unmoved == []
    assert int(state.step) == 60


def test_evaluation_counts_every_example_once_and_masks_the_rest():
    spec = make_spec("float")
    data = dataclasses.replace(spec.data, eval_batch_size=77)
    run, program, state = make_run(dataclasses.replace(spec, data=data))
    values = run.evaluator(program)(state.params, state.statistics)
    assert len(run.test_data) % 77 != 0
    assert values["test_count"] == len(run.test_data)
    model = program.build(state.params, state.statistics)
    model.eval()
    logits = model(program.normalize(jnp.asarray(run.test_data.images)))
    correct = np.sum(np.argmax(logits, axis=-1) == run.test_data.labels)
    assert values["test_accuracy"] == correct / len(run.test_data)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.asarray(run.test_data.labels)
    )
    assert values["test_loss"] == pytest.approx(float(jnp.mean(losses)), rel=1e-5)


def test_parameters_of_another_shape_are_named():
    _, program, state = make_run(make_spec("float"))
    kernel = np.zeros((5, 5, 1, 4), np.float32)
    with pytest.raises(ValueError, match=r"conv1/kernel of shape \(5, 5, 1, 4\).*\(3, 3, 1, 4\)"):
        start.take({"conv1/kernel": kernel}, state, program)
    with pytest.raises(ValueError, match=r"config\.init_from names does not fit: .*conv1\.weight"):
        start.take({"conv1.weight": np.zeros((4, 1, 5, 5), np.float32)}, state, program)
    with pytest.raises(ValueError, match="no parameter of this network; it has other"):
        start.take({"other": kernel}, state, program)


def test_the_report_lists_every_parameter():
    _, program, state = make_run(make_spec("uniq"))
    source = {path: np.ones(a.shape) for path, a in state.params.items() if "quantizer" not in path}
    del source["conv1/kernel"]
    source["extra/kernel"] = np.ones(3)
    taken, report = start.take(source, state, program)
    assert report.left_over == ("extra/kernel",)
    assert set(report.taken) | set(report.new) == {*state.params, *state.statistics}
    assert "conv1/kernel" in report.new
    assert not set(report.taken) & set(report.new)
    assert "1 left over: extra/kernel" in report.summary()
    many = dataclasses.replace(report, left_over=tuple(f"{i}/kernel" for i in range(20)))
    assert "20 left over: 0/kernel, " in many.summary()
    assert many.summary().endswith("5/kernel and 14 more")
    np.testing.assert_array_equal(taken.params["linear/kernel"], 1)
    np.testing.assert_array_equal(taken.params["conv1/kernel"], state.params["conv1/kernel"])
    # Weight quantizers start from what was taken, the others stay.
    started = start.restart_weight_quantizers(program, taken, report)
    path = "layer1/0/conv1/weight_quantizer/step"
    kernel = taken.params["layer1/0/conv1/kernel"]
    assert started.params[path] == uniq_weight_initial_step(kernel, bits=2)
    assert started.params[path] != taken.params[path]
    path = "layer1/0/conv1/activation_quantizer/step"
    assert started.params[path] == taken.params[path]


def test_parameters_with_the_names_of_another_program():
    _, program, state = make_run(make_spec("float"))
    named = interop.to_torch_state_dict(program.build(state.params, state.statistics))
    named = {name: value + 1 for name, value in named.items()}
    taken, report = start.take(named, state, program)
    assert not report.new
    assert not report.left_over
    for path, value in state.params.items():
        np.testing.assert_array_equal(taken.params[path], value + 1)
