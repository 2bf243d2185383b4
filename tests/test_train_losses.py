"""Losses against their formulas, and the teacher in a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import config as c
from uniq_jax import interop, models
from uniq_jax.spec import ConfigError
from uniq_jax.train import losses, mixup, start
from uniq_jax.train.network import join
from uniq_jax.train.run import Run

RNG = np.random.default_rng(0)
LOGITS, TEACHER = (3 * RNG.standard_normal((2, 6, 5))).astype(np.float32)
LABELS = RNG.integers(0, 5, 6)


def softmax(x):
    exponents = np.exp(x - x.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_is_its_formula(smoothing):
    target = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    expected = -(target * np.log(softmax(LOGITS))).sum(-1)
    found = losses.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), smoothing=smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_distillation_is_its_formula_and_so_is_its_gradient(weight, temperature, smoothing):
    target = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    hard = -(target * np.log(softmax(LOGITS))).sum(-1)
    student, teacher = softmax(LOGITS / temperature), softmax(TEACHER / temperature)
    soft = -(temperature**2) * (teacher * np.log(student)).sum(-1)
    options = {"smoothing": smoothing, "weight": weight, "temperature": temperature}

    def total(logits, teacher_logits):
        values = losses.mixed(logits, jnp.asarray(LABELS), teacher_logits, **options)
        return jnp.sum(values), values

    (_, values), (grad, to_teacher) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    )
    np.testing.assert_allclose(values, weight * soft + (1 - weight) * hard, rtol=1e-5)
    expected = weight * temperature * (student - teacher)
    expected += (1 - weight) * (softmax(LOGITS) - target)
    np.testing.assert_allclose(grad, expected, atol=1e-5)
    np.testing.assert_array_equal(to_teacher, 0)


def make_spec(method="float", *, dtype="float32", **loss):
    config = c.base()
    config.data.batch_size = 32
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.model.dtype = dtype
    config.phases = ("quantized",)
    bits = {} if method == "float" else {"weight_bits": 2, "activation_bits": 2}
    optimizer = {"name": "adam", "learning_rate": 1e-2, "schedule": "constant"}
    config.quantized = c.phase(method, **bits, optimizer=optimizer, loss=loss)
    return c.run_spec(config)


def of_teacher(path, **values):
    named = {"teacher": str(path), "teacher_model": "resnet8", "teacher_options": {"width": 4}}
    return {**named, **values}


def make_run(spec):
    run = Run(spec)
    program = run.program(spec.phases[0])
    state = start.fresh_state(run.builder(spec.phases[0]), program, run.mesh)
    return run, program, state


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A float network with PyTorch's names, whose statistics are not the initial ones."""

    @nnx.jit
    def build():
        return models.create("resnet8", num_classes=10, in_features=1, width=4, rngs=nnx.Rngs(7))

    rng = np.random.default_rng(1)
    arrays = {
        name: value + (rng.uniform(0.1, 0.5, value.shape) if "running" in name else 0)
        for name, value in interop.to_torch_state_dict(build()).items()
    }
    path = tmp_path_factory.mktemp("teacher") / "float.npz"
    interop.write_state_dict(path, {n: np.asarray(v, np.float32) for n, v in arrays.items()})
    return path


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(teacher_file):
    run = Run(make_spec(**of_teacher(teacher_file)))
    program, teacher = run.program(run.spec.phases[0]), run.teacher(run.spec.phases[0])
    batch = run.place(next_batch(run))

    def loss_of(params, weight):
        model = program.build({**teacher.arrays, **params}, {})
        # As the teacher: in evaluation mode.
        model.eval()
        images = program.normalize(batch["image"])
        return jnp.mean(
            losses.mixed(model(images), batch["label"], teacher.logits(images), weight=weight)
        )

    @jax.jit
    def gradients(params):
        return [jax.grad(loss_of)(params, weight) for weight in (1.0, 0.5)]

    trained = [join(p) for p, kind in program.network.variables.items() if kind is nnx.Param]
    soft, half = gradients({path: teacher.arrays[path] for path in trained})
    assert max(float(jnp.max(jnp.abs(g))) for g in soft.values()) < 1e-6
    assert max(float(jnp.max(jnp.abs(g))) for g in half.values()) > 1e-2


def test_the_loss_falls_and_the_teacher_stays(teacher_file):
    run, program, state = make_run(make_spec("n2uq", **of_teacher(teacher_file)))
    teacher = run.teacher(run.spec.phases[0])
    before = jax.tree.map(np.asarray, teacher.arrays)
    # It takes the states that it gives, or it is an error.
    step_fn, _ = run.compiled_step(run.spec.phases[0], program, state, teacher)
    values = []
    with run.train_batches() as batches:
        for _ in range(40):
            state, metrics = step_fn(state, run.place(next(batches)), teacher)
            values.append(float(metrics["loss"]))
    images = program.normalize(run.place(next_batch(run))["image"])
    probabilities = softmax(np.asarray(jax.jit(lambda t, x: t.logits(x))(teacher, images)))
    floor = -(probabilities * np.log(probabilities)).sum(-1).mean()
    assert np.mean(values[-8:]) - floor < 0.5 * (np.mean(values[:4]) - floor), (values, floor)
    for path, value in before.items():
        np.testing.assert_array_equal(teacher.arrays[path], value)
    with pytest.raises(ValueError, match=r"teacher \(=NoneType\) must be given if and only if"):
        run.train_step(program, state)(state, run.place(next_batch(run)))


def next_batch(run):
    with run.train_batches() as batches:
        return next(batches)


def test_mixed_examples_are_what_a_step_learns():
    run, program, state = make_run(make_spec(mixup_alpha=0.4))
    batch = run.place(next_batch(run))
    steps = jnp.arange(200)
    draw = jax.vmap(lambda step: mixup.share(jax.random.fold_in(jax.random.key(0), step), 0.4))
    parts = np.asarray(jax.jit(draw)(steps))
    assert parts.min() >= 0.5
    assert parts.max() <= 1
    drawn = np.random.default_rng(0).beta(0.4, 0.4, 100_000)
    assert abs(parts.mean() - np.maximum(drawn, 1 - drawn).mean()) < 0.04

    @jax.jit
    def losses_of(state, images):
        model = program.build(state.params, state.statistics)
        model.train()
        return losses.cross_entropy(model(images)[:, None], labels.T)

    images = np.asarray(program.normalize(batch["image"]))
    partner = np.roll(np.arange(32), 1)
    labels = jnp.stack([batch["label"], batch["label"][partner]])
    expected = []
    for part in parts[:2]:
        values = np.asarray(losses_of(state, part * images + (1 - part) * images[partner]))
        expected.append((values @ [part, 1 - part]).mean())
    step_fn = run.train_step(program, state)
    again = jax.tree.map(jnp.copy, state)
    again = dataclasses.replace(again, step=again.step + 1)
    for start_state, value in ((state, expected[0]), (again, expected[1])):
        _, metrics = step_fn(start_state, batch)
        assert float(metrics["loss"]) == pytest.approx(value, rel=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_smoothed_labels_are_what_a_step_minimizes():
    run, program, state = make_run(make_spec(label_smoothing=0.2))
    batch = run.place(next_batch(run))

    @jax.jit
    def expected(state):
        model = program.build(state.params, state.statistics)
        model.train()
        logits = model(program.normalize(batch["image"]))
        return [losses.cross_entropy(logits, batch["label"], smoothing=s).mean() for s in (0.2, 0)]

    smoothed, plain = expected(state)
    _, metrics = run.train_step(program, state)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(smoothed), rel=1e-5)
    assert float(metrics["loss"]) != pytest.approx(float(plain), rel=1e-3)


def test_a_teacher_has_the_dtypes_of_its_student(teacher_file):
    spec = make_spec(dtype="bfloat16", **of_teacher(teacher_file))
    run = Run(spec)
    teacher = run.teacher(spec.phases[0])
    assert teacher.arrays["conv1/kernel"].dtype == jnp.float32
    model = teacher.network.build(teacher.arrays, {})
    model.eval()
    assert jax.eval_shape(model, jnp.zeros((2, 8, 8, 1), jnp.bfloat16)).dtype == jnp.bfloat16
    assert jax.eval_shape(teacher.logits, jnp.zeros((2, 8, 8, 1), jnp.bfloat16)).dtype == (
        jnp.float32
    )
    (sharding,) = {array.sharding for array in teacher.arrays.values()}
    assert sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"label_smoothing": 1.0}, r"loss\.label_smoothing \(=1\.0\) must be in \[0, 1\)"),
        ({"mixup_alpha": -0.1}, r"loss\.mixup_alpha \(=-0\.1\) must be at least 0"),
        ({"teacher_weight": 0.0}, r"loss\.teacher_weight \(=0\.0\) must be in \(0, 1\]"),
        ({"teacher_temperature": 0.0}, r"loss\.teacher_temperature \(=0\.0\) must be above 0"),
        ({"teacher": "x"}, r"loss\.teacher_model \(=''\) must be the name .*'x'"),
        ({"teacher_model": "resnet8"}, r"loss\.teacher_model \(='resnet8'\) must be '' where"),
        ({"teacher_options": {"width": 4}}, r"loss\.teacher_options .* must be \{\} where"),
        ({"teacher_weight": 0.5}, r"loss\.teacher_weight \(=0\.5\) must be 1\.0 where"),
        ({"teacher_temperature": 2.0}, r"loss\.teacher_temperature \(=2\.0\) must be 1\.0"),
        (
            {"teacher": "x", "teacher_model": "resnet8", "label_smoothing": 0.1},
            r"loss\.label_smoothing \(=0\.1\) must be 0 where config\.quantized\.loss\.teacher_we",
        ),
        ({"teachr": "x"}, r"phase\.loss\.teachr is no known key; did you mean 'teacher'"),
    ],
)
def test_a_wrong_loss_is_named(loss, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(**loss)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "/no/such"}, r"loss\.teacher \(='/no/such'\) does not exist"),
        ({"teacher_model": "resnet9"}, r"loss\.teacher_model: name \(='resnet9'\) must be one of"),
        ({"teacher_options": {"depth": 4}}, r"loss\.teacher_options \(=\{'depth': 4\}\) don't fit"),
        ({"teacher_options": {"width": 8}}, r"loss\.teacher names does not fit: .*conv1"),
        ({"teacher_model": "resnet14"}, r"must hold a resnet14 .*: it lacks layer1/1/"),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(values, message, teacher_file):
    spec = make_spec(**of_teacher(teacher_file, **values) if values else {})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Run(spec).teacher(spec.phases[0])


def test_a_teacher_of_more_layers_or_of_low_width_is_refused(teacher_file, tmp_path):
    named = interop.read_state_dict(teacher_file)
    spec = make_spec(**of_teacher(teacher_file))
    by_path = {path: np.asarray(a) for path, a in Run(spec).teacher(spec.phases[0]).arrays.items()}
    more = {**named, "layer1.1.conv1.weight": np.zeros((4, 4, 3, 3), np.float32)}
    low = {**by_path, "layer1/0/conv1/weight_quantizer/step": np.ones((), np.float32)}
    for arrays, message in (
        (more, r"must hold a resnet8 .*: it also has layer1\.1\.conv1\.weight"),
        (low, r"must be a float network, but it has layer1/0/conv1/weight_quantizer/step"),
    ):
        path = tmp_path / "other.npz"
        interop.write_state_dict(path, arrays)
        spec = make_spec(**of_teacher(path))
        with pytest.raises(ValueError, match=message):
            Run(spec).teacher(spec.phases[0])
