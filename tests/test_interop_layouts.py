"""PyTorch's layouts, and .npz files that are damaged or hostile."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import interop


@pytest.mark.parametrize("window", [(3,), (2, 3), (2, 3, 2)])
def test_a_convolution_gives_what_pytorch_defines(window):
    """out[o, …] = Σ w[o, c, i, …] · in[c, … + i], spelled out."""
    rng = np.random.default_rng(0)
    rank = len(window)
    weight = rng.normal(size=(4, 3, *window))
    image = rng.normal(size=(3, 5, 6, 4)[: rank + 1])
    axes = tuple(range(1, rank + 1))
    windows = np.lib.stride_tricks.sliding_window_view(image, window, axis=axes)
    expected = np.tensordot(windows, weight, [(0, *range(-rank, 0)), (1, *range(2, rank + 2))])
    model = nnx.Sequential(
        nnx.Conv(3, 4, window, padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
    )
    interop.load_torch_state_dict(model, {"module.layers.0.weight": weight}, strict=True)
    found = model(jnp.asarray(np.moveaxis(image, 0, -1)[None], jnp.float32))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "trap.npz", x=np.array([Trap(tmp_path / "sprung")], object))
    with pytest.raises(ValueError, match=r"trap\.npz is no \.npz file of plain arrays"):
        interop.read_state_dict(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_none(tmp_path):
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("one.npy", "text.npz", "empty.npz"):
        with pytest.raises(ValueError, match=rf"{name} .*\.safetensors or \.npz"):
            interop.read_state_dict(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        interop.read_state_dict(tmp_path / "missing.npz")


@pytest.mark.filterwarnings("ignore")  # NumPy warns about some of the headers
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_an_error_of_one_kind(tmp_path, save):
    values = np.random.default_rng(0).normal(size=(30, 30))
    save(tmp_path / "good.npz", values=values)
    good = (tmp_path / "good.npz").read_bytes()
    damaged = [good[:length] for length in range(0, len(good), 97)]
    for i in (
        *range(0, 200, 3),
        *range(200, len(good) - 200, 499),
        *range(len(good) - 200, len(good), 3),
    ):
        damaged.append(good[:i] + bytes([good[i] ^ 0xFF]) + good[i + 1 :])
    refused = 0
    for content in damaged:
        (tmp_path / "bad.npz").write_bytes(content)
        try:
            # What was not hit (dates, attributes) may still be read, and is then right.
            found = interop.read_state_dict(tmp_path / "bad.npz")
        except ValueError as error:
            assert "bad.npz " in str(error)  # noqa: PT017
            refused += 1
        else:
            for array in found.values():
                np.testing.assert_array_equal(array, values)
    assert refused > len(damaged) / 2
