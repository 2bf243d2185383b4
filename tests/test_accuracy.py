"""What the demo's networks reach, at least."""

import json
import statistics

import pytest

SEEDS = (0, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("digits_w2a2", 0.97), ("digits_w1a1", 0.93)])
def test_digits(name, least, tmp_path, run_main):
    accuracies = []
    for seed in SEEDS:
        workdir = tmp_path / str(seed)
        # Optimized programs, as a user's: this one trains for long.
        process = run_main(
            f"--config=configs/{name}.py:seed={seed}", f"--workdir={workdir}", env={"XLA_FLAGS": ""}
        )
        assert process.returncode == 0, process.stderr
        accuracies.append(json.loads((workdir / "result.json").read_text())["test_accuracy"])
    assert statistics.mean(accuracies) >= least
