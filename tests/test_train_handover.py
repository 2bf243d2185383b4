"""From one width or method to the next: what a phase takes over, and what starts anew."""

import functools
import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from small_runs import NETWORK

from uniq_jax import config as c
from uniq_jax import nn, recipes
from uniq_jax.spec import ConfigError
from uniq_jax.train import handover, preemption, sources, start
from uniq_jax.train.checkpoints import read_model
from uniq_jax.train.logs import read_metrics
from uniq_jax.train.network import split
from uniq_jax.train.phase import _first_state
from uniq_jax.train.run import Run

WIDTHS = {"uniq": "8-4-2", "n2uq": "w8a5-4-2", "uniq_n2uq": "w8a5-4-2", "lsq": "8-4-2"}
# One method stands for all where much is compiled.
METHODS = [m if m == "uniq_n2uq" else pytest.param(m, marks=pytest.mark.slow) for m in WIDTHS]

CONFIG = """
from uniq_jax import config as c
from uniq_jax import recipes

def get_config(arg=None):
    args = recipes.arguments(arg, bits=2, method="uniq")
    config = c.base()
    config.data.batch_size = 32
    config.data.train_split = "train[:160]"
    config.data.test_split = "test[:64]"
    config.model.name = "resnet8"
    config.model.options = {"width": 4}
    config.checkpoint_every_steps = 2
    config.log_every_steps = 1
    config.export.formats = ""
    recipes.add_phases(config, args, calibration_batches=2)
    return config
"""


def get_config(arg):
    names = {}
    exec(CONFIG, names)  # The same text that the command reads.
    return names["get_config"](arg)


def small_run(arg, **changes):
    config = get_config(arg)
    for key, value in changes.items():
        name, _, last = key.rpartition("__")
        (config[name] if name else config)[last] = value
    return Run(c.run_spec(config))


def quantizers_of(run, phase):
    return handover.quantizers(nnx.eval_shape(run.builder(phase)))


def test_a_curriculum_is_phases_that_share_the_epochs():
    spec = c.run_spec(get_config("method=uniq,curriculum=8-4-2,epochs=30,float_epochs=3"))
    assert [phase.name for phase in spec.phases] == ["float", "w8a8", "w4a4", "w2a2"]
    assert [phase.total_epochs for phase in spec.phases] == [3.0, 7.5, 7.5, 15.0]
    widths = [(phase.weight_bits, phase.activation_bits) for phase in spec.phases[1:]]
    assert widths == [(8, 8), (4, 4), (2, 2)]
    spec = c.run_spec(get_config("method=n2uq,curriculum=w8a5-4-w4a2-1,epochs=30"))
    assert [phase.name for phase in spec.phases] == ["w8a5", "w4a4", "w4a2", "w1a1"]
    assert [phase.total_epochs for phase in spec.phases] == [5.0, 5.0, 5.0, 15.0]
    (phase,) = c.run_spec(get_config("curriculum=3,epochs=30")).phases
    assert (phase.name, phase.total_epochs) == ("w3a3", 30.0)
    # UniQ's recipe at one bit is another; N2UQ's later phases are calibrated whatever its first is.
    spec = c.run_spec(get_config("curriculum=2-1"))
    assert [phase.optimizer.weight_decay for phase in spec.phases] == [5e-4, 0.0]
    spec = c.run_spec(recipes.imagenet("curriculum=4-2", model="resnet18", bits=2))
    assert [phase.calibration_batches for phase in spec.phases] == [0, 100]


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("curriculum=8-4,method=n2uq", r"\(='8-4'\) must have at most 5 bits .*'n2uq'.* w8a5-4-2"),
        ("curriculum=2-4", r"curriculum \(='2-4'\) must go down"),
        ("curriculum=4-4", r"curriculum \(='4-4'\) must go down"),
        ("curriculum=9-4", r"curriculum \(='9-4'\) must be widths from 1 to 8"),
        ("curriculum=8;4", r"curriculum \(='8;4'\) must be widths from 1 to 8"),
        ("curriculum=4-2,weight_bits=2", r"weight_bits \(=2\) must be left out"),
    ],
)
def test_a_wrong_curriculum_is_named(arg, message):
    with pytest.raises(ConfigError, match=message):
        get_config(arg)


@pytest.mark.parametrize("method", WIDTHS)
def test_quantizers_that_change_start_anew_and_the_others_stay(method, tmp_path):
    run = small_run(f"method={method},curriculum={WIDTHS[method]},float_epochs=1")
    found = handover.of_run(run, tmp_path)
    assert found["float"] is None
    ends = {
        f"{layer}/{q}_quantizer" for layer in ("conv1", "linear") for q in ("weight", "activation")
    }
    for i, phase in enumerate(run.spec.phases[1:], start=1):
        here = quantizers_of(run, phase)
        assert (ends <= here.keys()) == (method != "n2uq")
        expected = here.keys() if i == 1 else here.keys() - ends
        assert found[phase.name].stale == expected


def test_changes_without_calibration_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.w2a2\.calibration_batches \(=0\) .*W4A4"):
        handover.of_run(small_run("curriculum=4-2", w2a2__calibration_batches=0), tmp_path)
    # Nothing changes, and what a step is by weights alone needs no batches.
    run = small_run("curriculum=4-w2a4", w2a4__calibration_batches=0)
    stale = handover.of_run(run, tmp_path)["w2a4"].stale
    assert stale
    assert all(path.endswith("weight_quantizer") for path in stale)


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """Of a method: the arrays of the first phase, and the first state of the second one."""

    @functools.cache
    def of(method):
        run = small_run(f"method={method},curriculum={WIDTHS[method]}")
        old, new = run.spec.phases[:2]
        # Learned values, none of which a calibration would give.
        state = start.abstract_state(run.builder(old), run.program(old), run.mesh)
        rng = np.random.default_rng(0)
        source = {
            path: rng.uniform(0.1, 0.2, array.shape).astype(np.float32)
            for path, array in {**state.params, **state.statistics}.items()
        }
        stale = handover.of_run(run, pathlib.Path("nowhere"))[new.name].stale
        directory = tmp_path_factory.mktemp(method)
        given = handover.Source(lambda: source, stale)
        program, console = run.program(new), Console(file=io.StringIO())
        return (
            run,
            new,
            source,
            _first_state(run, new, program, directory, given, console, preemption.never),
        )

    return of


@pytest.mark.parametrize("method", METHODS)
def test_after_the_switch_steps_are_those_of_a_calibration(method, switched):
    run, phase, source, state = switched(method)
    here = {**state.params, **state.statistics}
    # The network of the new width with the old one's weights, and all of it calibrated.
    program = run.program(phase)
    model = program.build(state.params, state.statistics)
    with run.train_batches() as batches:
        nn.calibrate(model, [program.normalize(next(batches)["image"]) for _ in range(2)])
    calibrated, _ = split(model)
    kept = ("conv1/", "linear/") if method != "n2uq" else ()
    kinds = {"kept": 0, "calibrated": 0}
    for path, array in here.items():
        if "_quantizer/" not in path or path.startswith(kept):
            np.testing.assert_array_equal(array, source[path], err_msg=path)
            kinds["kept"] += "_quantizer/" in path
        else:
            np.testing.assert_array_equal(array, calibrated[path], err_msg=path)
            if array.shape == source[path].shape:
                assert not np.array_equal(array, source[path]), path
            kinds["calibrated"] += 1
        assert array.sharding.is_equivalent_to(state.params["conv1/kernel"].sharding, array.ndim)
    assert bool(kinds["kept"]) == (method != "n2uq")
    assert kinds["calibrated"] > 5
    if "n2uq" in method:
        intervals = "layer1/0/conv1/activation_quantizer/intervals"
        assert (source[intervals].size, here[intervals].size) == (2**5 - 1, 2**4 - 1)


def test_of_a_file_widths_are_unknown(tmp_path):
    """Other shapes mean another width; other values do not."""
    run = small_run("method=uniq_n2uq,weight_bits=2,activation_bits=2")
    (phase,) = run.spec.phases
    program = run.program(phase)
    abstract = start.abstract_state(run.builder(phase), program, run.mesh)
    source = {p: np.zeros(a.shape, np.float32) for p, a in abstract.params.items()}
    quantizer = "layer1/0/conv1/activation_quantizer"
    source[f"{quantizer}/intervals"] = np.zeros(15, np.float32)
    _, report = start.take(source, abstract, program)
    new = [path for path in report.new if path in abstract.params]
    assert sorted(p.rpartition("/")[0] for p in new) == [quantizer] * 4
    np.savez(tmp_path / "file.npz", **source)
    stale = {}
    for batches in (0, 2):
        given = small_run(
            "method=uniq_n2uq,weight_bits=2,activation_bits=2",
            init_from=str(tmp_path / "file.npz"),
            quantized__calibration_batches=batches,
        )
        stale[batches] = handover.of_run(given, tmp_path)["quantized"].stale
    assert stale[0] == frozenset()
    assert stale[2] == quantizers_of(run, phase).keys()


def test_the_phase_that_trained_a_checkpoint_is_found(tmp_path):
    phases = [{"name": "float", "method": "float"}, {"name": "w4a4", "method": "uniq"}]
    (tmp_path / "config.json").write_text(json.dumps({"phases": phases}))
    for name in ("float", "w4a4"):
        (tmp_path / name / "best" / "12").mkdir(parents=True)
    found = sources.locate(str(tmp_path), key="config.init_from")
    assert found == tmp_path / "w4a4" / "best"
    assert sources.trained_by(found)["method"] == "uniq"
    first = sources.locate(str(tmp_path), key="config.init_from", phases=("float",))
    assert sources.trained_by(first)["method"] == "float"
    assert sources.locate(str(tmp_path / "float"), key="config.init_from") == first
    (tmp_path / "config.json").write_text("[]")
    assert sources.trained_by(found) is None


RESNET = 'config.model.name = "resnet8"\n    config.model.options = {"width": 4}'


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(NETWORK + CONFIG.replace(RESNET, 'config.model.name = "small"'))
    return path


# What the phase that is interrupted follows besides, so that it is resumed too.
OSCILLATION = tuple(
    f"--config.w4a4.oscillation.{option}"
    for option in ("measure", "damping=0.01", "freeze_threshold=0.001", "momentum=0.5")
)


@pytest.mark.slow
@pytest.mark.parametrize("method", WIDTHS)
def test_one_command_goes_down_from_width_to_width_and_resumes(
    method, config_file, tmp_path, run_main
):
    arg = f"method={method},curriculum={WIDTHS[method]},epochs=4,float_epochs=1"
    spec = c.run_spec(get_config(arg))
    names = [phase.name for phase in spec.phases]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = run_main(f"--config={config_file}:{arg}", f"--workdir={undisturbed}", *OSCILLATION)
    assert process.returncode == 0, process.stderr
    output = process.stdout
    positions = [output.index(f"{name}: starts from trained parameters") for name in names[1:]]
    assert positions == sorted(positions)
    result = json.loads((undisturbed / "result.json").read_text())
    steps = 5 * sum(phase.total_epochs for phase in spec.phases)
    assert (result["weight_bits"], result["activation_bits"], result["steps"]) == (2, 2, steps)
    report = json.loads((undisturbed / "w2a2" / "start.json").read_text())
    assert report["left_over"] == []
    assert "conv2/kernel" in report["taken"]
    assert "conv2/activation_quantizer/" in "".join(report["new"])
    assert ("fc/activation_quantizer/step" in report["taken"]) == (method != "n2uq")
    arrays = read_model(undisturbed / "w2a2" / "checkpoints")
    if "n2uq" in method:
        assert arrays["conv2/activation_quantizer/intervals"].shape == (3,)

    # As if it had been killed between the last two checkpoints of the middle phase.
    shutil.copytree(undisturbed, killed)
    (killed / "result.json").unlink()
    shutil.rmtree(killed / "w2a2")
    steps = json.loads((killed / "w4a4" / "outcome.json").read_text())["steps"]
    (killed / "w4a4" / "outcome.json").unlink()
    shutil.rmtree(killed / "w4a4" / "checkpoints" / str(steps))
    process = run_main(f"--config={config_file}:{arg}", f"--workdir={killed}", *OSCILLATION)
    assert process.returncode == 0, process.stderr
    assert "w4a4: resumes at step 4 of" in process.stdout
    assert "of the weights oscillate (frequency above 0.005)" in " ".join(process.stdout.split())
    assert read_metrics(killed) == read_metrics(undisturbed)
    again = read_model(killed / "w2a2" / "checkpoints")
    assert again.keys() == arrays.keys()
    for path in arrays:
        assert again[path].tobytes() == arrays[path].tobytes(), path
