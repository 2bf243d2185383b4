"""Fixtures that several test files share."""

import os
import pathlib
import subprocess
import sys

import pytest


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
