"""Fixtures that several test files share."""

import os
import pathlib
import subprocess
import sys

import pytest

# A script that needs PyTorch, and the files it made.
collect_ignore = ["data"]


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """The directory of real data for developing: UNIQ_JAX_SHARED, or ../shared of the repository.

    Skips the test where there is none.
    """
    named = os.environ.get("UNIQ_JAX_SHARED")
    root = pathlib.Path(named) if named else pathlib.Path(__file__).parents[2] / "shared"
    if not (root / "data" / "prepare_tfds.py").exists():
        pytest.skip(f"no real data: {root}/data/prepare_tfds.py is missing; set UNIQ_JAX_SHARED")
    return root


@pytest.fixture(scope="session")
def cifar10_dir(shared_dir, tmp_path_factory) -> pathlib.Path:
    """A `data_dir` with CIFAR-10 (and 100 images of ImageNet) prepared by TFDS; takes 15 s."""
    out = tmp_path_factory.mktemp("tfds")
    # In a process of its own: its builders have the names of sets that TFDS registers too.
    command = [sys.executable, str(shared_dir / "data" / "prepare_tfds.py"), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def quick_compilation(tmp_path_factory) -> dict[str, str]:
    """Environment of child processes: compiled programs are shared, and hardly optimized.

    Most of the time of a short training is compilation.
    """
    return {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }


@pytest.fixture
def run_main(quick_compilation):
    """Runs the command as a user does: `run_main("--config=…", env={…})`, a finished process.

    `prefix` is a command that runs the one that follows it.
    """

    def run(*arguments: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()):
        environment = {**os.environ, **quick_compilation, **(env or {})}
        command = [*prefix, sys.executable, "-m", "uniq_jax.main", *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=pathlib.Path(__file__).parents[1],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def kept_compilations(tmp_path_factory):
    """For small_runs in this process: what is compiled twice, as by a run that resumes, is kept."""
    import jax

    from uniq_jax.models import registry

    changes = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("kept")),
        "jax_persistent_cache_min_compile_time_secs": 0.05,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    registry.MODELS.pop("small", None)  # type: ignore[attr-defined]
