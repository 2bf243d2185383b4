"""What the demo's networks reach; `make accuracy-digits` prints the README's table."""

import json
import statistics

import pytest

SEEDS = (0, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("digits_w2a2", 0.97), ("digits_w1a1", 0.93)])
def test_digits(name, least, tmp_path, run_main, capsys):
    results = []
    for seed in SEEDS:
        workdir = tmp_path / str(seed)
        # Optimized programs, as a user's: this one trains for long.
        process = run_main(
            f"--config=configs/{name}.py:seed={seed}", f"--workdir={workdir}", env={"XLA_FLAGS": ""}
        )
        assert process.returncode == 0, process.stderr
        results.append(json.loads((workdir / "result.json").read_text()))
    means = {
        key: statistics.mean(result[key] for result in results)
        for key in ("float_accuracy", "test_accuracy")
    }
    with capsys.disabled():
        print(
            f"\n| {name}, mean of seeds {SEEDS} | {100 * means['float_accuracy']:.2f}% "
            f"| {100 * means['test_accuracy']:.2f}% |"
        )
    assert means["test_accuracy"] >= least
