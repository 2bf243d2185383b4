"""The scripts in launch/: what they would run, what they refuse, and sweeps of tiny runs."""

import csv
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
PYTHON = "/opt/py thon"

# Script → options that are enough for it.
ENOUGH = {
    "local_processes.sh": ["--processes=2"],
    "tpu_vm.sh": ["--name=pod", "--zone=here-1"],
    "slurm.sh": ["--nodes=2", "--gpus-per-node=4"],
    "kubernetes.sh": [
        "--name=run-1",
        "--image=registry/image:1",
        "--pods=2",
        "--gpus-per-pod=8",
        "--claim=disk",
    ],
}
ARGUMENTS = ["--config=configs/a.py:bits=2", "--workdir=/runs/a b"]


def run(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={**os.environ, "PYTHON": PYTHON, "GLIBC_TUNABLES": "x=1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def dry_run(script, *options, **environment):
    """The command that a script would run, as a list of words."""
    process = run(script, "--dry-run", *options, "--", *ARGUMENTS, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    files = [str(LAUNCH / name) for name in SCRIPTS]
    process = subprocess.run(
        ["shellcheck", *files, str(ROOT / ".ci" / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script):
    process = run(script, "--help")
    assert process.returncode == 0
    assert process.stdout.startswith(f"Usage: launch/{script}")
    text = (LAUNCH / script).read_text()
    for option in [line.split(")")[0].strip(" *=") for line in text.splitlines() if " --" in line]:
        if option.startswith("--") and " " not in option:
            assert option in process.stdout, option


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_given_is_an_error(script):
    process = run(script)
    assert process.returncode == 2
    assert process.stderr


@pytest.mark.parametrize("script", ENOUGH)
def test_every_missing_option_is_named(script):
    for left_out in ENOUGH[script]:
        process = run(script, *(o for o in ENOUGH[script] if o != left_out), "--", *ARGUMENTS)
        assert process.returncode == 2
        assert f"{left_out.partition('=')[0]} must be given" in process.stderr
    process = run(script, *ENOUGH[script])
    assert process.returncode == 2
    assert "arguments of uniq_jax.main are missing" in process.stderr
    process = run(script, *ENOUGH[script], "--nods=3", "--", *ARGUMENTS)
    assert process.returncode == 2
    assert "unknown option '--nods=3'" in process.stderr


def test_local():
    process = run("local.sh", "--dry-run", *ARGUMENTS)
    assert shlex.split(process.stdout) == [PYTHON, "-m", "uniq_jax.main", *ARGUMENTS]


def test_local_processes():
    output = dry_run("local_processes.sh", "--processes=2", "--port=9")
    lines = [shlex.split(line) for line in output.splitlines()]
    assert lines == [
        [
            *("env", "GLIBC_TUNABLES=x=1", f"JAX_LOCAL_DEVICE_IDS={i}"),
            *(PYTHON, "-m", "uniq_jax.main", *ARGUMENTS),
            *("--coordinator=127.0.0.1:9", "--num_processes=2", f"--process_id={i}"),
        ]
        for i in range(2)
    ]
    output = dry_run("local_processes.sh", "--processes=1", "--cpu-devices=3", XLA_FLAGS="--a")
    words = shlex.split(output)
    assert words[2:4] == [
        "JAX_PLATFORMS=cpu",
        "XLA_FLAGS=--a --xla_force_host_platform_device_count=3",
    ]
    words = shlex.split(dry_run("local_processes.sh", "--processes=1", GLIBC_TUNABLES=""))
    assert "glibc.malloc.mmap_max=0" in words[1].partition("=")[2].split(":")


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [((0, 0), 0), ((0, 7), 7), ((5, 0), 5), ((69, 1), 1), ((1, 134), 1), ((134, 0), 134)],
)
def test_local_processes_ends_as_the_one_that_failed(codes, wanted, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *process_id=0*) exit {codes[0]};; esac\nexit {codes[1]}\n'
    )
    fake.chmod(0o755)
    process = run("local_processes.sh", "--processes=2", "--", *ARGUMENTS, PYTHON=str(fake))
    assert process.returncode == wanted


def test_tpu_vm():
    words = shlex.split(
        dry_run("tpu_vm.sh", *ENOUGH["tpu_vm.sh"], "--project=p", "--directory=~/my x")
    )
    assert words[:-1] == [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=here-1", "--worker=all"),
        "--project=p",
    ]
    name, _, remote = words[-1].partition("=")
    assert name == "--command"
    there = shlex.split(remote)
    assert there[:2] == ["cd", "my x"]
    assert there[4:] == [".venv/bin/python", "-m", "uniq_jax.main", *ARGUMENTS]


def test_slurm():
    words = shlex.split(dry_run("slurm.sh", *ENOUGH["slurm.sh"], "--sbatch=--time=1:00"))
    assert words[:-1] == [
        *("sbatch", "--job-name=uniq_jax", "--nodes=2", "--ntasks-per-node=4"),
        *("--gpus-per-node=4", f"--chdir={ROOT}", "--time=1:00"),
    ]
    name, _, wrapped = words[-1].partition("=")
    assert name == "--wrap"
    assert shlex.split(wrapped) == [
        *("srun", "--kill-on-bad-exit=1", PYTHON, "-m", "uniq_jax.main", *ARGUMENTS),
    ]


def test_arguments_reach_a_plain_shell_as_they_are(tmp_path):
    """Of another alphabet than the locale's, with quotes, and of two lines."""
    words = ["--workdir=runs/größe", "it's", "two\nlines", r"\1 $HOME `x` & \ ''"]
    print_words = '#!/bin/sh\nprintf "%s\\0" "$@"\n'
    give_last = '#!/bin/sh\nfor last; do :; done\nexec sh -c "${last#--*=}"\n'
    fakes = {"sbatch": give_last, "gcloud": give_last, "srun": print_words}
    for name, text in {**fakes, "it is/.venv/bin/python": print_words}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for script, more in (("slurm.sh", []), ("tpu_vm.sh", [f"--directory={tmp_path}/it is"])):
        process = run(script, *ENOUGH[script], *more, "--", *words, LC_ALL="C", PATH=path)
        assert process.returncode == 0, process.stderr
        assert process.stdout.split("\0")[-5:-1] == words, script


def test_kubernetes():
    process = run(
        "kubernetes.sh",
        "--dry-run",
        *ENOUGH["kubernetes.sh"],
        "--",
        *ARGUMENTS,
        r'--x="&" @NAME@ \n',
    )
    assert process.returncode == 0, process.stderr
    jobset = yaml.safe_load(process.stdout)
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "run-1")
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (2, 2)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry/image:1"
    assert container["args"] == [*ARGUMENTS, r'--x="&" @NAME@ \n']
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment == {
        "JAX_COORDINATOR_ADDRESS": "run-1-workers-0-0.run-1:8476",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": None,  # From the pod's index.
    }
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    process = run("kubernetes.sh", *ENOUGH["kubernetes.sh"][1:], "--name=Run_1", "--", *ARGUMENTS)
    assert process.returncode == 2
    assert "--name must be given, in lower case" in process.stderr


def test_what_is_run_is_what_the_dry_run_printed(tmp_path):
    """gcloud, sbatch and kubectl are stood in for by a script that writes down what it gets."""
    for name in ("gcloud", "sbatch", "kubectl"):
        fake = tmp_path / name
        fake.write_text(
            f'#!/bin/sh\nprintf "%s\\0" {name} "$@"\ncase {name} in kubectl) cat;; esac\n'
        )
        fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for script in ("tpu_vm.sh", "slurm.sh"):
        process = run(script, *ENOUGH[script], "--", *ARGUMENTS, PATH=path)
        printed = shlex.split(dry_run(script, *ENOUGH[script]))
        assert process.stdout.split("\0")[:-1] == printed
    process = run("kubernetes.sh", *ENOUGH["kubernetes.sh"], "--", *ARGUMENTS, PATH=path)
    printed = dry_run("kubernetes.sh", *ENOUGH["kubernetes.sh"])
    assert process.stdout == "kubectl\0apply\0-f\0-\0" + printed


# Sweeps


def load_sweep():
    spec = importlib.util.spec_from_file_location("launch_sweep", LAUNCH / "sweep.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(LAUNCH))  # As it is for a script.
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(LAUNCH))
    return module


sweep = load_sweep()

CONFIG = """
from uniq_jax import config as c

def get_config(arg=None):
    config = c.base()
    config.seed = c.parse_arg(arg, seed=0, bits=2).seed
    config.phases = ("float",)
    config.float = c.phase("float", total_epochs=1.0)
    return config

def sweep(add):
    add(seed=1)
    add(**{"seed": 2, "float.optimizer.name": "adam"})
    add(**{"seed": 3, "data.train_split": "train[:50%]"})
"""

# In place of `python -m uniq_jax.main`: writes a result, or fails where the workdir says seed 2.
FAKE = """#!/bin/sh
for argument; do case "$argument" in --workdir=*) workdir="${argument#*=}";; esac; done
echo "$@" >> "$LOG"
case "$workdir" in *seed=2*) [ -e "$LOG.mended" ] || exit 3;; esac
mkdir -p "$workdir"
echo '{"test_accuracy": 0.5, "best_accuracy": 0.625, "float_accuracy": null,
 "packed_bytes": 1234, "steps": 10, "seconds": 1.5, "seed": 1}' > "$workdir/result.json"
"""


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """A config file, a directory, and a log of the commands that were run."""
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path


def arguments(swept, *more, arg=""):
    return [f"--config={swept / 'small.py'}{arg}", f"--workdir={swept / 'runs'}", *more]


def test_a_sweep_goes_on_after_a_failure_and_skips_what_is_finished(swept, capfd):
    assert sweep.main(arguments(swept, "--", "--config.tensorboard=False", arg=":bits=1")) == 1
    output = capfd.readouterr()
    names = ["seed=1", "seed=2,float.optimizer.name=adam", "seed=3,data.train_split=train-50-"]
    assert f"run {names[1]} failed with exit code 3" in output.err
    lines = (swept / "log").read_text().splitlines()
    config = f"--config={swept / 'small.py'}:bits=1,"
    assert [line.split() for line in lines] == [
        [
            *("-m", "uniq_jax.main", f"{config}seed={seed}", f"--workdir={workdir}", *more),
            "--config.tensorboard=False",
        ]
        for seed, workdir, more in (
            (1, swept / "runs" / names[0], []),
            (2, swept / "runs" / names[1], ["--config.float.optimizer.name=adam"]),
            (3, third_directory(swept), ["--config.data.train_split=train[:50%]"]),
        )
    ]
    with open(swept / "runs" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["test_accuracy"] for row in rows] == ["0.5", "", "0.5"]
    assert rows[1]["run"] == names[1]
    assert "50.00%" in output.out
    # Again: only what had failed.
    (swept / "log.mended").touch()
    assert sweep.main(arguments(swept)) == 0
    assert len((swept / "log").read_text().splitlines()) == 4
    assert "[1/3] seed=1: finished" in capfd.readouterr().out
    table = (swept / "runs" / "sweep.md").read_text()
    assert f"| {names[1]} | 50.00% | 62.50% | - | 1,234 | 10 | 2 |" in table


def test_runs_at_a_time_have_logs_of_their_own(swept, capfd):
    # Each waits for the other, so that one after another they would never end.
    (swept / "python").write_text(
        '#!/bin/sh\nfor a; do case "$a" in --workdir=*) d="${a#*=}";; esac; done\n'
        'touch "$d/began"; echo "trains $d"; i=0\n'
        'while [ "$(ls "$d"/../*/began | wc -l)" -lt 2 ]; do\n'
        "    i=$((i + 1)); [ $i -lt 600 ] || exit 1; sleep 0.1\n"
        "done\n"
    )
    assert sweep.main(arguments(swept, "--jobs=2")) == 0
    output = capfd.readouterr().out
    assert "[1/3] seed=1: see" in output
    assert "[3/3] seed=3" in output
    assert "trains" not in output
    log = third_directory(swept) / "log.txt"
    assert log.read_text() == f"trains {third_directory(swept)}\n"
    with pytest.raises(SystemExit):
        sweep.main(arguments(swept, "--jobs=0"))
    assert "--jobs (=0) must be at least 1" in capfd.readouterr().err


@pytest.mark.parametrize(("codes", "wanted"), [((75, 0, 75), 75), ((75, 3, 0), 1)])
def test_a_sweep_tells_what_was_stopped_from_what_failed(codes, wanted, swept, capfd):
    cases = "".join(f"*seed={i}*) exit {code};; " for i, code in enumerate(codes, start=1))
    (swept / "python").write_text(f'#!/bin/sh\ncase "$*" in {cases}esac\n')
    assert sweep.main(arguments(swept)) == wanted
    lines = capfd.readouterr().err.splitlines()
    assert "sweep.py: run seed=1 is not finished" in lines
    assert any("failed" in line for line in lines) == (wanted == 1)
    assert any("same command goes on" in line for line in lines) == (wanted == 75)


def third_directory(swept):
    (directory,) = (swept / "runs").glob("seed=3*")
    return directory


def test_a_dry_run_prints_the_commands_and_writes_nothing(swept, capsys):
    assert sweep.main(arguments(swept, "--dry-run")) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert lines[1][1:] == [
        *("-m", "uniq_jax.main", f"--config={swept / 'small.py'}:seed=2"),
        f"--workdir={swept / 'runs' / 'seed=2,float.optimizer.name=adam'}",
        "--config.float.optimizer.name=adam",
    ]
    assert not (swept / "runs").exists()
    assert not (swept / "log").exists()


def test_collect_runs_nothing(swept, capsys):
    directory = swept / "runs" / "seed=1"
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps({"test_accuracy": 0.25, "new_field": 1}))
    assert sweep.main(arguments(swept, "--collect")) == 0
    assert "25.00%" in capsys.readouterr().out
    assert not (swept / "log").exists()


def test_a_job_array_runs_what_is_not_finished(swept, capsys):
    (swept / "runs" / "seed=1").mkdir(parents=True)
    (swept / "runs" / "seed=1" / "result.json").write_text("{}")
    script = swept / "array.sh"
    assert sweep.main(arguments(swept, f"--slurm={script}")) == 0
    assert "wrote 2 of 3 runs" in capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in script.read_text()
    assert not (swept / "log").exists()
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    process = subprocess.run(["bash", str(script)], env=environment, check=False)
    assert process.returncode == 0
    assert "--config.data.train_split=train[:50%]" in (swept / "log").read_text()
    assert (third_directory(swept) / "result.json").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add(seed=1)\n    add(seed=1)", "adds {'seed': 1} twice"),
        (
            "add(**{'a.b': 1})\n    add(**{'a.b': '1'})",
            "adds two runs that are both called 'a.b=1'",
        ),
        ("pass", "adds no run"),
        ("add(sead=1)", "run sead=1: config argument sead is no known key; did you mean 'seed'"),
        ("add(**{'float.epochs': 1})", "config.float.epochs is no known key"),
        ("add(**{'float.total_epochs': -1.0})", "config.float.total_epochs (=-1.0) must be above"),
        ("add(**{'data.batch_size': 'x'})", "run data.batch_size=x: "),
    ],
)
def test_a_bad_sweep_is_named_before_anything_runs(body, message, swept, capsys):
    text = CONFIG.partition("def sweep")[0] + f"def sweep(add):\n    {body}\n"
    (swept / "small.py").write_text(text)
    assert sweep.main(arguments(swept)) == 2
    assert message in capsys.readouterr().err
    assert not (swept / "log").exists()


def test_after_an_error_nothing_runs_on(tmp_path):
    """One of two commands is not there."""
    script = (
        f"touch {tmp_path}/began; trap 'touch {tmp_path}/ended; exit' TERM; while :; do :; done"
    )

    def began(name):
        while name == "b" and not (tmp_path / "began").exists():
            pass

    quiet = {"log": lambda name: None, "began": began, "ended": lambda name, status: None}
    commands = {"a": ["sh", "-c", script], "b": [str(tmp_path / "missing")]}
    with pytest.raises(FileNotFoundError):
        sweep.run_all(commands, jobs=2, **quiet)
    assert (tmp_path / "ended").exists()
    with pytest.raises(ValueError, match=r"jobs \(=0\) must be at least 1"):
        sweep.run_all(commands, jobs=0, **quiet)


def test_a_config_without_a_sweep_is_named(swept, capsys):
    (swept / "small.py").write_text(CONFIG.partition("def sweep")[0])
    assert sweep.main(arguments(swept)) == 2
    assert "has no sweep" in capsys.readouterr().err
    assert sweep.main(["--config=/no/such.py", f"--workdir={swept}"]) == 2
    assert "is not a file" in capsys.readouterr().err


def test_names_are_readable_and_differ():
    assert sweep.name_of({"seed": 1, "a.b": "x"}) == "seed=1,a.b=x"
    assert sweep.name_of({}) == "default"
    names = [sweep.name_of({"a": value}) for value in ("x/y", "x y", "..", "x" * 300, "x" * 301)]
    assert len(set(names)) == len(names)
    assert all(set("/ ").isdisjoint(name) and len(name) < 130 for name in names)


def test_the_sweep_of_a_shipped_config():
    process = subprocess.run(
        [
            *(sys.executable, str(LAUNCH / "sweep.py"), "--dry-run", "--workdir=runs/x"),
            "--config=configs/digits_w2a2.py",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 9
    assert "--config=configs/digits_w2a2.py:seed=2" in lines[-1]
    assert "--config.quantized.method=lsq" in lines[-1]
