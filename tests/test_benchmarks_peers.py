"""The comparison with other libraries, as far as they are installed."""

import importlib.util
import json
import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("qwix_layer", "qwix_layer_w8a8"),
        ("brevitas_layer", "brevitas_layer_w4a4"),
        pytest.param("brevitas_network", "brevitas_network_w4a4", marks=pytest.mark.slow),
    ],
)
def test_small_ones_are_compared(name, figures, tmp_path):
    library = name.partition("_")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; `make peers` has an environment with it")
    path = tmp_path / "results.json"
    sizes = ["--turns=1", "--pixels=4", "--layer_batch=1", "--batch=2", f"--results={path}"]
    command = [sys.executable, str(BENCHMARKS / "peers" / "compare.py"), name, *sizes]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    rows = {row["name"]: row["value"] for row in json.loads(path.read_text())}
    assert set(rows) == {
        f"{figures}_{over}" for over in ("over_ours", "over_float", "ours_over_float")
    }
    assert min(rows.values()) > 0
    if library == "qwix":
        assert "qwix_layer_w4a4: qwix does not run" in process.stdout
