"""PyTorch's layouts, and .npz files that are damaged or hostile."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import interop, models
from uniq_jax.nn import QuantLinear, UniqWeight


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


def test_a_model_that_is_one_layer_has_pytorchs_layouts():
    weight = np.arange(9, dtype=np.float32).reshape(3, 3)
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    interop.load_torch_state_dict(model, {"weight": weight, "bias": np.zeros(3)}, strict=True)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(model(x), weight @ x)
    np.testing.assert_array_equal(interop.to_torch_state_dict(model)["weight"], weight)
    grouped = nnx.Conv(4, 6, (3, 5), feature_group_count=2, rngs=nnx.Rngs(0))
    assert interop.to_torch_state_dict(grouped)["weight"].shape == (6, 2, 3, 5)
    quantized = QuantLinear(3, 4, weight=UniqWeight(2, "channel"), rngs=nnx.Rngs(0))
    shapes = {n: a.shape for n, a in interop.to_torch_state_dict(quantized).items()}
    assert shapes["weight"] == (4, 3)
    assert shapes["weight_quantizer.step"] == (4, 1)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_transposed_convolution_gives_what_pytorch_defines(stride, transpose_kernel):
    """out[o, s·i + k] += w[c, o, k] · in[c, i], spelled out."""
    rng = np.random.default_rng(0)
    weight, image = rng.normal(size=(3, 4, 2, 3)), rng.normal(size=(3, 5, 6))
    expected = np.zeros((4, 4 * stride + 2, 5 * stride + 3))
    for i, j in np.ndindex(5, 6):
        part = np.tensordot(image[:, i, j], weight, (0, 0))
        expected[:, i * stride : i * stride + 2, j * stride : j * stride + 3] += part
    model = nnx.ConvTranspose(
        3,
        4,
        (2, 3),
        strides=stride,
        padding="VALID",
        use_bias=False,
        transpose_kernel=transpose_kernel,
        rngs=nnx.Rngs(0),
    )
    interop.load_torch_state_dict(model, {"weight": weight}, strict=True)
    written = interop.to_torch_state_dict(model)["weight"]
    np.testing.assert_array_equal(written, weight.astype(np.float32))
    found = model(jnp.asarray(image.transpose(1, 2, 0)[None], jnp.float32))[0]
    rows, columns = expected.shape[1:]
    found = np.moveaxis(found, -1, 0)[:, :rows, :columns]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


class TwoWeights(nnx.Module):
    def __init__(self):
        self.kernel, self.scale = nnx.Param(jnp.ones((2, 3))), nnx.Param(jnp.zeros(3))
        self.bias = nnx.Param(jnp.ones(3))


def test_parameters_that_would_have_one_name_keep_their_own():
    model = TwoWeights()
    written = interop.to_torch_state_dict(model)
    assert {n: a.shape for n, a in written.items()} == {
        "kernel": (3, 2),
        "scale": (3,),
        "bias": (3,),
    }
    written["scale"] = np.full(3, 7, np.float32)
    interop.load_torch_state_dict(model, written, strict=True)
    np.testing.assert_array_equal(model.scale[...], 7)


class Derived(models.ResNet):
    """A class of a user's own."""


def test_a_class_derived_from_a_network_has_its_names():
    model = models.create("resnet18", num_classes=3, rngs=nnx.Rngs(0))
    wanted = interop.to_torch_state_dict(model)
    model.__class__ = Derived
    assert interop.to_torch_state_dict(model).keys() == wanted.keys()
    assert "layer2.0.downsample.0.weight" in wanted


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((2, 2), jnp.bfloat16).view("V2"), "of bfloat16"),
        (np.ones((2, 2), np.complex64), "complex64"),
        (np.ones((2, 2), np.int8), "int8"),
    ],
)
def test_numbers_of_another_kind_are_an_error_and_change_nothing(value, message):
    model = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2)])
    before = interop.to_torch_state_dict(model)
    arrays = {"0.weight": np.full((2, 2), 7.0), "1.weight": value}
    with pytest.raises(ValueError, match=rf"state_dict\['1\.weight'\] has dtype .*{message}"):
        interop.load_torch_state_dict(model, arrays)
    for name, array in interop.to_torch_state_dict(model).items():
        np.testing.assert_array_equal(array, before[name])


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
