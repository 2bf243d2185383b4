"""Truncated and damaged files of every format: an error of one kind, whatever the damage."""

import collections
import io
import pathlib
import random
import zipfile

import numpy as np
import pytest

from uniq_jax import interop

FILES = sorted((pathlib.Path(__file__).parent / "data").glob("torch_*.p*"))


def written(directory: pathlib.Path) -> list[pathlib.Path]:
    """A file of each format that is written here."""
    paths = [directory / f"written{suffix}" for suffix in (".pth", ".safetensors", ".npz")]
    for path in paths:
        interop.write_state_dict(path, {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2, "f4")})
    return paths


def test_truncated_files(tmp_path):
    """Two small files at every byte, the others at every so many."""
    for whole in (*FILES, *written(tmp_path)):
        content = whole.read_bytes()
        is_dense = whole.name in ("torch_parameters_legacy.pth", "written.safetensors")
        for length in range(0, len(content), 1 if is_dense else 101):
            (tmp_path / "x").write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"x (is|has|begins)"):
                interop.read_state_dict(tmp_path / "x")


def damaged(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        i = rng.randrange(len(data) - 4)
        match rng.randrange(5):
            case 0 | 1:
                data[i] = rng.randrange(256)
            case 2:
                data[i : i + 4] = rng.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)))
            case 3:
                del data[i : i + rng.randrange(1, 4)]
            case 4:
                data[i:i] = data[i // 2 : i // 2 + rng.randrange(1, 60)]
    return bytes(data)


def damaged_pickle(content: bytes, rng: random.Random) -> bytes:
    """An archive whose checksums are right and whose pickle is damaged."""
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, damaged(data, rng) if name.endswith("data.pkl") else data)
    return copy.getvalue()


@pytest.mark.parametrize("damage", [damaged, damaged_pickle])
def test_damaged_files_are_an_error_of_one_kind(tmp_path, damage):
    """Or they are read: not every byte matters, and the old format has no checksums."""
    rng = random.Random(0)
    is_archive = damage is damaged_pickle
    wholes = [
        path for path in (*FILES, *written(tmp_path)) if not is_archive or path.suffix == ".pth"
    ]
    outcomes = collections.Counter()
    for whole in wholes:
        content = whole.read_bytes()
        if is_archive and not content.startswith(b"PK"):
            continue
        for _ in range(50):
            (tmp_path / "x").write_bytes(damage(content, rng))
            try:
                found = interop.read_state_dict(tmp_path / "x")
            except ValueError as error:
                assert str(error).startswith(f"{tmp_path / 'x'} ")  # noqa: PT017
                outcomes["refused"] += 1
            else:
                assert all(isinstance(array, np.ndarray) for array in found.values())
                outcomes["read"] += 1
    assert outcomes["refused"] > outcomes["read"] > 0
