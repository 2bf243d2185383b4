"""CIFAR-10 from a prepared TFDS directory, from a float checkpoint, killed and resumed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from uniq_jax.train.logs import read_metrics

# Minutes each; `make cifar`.
pytestmark = [pytest.mark.data, pytest.mark.slow]

PART = (
    "--config.data.train_split=train[:2048]",
    "--config.data.test_split=test[:1000]",
    "--config.export.formats=",
)


@pytest.mark.parametrize(
    ("splits", "steps", "float_accuracy"),
    [
        pytest.param(PART, 32, 0.90, id="part"),
        # Half of the official test set; the checkpoint's figure is 91.30 %.
        pytest.param((), 780, 0.9130, id="whole"),
    ],
)
def test_two_epochs_killed_and_resumed_give_the_same_losses(
    splits, steps, float_accuracy, shared_dir, cifar10_dir, tmp_path
):
    def start(workdir):
        command = [
            *(sys.executable, "-m", "uniq_jax.main"),
            "--config=configs/cifar10_resnet20_w2a2.py:epochs=2",
            f"--config.data.data_dir={cifar10_dir}",
            f"--config.init_from={shared_dir}/data/weights/cifar10_resnet20.npz",
            f"--config.checkpoint_every_steps={steps // 5}",
            "--config.log_every_steps=1",
            "--config.quantized.calibration_batches=4",
            *splits,
        ]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=pathlib.Path(__file__).parents[1],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    process = start(undisturbed)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "0 others new; 0 left over" in " ".join(output.split())
    result = json.loads((undisturbed / "result.json").read_text())
    assert result["float_accuracy"] >= float_accuracy
    assert result["test_accuracy"] > 0.6
    assert result["float_bytes"] / result["packed_bytes"] > 12
    assert result["mismatching_codes"] == (0 if steps == 780 else None)

    process = start(disturbed)
    between_checkpoints = steps // 2
    deadline_s = time.monotonic() + 60 + 10 * steps
    while not (disturbed / "metrics.jsonl").exists() or not any(
        record["step"] >= between_checkpoints for record in read_metrics(disturbed)
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(disturbed)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "quantized: resumes at step" in output
    records = read_metrics(undisturbed)
    assert len([record for record in records if "loss" in record]) == steps
    assert read_metrics(disturbed) == records
