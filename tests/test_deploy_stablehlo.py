"""Programs that JAX runs without this package."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from frozen_networks import SHAPE, images, small

from uniq_jax import deploy
from uniq_jax.nn import N2uqActivation, N2uqWeight

# What somebody without this package has to write.
PROGRAM = """
import sys
import jax
import numpy as np
program = jax.export.deserialize(open("model.stablehlo", "rb").read())
logits = [program.call(images) for images in np.load("images.npy")]
np.save("logits.npy", np.stack(logits))
np.save("one.npy", program.call(np.load("images.npy")[0, :1]))
print(*program.platforms, *[name for name in sys.modules if name.startswith("uniq_jax")])
"""


@pytest.fixture(scope="module")
def network():
    return small(N2uqWeight(2), N2uqActivation(2))


def test_it_runs_in_a_process_without_the_package(network, tmp_path):
    batches = images(12).reshape(3, 4, *SHAPE)
    np.save(tmp_path / "images.npy", batches)
    deploy.export_stablehlo(network, tmp_path / "model.stablehlo")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cpu", "cuda", "tpu"]
    logits = np.load(tmp_path / "logits.npy")
    wanted = np.stack([jax.jit(network)(batch) for batch in batches])
    np.testing.assert_array_equal(logits, wanted)
    one = jax.jit(network)(batches[0, :1])
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy"), one)
    assert np.ptp(logits) > 0
    about = json.loads((tmp_path / "model.stablehlo.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["input"] == {"shape": [None, *SHAPE], "dtype": "float32"}
    assert about["output"]["shape"] == [None, 5]
    assert {"labels", "mean", "std", "resize_size"} <= about.keys()


def test_a_fixed_batch_is_the_only_one(network, tmp_path):
    path = tmp_path / "model.stablehlo"
    deploy.export_stablehlo(network, path, platforms=["cpu"], batch=2)
    program = jax.export.deserialize(path.read_bytes())
    assert program.platforms == ("cpu",)
    assert program.in_avals[0].shape == (2, *SHAPE)
    with pytest.raises(ValueError, match="shape"):
        program.call(np.zeros((3, *SHAPE), np.float32))


def test_what_cannot_be_exported_is_an_error(network, tmp_path):
    path = tmp_path / "model.stablehlo"
    with pytest.raises(ValueError, match=r"platforms \(=\('gpu',\)\) must be of 'cpu', 'cuda'"):
        deploy.export_stablehlo(network, path, platforms=["gpu"])
    with pytest.raises(ValueError, match=r"batch \(=0\) must be at least 1"):
        deploy.export_stablehlo(network, path, batch=0)
    with pytest.raises(FileNotFoundError):
        deploy.export_stablehlo(network, tmp_path / "missing" / "model.stablehlo")
    assert not list(tmp_path.iterdir())
