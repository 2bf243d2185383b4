"""Names, layouts and files of PyTorch's networks."""

import numpy as np
import pytest

from uniq_jax import interop


def test_names_and_layouts():
    rng = np.random.default_rng(0)
    state_dict = {
        "module.conv1.weight": rng.normal(size=(8, 3, 5, 4)),
        "layer1.0.conv1d.weight": rng.normal(size=(8, 3, 5)),
        "layer1.0.conv3d.weight": rng.normal(size=(8, 3, 5, 4, 2)),
        "layer1.0.bn1.weight": rng.normal(size=8),
        "layer1.0.bn1.bias": rng.normal(size=8),
        "layer1.0.bn1.running_mean": rng.normal(size=8),
        "layer1.0.bn1.running_var": rng.normal(size=8),
        "layer1.0.bn1.num_batches_tracked": np.array(7),
        "fc.weight": rng.normal(size=(10, 64)),
        "fc.bias": rng.normal(size=10),
        "scalar": np.array(2.0),
    }
    found = interop.from_torch_names(state_dict)
    assert {path: value.shape for path, value in found.items()} == {
        "conv1/kernel": (5, 4, 3, 8),
        "layer1/0/conv1d/kernel": (5, 3, 8),
        "layer1/0/conv3d/kernel": (5, 4, 2, 3, 8),
        "layer1/0/bn1/scale": (8,),
        "layer1/0/bn1/bias": (8,),
        "layer1/0/bn1/mean": (8,),
        "layer1/0/bn1/var": (8,),
        "fc/kernel": (64, 10),
        "fc/bias": (10,),
        "scalar": (),
    }
    kernel = state_dict["module.conv1.weight"]
    assert found["conv1/kernel"][4, 2, 1, 7] == kernel[7, 1, 4, 2]
    kernel = state_dict["layer1.0.conv3d.weight"]
    assert found["layer1/0/conv3d/kernel"][4, 2, 1, 0, 7] == kernel[7, 0, 4, 2, 1]
    assert found["fc/kernel"][5, 3] == state_dict["fc.weight"][3, 5]


def test_a_convolution_gives_what_pytorch_defines():
    """out[o, y, x] = Σ w[o, c, i, j] · in[c, y + i, x + j], spelled out."""
    import jax.numpy as jnp
    from flax import nnx

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 2, 3))
    image = rng.normal(size=(3, 5, 6))
    windows = np.lib.stride_tricks.sliding_window_view(image, (2, 3), axis=(1, 2))
    expected = np.einsum("cyxij,ocij->oyx", windows, weight)
    layer = nnx.Conv(3, 4, (2, 3), padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
    kernel = interop.from_torch_names({"weight": weight})["kernel"]
    layer.kernel[...] = jnp.asarray(kernel, jnp.float32)
    found = layer(jnp.asarray(image.transpose(1, 2, 0)[None], jnp.float32))[0]
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected, rtol=0, atol=1e-5)


def test_files_with_names_of_either_kind(tmp_path):
    matrix = np.arange(6.0).reshape(2, 3)
    np.savez(tmp_path / "torch.npz", **{"fc.weight": matrix, "fc.bias": np.ones(2)})
    np.savez(tmp_path / "ours.npz", **{"fc/kernel": matrix.T, "fc/bias": np.ones(2)})
    np.savez_compressed(tmp_path / "dotted.npz", **{"block.a/kernel": matrix})
    np.savez(tmp_path / "flat.npz", kernel=matrix)
    for name in ("torch", "ours"):
        found = interop.read_npz(tmp_path / f"{name}.npz")
        assert found.keys() == {"fc/kernel", "fc/bias"}
        np.testing.assert_array_equal(found["fc/kernel"], matrix.T)
    np.testing.assert_array_equal(
        interop.read_npz(tmp_path / "dotted.npz")["block.a/kernel"], matrix
    )
    np.testing.assert_array_equal(interop.read_npz(tmp_path / "flat.npz")["kernel"], matrix)


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "trap.npz", x=np.array([Trap(tmp_path / "sprung")], object))
    with pytest.raises(ValueError, match=r"trap\.npz is no \.npz file of plain arrays"):
        interop.read_npz(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_none(tmp_path):
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("one.npy", "text.npz", "empty.npz"):
        with pytest.raises(ValueError, match=rf"{name} is no \.npz file"):
            interop.read_npz(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        interop.read_npz(tmp_path / "missing.npz")


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
            found = interop.read_npz(tmp_path / "bad.npz")
        except ValueError as error:
            assert "is no .npz file of plain arrays" in str(error)  # noqa: PT017
            refused += 1
        else:
            for array in found.values():
                np.testing.assert_array_equal(array, values)
    assert refused > len(damaged) / 2
