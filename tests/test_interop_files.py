"""State dicts from files of every format, and back.

PyTorch wrote those in tests/data; see make_torch_files.py there.
"""

import errno
import os
import pathlib
import tarfile
import zipfile

import numpy as np
import pytest

from uniq_jax import interop
from uniq_jax.interop.dtypes import DTYPES
from uniq_jax.train import start

DATA = pathlib.Path(__file__).parent / "data"
SUFFIXES = (".pth", "_legacy.pth")


def counting(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def assert_same(found, expected) -> None:
    """Names, dtypes, shapes and bits."""
    assert list(found) == list(expected)
    for name, array in found.items():
        assert (name, array.dtype) == (name, expected[name].dtype.newbyteorder("="))
        assert (name, array.shape) == (name, expected[name].shape)
        bits = expected[name].astype(array.dtype).tobytes()
        assert (name, array.tobytes()) == (name, bits)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_dtype(suffix):
    found = interop.read_state_dict(DATA / f"torch_dtypes{suffix}")
    assert found.keys() == DTYPES.keys() - {"float8_e8m0fnu"}  # which has no zero to begin with
    assert_same(found, {name: counting(2, 3).astype(DTYPES[name]) for name in found})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_views_of_a_shared_storage(suffix):
    found = interop.read_state_dict(DATA / f"torch_views{suffix}")
    base = counting(4, 6)
    expected = {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3, 1::2],
        "scalar": base[2, 3],
        "expanded": np.full((2, 3), base[0, 5]),
        "empty": base[:, :0],
        "channels_last": counting(1, 2, 3, 2),
    }
    assert_same(found, expected)
    assert np.shares_memory(found["base"], found["transposed"])
    with pytest.raises(ValueError, match="read-only"):
        found["base"][0] = 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_training_checkpoint(suffix):
    """Beside the state dict: an optimizer, a Namespace, NumPy scalars and arrays, and more."""
    expected = {
        "0.weight": counting(3, 2, 1, 2),
        "0.bias": counting(3),
        "1.weight": counting(3),
        "1.bias": counting(3),
        "1.running_mean": np.zeros(3, np.float32),
        "1.running_var": np.ones(3, np.float32),
        "1.num_batches_tracked": np.array(0),
    }
    assert_same(interop.read_state_dict(DATA / f"torch_checkpoint{suffix}"), expected)


@pytest.mark.parametrize("suffix", [*SUFFIXES, "_protocol4.pth"])
def test_parameters_under_net_and_a_numpy_array(suffix):
    found = interop.read_state_dict(str(DATA / f"torch_parameters{suffix}"))
    expected = {
        "weight": counting(2, 3),
        "frozen": counting(3),
        "tagged": counting(2),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
    }
    assert_same(found, expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_of_several_state_dicts_is_chosen_by_key(suffix):
    path = DATA / f"torch_several{suffix}"
    with pytest.raises(ValueError, match=r"several.*one of \['generator', 'discriminator'\]"):
        interop.read_state_dict(path)
    found = interop.read_state_dict(path, key="discriminator")
    assert_same(found, {"fc.weight": counting(2)})
    with pytest.raises(ValueError, match=r"under key \(='net'\); it has \['generator'"):
        interop.read_state_dict(path, key="net")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch_module.pth", r"object of type torch\.nn\.modules\.container\.Sequential"),
        ("torch_script.pt", r"is a TorchScript program; save its state_dict\(\)"),
        ("torch_sparse.pth", r"'fc\.weight' that is no dense tensor.*_rebuild_sparse_tensor"),
        ("torch_conj.pth", r"'fc\.weight' that is a conjugate or negative view"),
    ],
)
def test_what_is_no_plain_state_dict_is_named(name, message):
    with pytest.raises(ValueError, match=message) as error:
        interop.read_state_dict(DATA / name)
    assert str(error.value).startswith(str(DATA / name))


def test_files_in_no_known_format(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><html></html>")
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.add(DATA / "torch_views.pth", "storages")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme", "hello")
    for name, message in {
        "empty": r"is empty; .* \.safetensors or \.npz",
        "page": "begins with b'<!DOCTYPE",
        "old": "is in the tar format of early PyTorch; load it with PyTorch and save it again",
        "other": "is an archive with 0 files named data.pkl",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}\.pth {message}"):
            interop.read_state_dict(tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError):
        interop.read_state_dict(tmp_path / "missing.pth")


def samples() -> dict[str, np.ndarray]:
    """Arrays of every dtype and of several shapes, of random bits."""
    rng = np.random.default_rng(0)
    found = {}
    for name, dtype in DTYPES.items():
        for shape in ((), (0, 3), (5,), (2, 3, 4)):
            size = int(np.prod(shape)) * dtype.itemsize
            bits = rng.integers(0, 2 if name == "bool" else 256, size, np.uint8)
            found[f"{name}.{len(shape)}"] = bits.view(dtype).reshape(shape)
    found["é.transposed"] = rng.normal(size=(3, 4)).T
    found["big-endian"] = np.arange(4, dtype=">i4")
    found["file"] = np.ones(2)
    return found


# What a format can't hold; and whether it keeps the order.
@pytest.mark.parametrize(
    ("suffix", "is_refused", "is_ordered"),
    [
        (".pth", lambda dtype: False, True),
        (".pt", lambda dtype: False, True),
        (".pth.tar", lambda dtype: False, True),
        (".safetensors", lambda dtype: dtype == np.complex128, False),
        (".npz", lambda dtype: "float8" in dtype.name or dtype.name == "bfloat16", True),
    ],
)
def test_written_files_are_read_back_to_the_bit(tmp_path, suffix, is_refused, is_ordered):
    path = tmp_path / f"network{suffix}"
    fit = {}
    for name, array in samples().items():
        if is_refused(array.dtype):
            with pytest.raises(ValueError, match=f"{name!r} has dtype {array.dtype}, which"):
                interop.write_state_dict(path, {name: array})
        else:
            fit[name] = array
    assert not list(tmp_path.iterdir())
    interop.write_state_dict(path, fit)
    assert_same(interop.read_state_dict(path), fit if is_ordered else dict(sorted(fit.items())))
    first = path.read_bytes()
    interop.write_state_dict(path, fit)
    assert path.read_bytes() == first
    # The content decides, not the name.
    path = path.rename(tmp_path / "anything.bin")
    assert len(interop.read_state_dict(path)) == len(fit)


def test_what_cannot_be_written_is_named(tmp_path):
    one = np.ones(2)
    with pytest.raises(ValueError, match=r"path \(='.*x\.h5'\) must end in one of \.pth, \.pt"):
        interop.write_state_dict(tmp_path / "x.h5", {"weight": one})
    with pytest.raises(ValueError, match=r"state_dict \(=\{\}\) must have an array"):
        interop.write_state_dict(tmp_path / "x.pth", {})
    with pytest.raises(ValueError, match=r"'weight' has dtype object, which must be one of float"):
        interop.write_state_dict(tmp_path / "x.pth", {"weight": np.array([None])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"network{suffix}"
    interop.write_state_dict(path, {"weight": counting(2)})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        interop.write_state_dict(path, {"weight": counting(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    # Nor does one that succeeds write into it.
    monkeypatch.undo()
    with path.open("rb") as old:
        interop.write_state_dict(path, {"weight": counting(3)})
        assert old.read() == before
    assert interop.read_state_dict(path)["weight"].shape == (3,)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_the_prefix_of_data_parallel(tmp_path, suffix):
    path = tmp_path / f"network{suffix}"
    interop.write_state_dict(path, {"module.a.weight": counting(2), "module.module.b": counting(1)})
    assert list(interop.read_state_dict(path)) == ["a.weight", "module.b"]
    interop.write_state_dict(path, {"module.a.weight": counting(2), "other": counting(1)})
    assert list(interop.read_state_dict(path)) == ["module.a.weight", "other"]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_key_needs_a_file_with_dictionaries(tmp_path, suffix):
    path = tmp_path / f"network{suffix}"
    interop.write_state_dict(path, {"fc.weight": counting(2)})
    with pytest.raises(ValueError, match=r"has no dictionaries: key \(='net'\) must be None"):
        interop.read_state_dict(path, key="net")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_a_run_starts_from_any_of_these_files(tmp_path, suffix):
    path = tmp_path / f"network{suffix}"
    state_dict = {"fc.bias": counting(2), "fc.weight": counting(2, 3)}
    interop.write_state_dict(path, state_dict)
    assert_same(dict(sorted(start.read_source(str(path)).items())), state_dict)


def test_big_endian_storages(tmp_path):
    """As PyTorch writes them on such machines, whose `byteorder` says so."""
    state_dict = {name: a for name, a in samples().items() if a.dtype.kind in "fiV" and a.ndim}
    interop.write_state_dict(tmp_path / "little.pth", state_dict)
    arrays = list(state_dict.values())
    with (
        zipfile.ZipFile(tmp_path / "little.pth") as little,
        zipfile.ZipFile(tmp_path / "big.pth", "w") as big,
    ):
        for name in little.namelist():
            data = little.read(name)
            if "/data/" in name:
                item = arrays[int(name.rpartition("/")[2])].dtype.itemsize
                data = np.frombuffer(data, np.uint8).reshape(-1, item)[:, ::-1].tobytes()
            big.writestr(name, b"big" if name.endswith("byteorder") else data)
    assert_same(interop.read_state_dict(tmp_path / "big.pth"), state_dict)


def test_pytorch_agrees(tmp_path):
    """Where PyTorch is installed: the files as it reads them, and what is written here."""
    torch = pytest.importorskip("torch")

    def bits(tensor) -> bytes:
        flat = tensor.detach().contiguous().flatten()
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""

    # Not dtypes_legacy: PyTorch itself can't read unsigned integers from its old format.
    for name in ("dtypes", "views", "views_legacy"):
        path = DATA / f"torch_{name}.pth"
        theirs, ours = torch.load(path, weights_only=True), interop.read_state_dict(path)
        assert {k: bits(v) for k, v in theirs.items()} == {k: v.tobytes() for k, v in ours.items()}
    interop.write_state_dict(tmp_path / "ours.pth", samples())
    for is_mapped in (False, True):
        theirs = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=is_mapped)
        assert list(theirs) == list(samples())
        for name, array in samples().items():
            assert str(theirs[name].dtype) == f"torch.{array.dtype.name}"
            assert tuple(theirs[name].shape) == array.shape
            assert bits(theirs[name]) == array.astype(array.dtype.newbyteorder("<")).tobytes()
