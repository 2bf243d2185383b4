"""Several processes over the loopback interface: they train as one does, and end together."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx
from small_runs import NETWORK, Small

from uniq_jax import interop
from uniq_jax.train import jobs, processes
from uniq_jax.train.checkpoints import read_model
from uniq_jax.train.logs import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
# What JAX's runtime aborts with when it notices a loss before the program does.
ABORTED = -signal.SIGABRT

CONFIG = f"""{NETWORK}
from uniq_jax import config as c

def get_config(arg=None):
    args = c.parse_arg(arg, teacher="", epochs=2.0, float=False)
    config = c.base()
    config.data.batch_size = 16
    config.data.eval_batch_size = 64
    config.data.train_split = "train[:32]"
    config.data.test_split = "test[:70]"
    config.data.augment = "crop"
    config.data.pad_pixels = 1
    config.model.name = "small"
    config.phases = ("quantized",)
    config.quantized = c.phase(
        "uniq_n2uq", weight_bits=2, activation_bits=2, total_epochs=args.epochs,
        calibration_batches=1, batch_norm_batches=1,
        optimizer={{"learning_rate": 0.01}},
        loss={{"teacher": args.teacher, "teacher_model": "small" if args.teacher else ""}},
    )
    if args.float:
        config.phases = ("float",)
        config.float = c.phase("float", total_epochs=args.epochs)
    config.init_from = args.teacher
    config.log_every_steps = 1
    config.layer_metrics_every_steps = 0
    config.checkpoint_every_steps = 1
    config.export.formats = ""
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    """A float network, which the runs start from and learn from."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: Small(num_classes=10, in_features=1, rngs=nnx.Rngs(0)))
    arrays = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape = variable.get_value().shape
        is_kernel = path[-1] == "kernel"
        scale = 1 / np.sqrt(np.prod(shape[:-1])) if is_kernel else 0.1
        values = scale * rng.standard_normal(shape) + (path[-1] in ("scale", "var"))
        arrays["/".join(map(str, path))] = np.abs(values) if path[-1] == "var" else values
    file = tmp_path_factory.mktemp("float") / "float.npz"
    interop.write_state_dict(file, {k: v.astype(np.float32) for k, v in arrays.items()})
    return file


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(count, program, *arguments, environment, devices=4):
    """Starts so many processes, `devices` CPU devices in all."""
    flags = f"{environment.get('XLA_FLAGS', '')} "
    flags += f"--xla_force_host_platform_device_count={devices // count}"
    environment = {**os.environ, **environment, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    where = []
    if count > 1:
        where = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [
                *(sys.executable, *program, *map(str, arguments), *where),
                *([f"--process_id={i}"] if count > 1 else []),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(children, timeout_s=300):
    """(exit code, stdout, stderr) of each."""
    try:
        return [
            (child.returncode, *output)
            for child in children
            for output in [child.communicate(timeout=timeout_s)]
        ]
    finally:
        for child in children:
            child.kill()
            child.wait()


MAIN = ("-m", "uniq_jax.main")


@pytest.fixture(scope="module")
def runs(config_file, float_file, tmp_path_factory, quick_compilation):
    """The same run in one process with four devices, and in two with two each."""
    found = []
    for count in (1, 2):
        workdir = tmp_path_factory.mktemp("run") / "run"
        children = start(
            count,
            MAIN,
            f"--config={config_file}:teacher={float_file}",
            f"--workdir={workdir}",
            environment=quick_compilation,
        )
        found.append((workdir, finish(children)))
    return found


def test_two_processes_train_as_one_does(runs):
    (one, ((code, _, errors),)), (two, children) = runs
    assert code == 0, errors
    assert [child[0] for child in children] == [0, 0], [child[2] for child in children]
    records = [read_metrics(workdir) for workdir in (one, two)]
    assert len(records[0]) == len(records[1]) == 6
    for a, b in zip(*records):
        assert a.keys() == b.keys()
        assert (a["phase"], a["step"]) == (b["phase"], b["step"])
        for key in a.keys() & {"loss", "gradient_norm", "test_loss", "test_count"}:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=f"{key} of {a['step']}")
    assert [r["test_count"] for r in records[1] if "test_count" in r] == [70, 70]
    # A checkpoint of two processes is read by one.
    arrays = [read_model(workdir / "quantized" / "checkpoints") for workdir in (one, two)]
    assert arrays[0].keys() == arrays[1].keys()
    for path, array in arrays[0].items():
        error = np.linalg.norm(array - arrays[1][path])
        assert error <= 1e-4 * max(float(np.linalg.norm(array)), 1), path


def test_process_0_alone_prints_and_writes(runs):
    (one, ((_, printed, _),)), (two, ((_, first, _), (_, second, errors))) = runs
    # But for what the library of collectives says, directly and unasked.
    assert not [line for line in second.splitlines() if "peer ranks" not in line]
    assert "error" not in errors
    for text in ("starts from trained parameters", "test accuracy", "weight bits"):
        assert text in first
        assert text in printed
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (one, two)]
    assert results[0]["steps"] == results[1]["steps"] == 4
    assert results[0]["packed_bytes"] == results[1]["packed_bytes"]
    names = [sorted(p.name for p in workdir.iterdir()) for workdir in (one, two)]
    assert names[0] == names[1]
    assert not [p for p in two.rglob("*") if "tmp" in p.name.lower()]


@pytest.mark.slow
def test_of_two_processes_the_first_freezes_the_network(
    runs, config_file, float_file, quick_compilation, tmp_path
):
    shutil.copytree(runs[1][0], workdir := tmp_path / "two")
    (workdir / "result.json").unlink()
    arguments = (f"--config={config_file}:teacher={float_file}", f"--workdir={workdir}")
    for mode in ("train", "export"):
        more = (f"--mode={mode}", "--config.export.formats=packed")
        children = start(2, MAIN, *arguments, *more, environment=quick_compilation)
        (code, printed, errors), (other, nothing, _) = finish(children)
        assert (code, other) == (0, 0), errors
        assert "mismatching codes: 0 of" in printed
        assert "codes" not in nothing
        result = json.loads((workdir / "result.json").read_text())
        assert result["mismatching_codes"] == 0
        assert (workdir / "export" / "model.safetensors").stat().st_size == result["file_bytes"]


@pytest.mark.slow
def test_a_finished_run_of_two_is_evaluated_by_two(
    runs, config_file, float_file, quick_compilation
):
    workdir, _ = runs[1]
    arguments = (f"--config={config_file}:teacher={float_file}", f"--workdir={workdir}")
    again = start(2, MAIN, *arguments, "--mode=eval", environment=quick_compilation)
    (code, printed, errors), (other, nothing, _) = finish(again)
    assert (code, other) == (0, 0), errors
    assert "test accuracy" not in nothing
    accuracy = json.loads((workdir / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy {100 * accuracy:.2f}%" in printed
    assert "on 70 examples" in printed


# A lost process


def lose(victim, config_file, workdir, environment, *arguments):
    """Kills one of two that train; returns the other's exit code, errors, and how long it took."""
    children = start(
        2,
        MAIN,
        f"--config={config_file}:epochs=10000,float",
        f"--workdir={workdir}",
        *("--config.checkpoint_every_steps=50", "--config.eval_every_epochs=10000.0", *arguments),
        environment=environment,
    )
    try:
        wait_for_training(workdir, children)
        children[victim].kill()
        started_s = time.monotonic()
        _, errors = children[1 - victim].communicate(timeout=170)
        return children[1 - victim].returncode, errors, time.monotonic() - started_s
    finally:
        finish(children)


def wait_for_training(workdir, children):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert all(child.poll() is None for child in children), finish(children)
        if (workdir / "metrics.jsonl").exists() and len(read_metrics(workdir)) >= 3:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not get that far in time")


def check_loss(code, errors, seconds, other):
    assert code in (processes.LOST_PROCESS_EXIT_CODE, ABORTED), errors
    if code == ABORTED:
        assert "another task died" in errors
    else:
        assert f"process {other}: error: another process of this job (of 2) has ended" in errors
        assert "goes on from the newest checkpoint" in errors
        assert "Traceback" not in errors
    assert seconds < 120


def test_a_lost_process_ends_the_others(config_file, tmp_path, quick_compilation):
    """The heartbeat's timeout is short here; the slow test has the default one."""
    found = lose(1, config_file, tmp_path / "run", quick_compilation, "--heartbeat_timeout_s=10")
    check_loss(*found, other=0)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_by_default(
    victim, config_file, tmp_path, quick_compilation
):
    check_loss(*lose(victim, config_file, tmp_path / "run", quick_compilation), other=1 - victim)


def test_what_counts_as_a_loss():
    import jax

    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert processes.is_loss(lost)
    own = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes")
    assert not processes.is_loss(own)
    assert not processes.is_loss(OSError("Connection reset by peer"))
    wrapped = OSError("cannot write a checkpoint")
    wrapped.__cause__ = lost
    assert processes.is_loss(wrapped)


# What they agree on

CHILD = """
import pathlib, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from uniq_jax.train import jobs, processes, sharding

options = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:])
root, me = pathlib.Path(options["root"]), int(options["process_id"])
processes._SEEN_WITHIN_S = 1.0
jobs.connect(jobs.find_job({}, coordinator=options["coordinator"], num_processes=2,
                                     process_id=me))

def caught(function, *args):
    try:
        function(*args)
    except (ValueError, OSError) as error:
        print(type(error).__name__, error, flush=True)
    else:
        raise AssertionError(function)

with processes.ends_together():
    assert processes.is_first() == (me == 0)
    assert processes.all_true(True)
    assert not processes.all_true(me == 0)
    assert processes.together(lambda: me) == me
    processes.make_workdir(root / "same", {"seed": 0})
    assert (root / "same").is_dir() and not list((root / "same").iterdir())
    caught(processes.make_workdir, root / f"own{me}", {"seed": 0})
    caught(processes.make_workdir, root / "same", {"seed": me})

    def broken():
        if me == 1:
            raise OSError("damaged")

    caught(processes.together, broken)
    processes.on_first((root / "done").touch)
    assert (root / "done").exists()

    mesh = sharding.create_mesh({"data": 2, "model": 2})
    assert [d.process_index for d in mesh.devices.ravel()] == [0, 0, 1, 1]
    processes.check_mesh(mesh)
    caught(processes.check_mesh, sharding.create_mesh({"data": 1, "model": 4}))
    value = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    replicated = sharding.put(value, sharding.replicated(mesh))
    assert (sharding.whole(replicated) == value).all()
    by_model = sharding.put(value, NamedSharding(mesh, P("model")))
    assert (sharding.whole(by_model) == value).all()
    assert sharding.whole(sharding.put(value, NamedSharding(mesh, P("data")))) is None
    processes.barrier("end")
    if me == 1:
        raise ValueError("its own mistake")
    processes.barrier("never")
"""


@pytest.mark.slow
def test_processes_agree_or_say_what_differs(tmp_path, quick_compilation):
    children = start(2, ("-c", CHILD), f"--root={tmp_path}", environment=quick_compilation)
    (first, printed, _), (second, other, errors) = finish(children)
    shared = f"ValueError workdir (={str(tmp_path / 'own0')!r}) must be a directory that all"
    assert shared in printed
    assert "process 1 does not see what process 0 wrote there" in printed
    assert "process 1 does not see what process 0 wrote there" in other
    for text in (printed, other):
        assert "that of process 1 differs from that of process 0" in text
        assert "config.mesh.model (=4) must divide the number of devices of each process" in text
    assert "OSError process 1 failed to read it" in printed
    assert "OSError damaged" in other
    # An error of one process ends it with its own message, and the other one too.
    assert second == 1
    assert "process 1: error: its own mistake" in errors
    assert first in (processes.LOST_PROCESS_EXIT_CODE, ABORTED)


# How they find each other

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
JOBSET = {
    "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, None),
        (SLURM, {}, jobs.Job(cluster="slurm")),
        ({**SLURM, "SLURM_NTASKS": "1"}, {}, None),
        # Within a batch script, but not a task of srun.
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, {}, None),
        (JOBSET, {}, jobs.Job("run-workers-0-0.run:8476", 4, 3)),
        ({**JOBSET, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, {}, None),
        ({**SLURM, **JOBSET}, {"mode": "off"}, None),
        (
            SLURM,
            {"coordinator": "h:1", "num_processes": 2, "process_id": 0},
            jobs.Job("h:1", 2, 0),
        ),
        ({}, {"coordinator": "h:1", "num_processes": 1, "process_id": 0}, None),
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "2"}, {},
         jobs.Job(cluster="ompi")),
        ({}, {"has_libtpu": True}, jobs.Job(cluster="gcetpu")),
        (NO_TPU, {"has_libtpu": True}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"has_libtpu": True}, jobs.Job(cluster="gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "a"}, {"has_libtpu": True}, None),
    ],
)  # fmt: skip
def test_the_job_is_found(environment, given, expected):
    assert jobs.find_job(environment, **given) == expected


@pytest.mark.parametrize(
    ("environment", "given", "message"),
    [
        ({}, {"coordinator": "h:1"}, "--num_processes and --process_id are missing"),
        ({}, {"num_processes": 2, "process_id": 0}, "--coordinator is missing"),
        ({}, {"coordinator": "h", "num_processes": 2, "process_id": 0}, "'h'\\) must be HOST:PORT"),
        (
            {},
            {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
            r"--process_id \(=2\) must be in 0..1",
        ),
        ({}, {"coordinator": "h:1", "mode": "off"}, "must not be given with --distributed=off"),
        ({"JAX_PROCESS_ID": "1"}, {}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are missing"),
        ({**JOBSET, "JAX_PROCESS_ID": "x"}, {}, r"JAX_PROCESS_ID \(='x'\) must be an integer"),
        ({**JOBSET, "JAX_PROCESS_ID": "4"}, {}, r"JAX_PROCESS_ID \(=4\) must be in 0..3"),
    ],
)
def test_what_is_given_in_part_or_wrong_is_named(environment, given, message):
    with pytest.raises(ValueError, match=message):
        jobs.find_job(environment, **given)


def test_a_short_heartbeat_is_refused():
    with pytest.raises(ValueError, match=r"--heartbeat_timeout_s \(=3\) must be at least 10"):
        jobs.connect(None, heartbeat_timeout_s=3)


def test_a_process_that_waits_for_the_others_says_so():
    program = "from uniq_jax.train import jobs; jobs._NOTICE_AFTER_S = 0.5; "
    program += f"jobs.connect(jobs.Job('127.0.0.1:{free_port()}', 2, 1))"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        line = child.stderr.readline()
        child.kill()
    assert "process 1: waits for the other processes of the job, to meet them at 127.0.0.1" in line


def test_flags_that_need_each_other_are_named(config_file, tmp_path, run_main):
    process = run_main(
        f"--config={config_file}", f"--workdir={tmp_path / 'run'}", "--coordinator=localhost:1"
    )
    assert process.returncode == 1
    assert "--num_processes and --process_id are missing" in process.stderr
    assert not (tmp_path / "run").exists()
