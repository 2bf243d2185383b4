"""Donated buffers, what a step takes of a device's memory, and no second compilation."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from uniq_jax import config as c
from uniq_jax.train import compilation, diagnosis, loop, memory, progress, start
from uniq_jax.train.memory import StepMemory
from uniq_jax.train.run import Run


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Most of the time is compilation."""
    with pytest.MonkeyPatch.context() as patch:
        options = {"xla_backend_optimization_level": 0}
        patch.setattr(compilation, "compiler_options", lambda: options)
        yield


def make_run():
    config = c.base()
    config.data.batch_size = 32
    config.data.train_split, config.data.test_split = "train[:128]", "test[:64]"
    config.data.eval_batch_size = 32
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.phases = ("float",)
    config.float = c.phase("float", ema_decay=0.9)
    run = Run(c.run_spec(config))
    phase = run.spec.phases[0]
    program = run.program(phase)
    state = start.restart_averages(start.fresh_state(run.builder(phase), program, run.mesh))
    return run, phase, program, state


@pytest.fixture(scope="module")
def compiled():
    run, phase, program, state = make_run()
    step, line = run.compiled_step(phase, program, state, None)
    with run.train_batches() as batches:
        placed = [run.place(next(batches)) for _ in range(2)]
    return types.SimpleNamespace(
        run=run, phase=phase, program=program, state=state, step=step, line=line, batches=placed
    )


def test_a_step_takes_over_the_buffers_of_the_state_it_is_given(compiled):
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(compiled.state))
    found = StepMemory.of(compiled.step)
    assert state_bytes <= found.aliased <= 1.01 * state_bytes
    batch_bytes = sum(array.nbytes for array in compiled.batches[0].values())
    assert found.arguments == pytest.approx(state_bytes + batch_bytes, rel=0.01)
    # Nothing but the metrics is new.
    assert found.outputs - found.aliased < 1000
    given = jax.tree.map(jnp.copy, compiled.state)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(given)}
    state, _ = compiled.step(given, compiled.batches[0], None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert not any(array.is_deleted() for array in compiled.batches[0].values())
    kept = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    assert kept == pointers


def test_the_step_that_was_compiled_is_the_one_of_jit(compiled):
    states = [jax.tree.map(jnp.copy, compiled.state) for _ in range(2)]
    jitted = compiled.run.train_step(compiled.program, compiled.state)
    results = [f(s, compiled.batches[1], None) for f, s in zip((compiled.step, jitted), states)]
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding


def test_a_compiled_step_takes_no_other_shapes(compiled):
    state = jax.tree.map(jnp.copy, compiled.state)
    smaller = {name: array[:16] for name, array in compiled.batches[0].items()}
    with pytest.raises(TypeError, match="uint8"):
        compiled.step(state, smaller, None)


def test_a_step_that_does_not_fit_stops_with_advice(compiled):
    needed = StepMemory.of(compiled.step)
    assert compiled.line.startswith(f"a step takes {needed} of each device's ")

    class Step:  # It is compiled already.
        def lower(self, *arguments):
            return types.SimpleNamespace(compile=lambda: compiled.step)

    limit_gib = needed.total / 2**30
    options = {"advice": memory.advice(compiled.run.spec, compiled.phase)}
    memory.compile_step(Step(), (), limit_gib=1.001 * limit_gib, **options)
    with pytest.raises(ValueError, match=r"a training step takes .* of each device") as raised:
        memory.compile_step(Step(), (), limit_gib=0.999 * limit_gib, **options)
    for key in (
        "config.memory_limit_gib (=",
        "config.data.batch_size (=32)",
        "config.float.accumulation_steps (=1)",
        "config.model.remat (='none')",
        "config.model.dtype (='float32')",
        "config.mesh (={'data': -1, 'model': 1})",
    ):
        assert key in str(raised.value)


def test_a_compiler_that_runs_out_of_memory_gives_the_same_advice():
    class Step:
        def __init__(self, message):
            self.message = message

        def lower(self, *arguments):
            raise jax.errors.JaxRuntimeError(self.message)

    step = Step("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")
    with pytest.raises(ValueError, match=r"does not fit: RESOURCE_EXHAUSTED.* Take less\.$"):
        memory.compile_step(step, (), limit_gib=0.0, advice="Take less.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory.compile_step(Step("INTERNAL: no"), (), limit_gib=0.0, advice="")


def test_what_a_device_has(monkeypatch, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   3000 kB\n")
    assert memory._free_host_bytes(tmp_path) == 3000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 700000\ninactive_file 200000\n")
    assert memory._free_host_bytes(tmp_path) == 3000 * 1024
    (group / "memory.max").write_text("1000000\n")
    assert memory._free_host_bytes(tmp_path) == 300000
    assert memory._free_host_bytes(tmp_path / "none") > 0
    monkeypatch.setattr(memory, "_free_host_bytes", lambda: 800)
    cpu, gpu = (
        types.SimpleNamespace(memory_stats=lambda stats=stats: stats)
        for stats in (None, {"bytes_limit": 5000})
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [cpu] * 4)
    assert memory.available(held=30) == 230
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu] * 4)
    assert memory.available(held=30) == 5000


@pytest.fixture
def compilations():
    """The names of what was compiled so far, as JAX tells."""
    seen = []

    def listen(event, duration_s, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append((duration_s, details))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


class Killed(Exception):
    pass


def test_nothing_is_compiled_after_the_first_step_and_evaluation(
    compilations, monkeypatch, tmp_path
):
    config = c.base()
    config.data.batch_size = config.data.eval_batch_size = 32
    config.data.train_split, config.data.test_split = "train[:128]", "test[:64]"
    config.data.augment = "crop"
    config.model.name, config.model.options = "resnet8", {"width": 4}
    config.log_every_steps, config.checkpoint_every_steps = 1, 2
    config.tensorboard = False
    config.phases = ("float",)
    config.float = c.phase("float", total_epochs=3.0, accumulation_steps=2)
    spec = c.run_spec(config)
    # (what, steps so far, compilations so far)
    events, made_step, made_evaluator = [], Run.compiled_step, Run.evaluator

    def counted(what, function, last=1000):
        def call(*arguments):
            if len(events) == last:
                raise Killed
            result = function(*arguments)
            events.append((what, len(compilations)))
            return result

        return call

    def compiled_step(last):
        def make(*arguments):
            step, line = made_step(*arguments)
            return counted("step", step, last), line

        return make

    monkeypatch.setattr(
        Run, "evaluator", lambda *arguments: counted("evaluation", made_evaluator(*arguments))
    )
    # What looks at a state before it is saved is compiled where that is done first.
    check = diagnosis.check
    monkeypatch.setattr(diagnosis, "check", counted("check", check))
    console = Console(quiet=True)
    monkeypatch.setattr(Run, "compiled_step", compiled_step(last=11))
    with pytest.raises(Killed):
        loop.train(spec, tmp_path / "run", console)
    steps = ["step", "step", "check"]
    assert [what for what, _ in events] == [*steps, *steps, "evaluation", *steps, "step"]
    check_none_after_the_first(events)
    before = len(compilations)
    # In the same process: what was compiled for the first part is compiled again, once.
    events.clear()
    monkeypatch.setattr(Run, "compiled_step", compiled_step(last=1000))
    loop.train(spec, tmp_path / "run", console)
    assert [what for what, _ in events].count("evaluation") == 2
    taken = [what for what, _ in events].count("step")
    assert taken in (6, 8)  # From step 6, or from step 4.
    check_none_after_the_first(events)
    assert len(compilations) > before
    # The counter sees a compilation, and the check an event after one.
    jax.jit(lambda x: 3 * x + before)(jnp.ones(7))
    with pytest.raises(AssertionError):
        check_none_after_the_first([*events, ("step", len(compilations))])


def short_run():
    """A config without phases, of four steps an epoch."""
    config = c.base()
    config.data.batch_size = config.data.eval_batch_size = 32
    config.data.train_split, config.data.test_split = "train[:128]", "test[:64]"
    config.model.name, config.model.options = "resnet8", {"width": 4}
    config.tensorboard = False
    return config


def test_no_step_is_reported_before_it_is_done(monkeypatch, tmp_path):
    """So that batches do not pile up in front of the devices, and rates are those of work done."""
    config = short_run()
    config.phases = ("float",)
    config.float = c.phase("float", total_epochs=2.0)
    made_step, done = Run.compiled_step, []

    @jax.jit
    def late(loss):
        return jax.lax.fori_loop(0, 3_000_000, lambda i, x: jnp.sin(x), loss)

    def compiled_step(*arguments):
        step, line = made_step(*arguments)

        def slow(*arguments):
            state, metrics = step(*arguments)
            return state, {**metrics, "loss": late(metrics["loss"])}

        return slow, line

    monkeypatch.setattr(Run, "compiled_step", compiled_step)
    monkeypatch.setattr(
        progress.Progress,
        "update",
        lambda self, step, *, loss, accuracy: done.append(loss.is_ready()),
    )
    loop.train(c.run_spec(config), tmp_path / "run", Console(quiet=True))
    assert done == [True] * 8


def test_layers_that_there_is_no_room_to_measure_are_not_measured(monkeypatch, tmp_path):
    config = short_run()
    config.layer_metrics_every_steps = 2
    config.phases = ("quantized",)
    config.quantized = c.phase("uniq", weight_bits=2, activation_bits=2, total_epochs=1.0)
    config.export.formats = ""
    compile_step = memory.compile_step

    def with_little_room(step, arguments, *, what="", limit_gib, **options):
        limit_gib = 1e-6 if what else limit_gib
        return compile_step(step, arguments, what=what, limit_gib=limit_gib, **options)

    monkeypatch.setattr(memory, "compile_step", with_little_room)
    console = Console(record=True, width=300)
    workdir = tmp_path / "run"
    result = loop.train(c.run_spec(config), workdir, console)
    assert result.steps == 4
    (line,) = [line for line in console.export_text().splitlines() if "not measured" in line]
    assert "quantized: its layers are not measured: that takes" in line
    assert "allows 0.00 MiB. Training goes on." in line
    assert not (workdir / "quantized" / "layers.json").exists()


def check_none_after_the_first(events):
    """Each kind may compile in its first call alone."""
    met = set()
    for (_, before), (what, after) in zip([("", events[0][1]), *events], events):
        assert after == before or what not in met, events
        met.add(what)
