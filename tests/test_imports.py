"""The rooms of the package, and which of them may import which."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "uniq_jax"

# Room → the rooms it may import beside itself. A new module at the top, or a new directory, is a
# room and needs a row.
BELOW_TRAIN = ("quantizers", "nn", "rules", "quantization", "models", "interop", "data", "spec")
ALLOWED_ROOMS = {
    "quantizers": (),
    "exact": (),
    "nn": ("quantizers", "exact"),
    "rules": ("nn", "quantizers"),
    "quantization": ("rules", "nn", "quantizers"),
    "linen": ("nn", "quantizers"),
    "qwix": ("linen", "quantization", "rules", "nn", "quantizers"),
    "summarize": ("quantization", "rules", "nn", "quantizers"),
    # A network of the papers is a float one and the rules of its method.
    "models": ("exact", "quantization", "rules", "nn"),
    "interop": ("models", "nn"),
    "data": (),
    "spec": (),
    "config": ("spec",),
    "curriculum": ("spec",),
    "recipes": ("config", "curriculum", "spec"),
    "deploy": ("quantizers", "exact", "nn", "models"),
    # A run ends with what its network costs where it is deployed.
    "train": (*BELOW_TRAIN, "exact", "deploy"),
    "plots": ("quantizers",),
    "report": ("quantizers", "plots"),
    "predict": ("data", "deploy"),
    "main": (*BELOW_TRAIN, "config", "train", "deploy", "plots", "report"),
}

# Third-party package → the rooms that may import it. What is not named is free.
ALLOWED_PACKAGES = {
    "flax": (
        "nn",
        "rules",
        "quantization",
        "summarize",
        "models",
        "interop",
        "train",
        "deploy",
        "linen",
        "qwix",
    ),
    "qwix": ("qwix",),
    "optax": ("train",),
    "orbax": ("train",),
    "grain": ("data",),
    "tensorflow_datasets": ("data",),
    "tensorflow": (),
    "torch": (),
    "matplotlib": ("plots", "report"),
    "ml_collections": ("config", "main"),
    "absl": ("data", "main"),
    "rich": ("summarize", "data", "train", "main", "report", "predict"),
    "tensorboardX": ("train",),
    "sklearn": ("data",),
    "PIL": ("data",),
    "cv2": ("data",),
    "simplejpeg": ("data",),
    "onnx": ("deploy",),
    "onnxruntime": ("deploy", "predict"),
    "openvino": ("deploy",),
}

# The quantizers are for anyone: for them, what is named is all.
QUANTIZER_PACKAGES = ("jax", "numpy", "jaxtyping")


def imported_names(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of all that a module's source imports, at its top or in a function."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return names


def violations(root: pathlib.Path) -> list[str]:
    """What breaks the tables in the package under `root`, as "file:line: what"."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if module == PACKAGE:
            continue  # the front door: it shows every room, and a subprocess test holds it
        room = module.split(".")[1]
        if room not in ALLOWED_ROOMS:
            found.append(f"{relative}: room {room!r} has no row in ALLOWED_ROOMS")
            continue
        for line, name in imported_names(path.read_text(), module, path.name == "__init__.py"):
            where, (top, *rest) = f"{relative}:{line}", name.split(".")
            if top == PACKAGE:
                target = rest[0] if rest else ""
                # `from uniq_jax import name`: of the front door, unless the name is a room.
                if target not in (room, "__version__", *ALLOWED_ROOMS[room]):
                    found.append(f"{where}: {room} must not import {name}")
            elif top in ALLOWED_PACKAGES and room not in ALLOWED_PACKAGES[top]:
                found.append(f"{where}: {room} must not import {top}")
            elif room == "quantizers" and top not in (
                *QUANTIZER_PACKAGES,
                *sys.stdlib_module_names,
            ):
                found.append(f"{where}: quantizers must not import {top}")
    return found


def test_every_room_imports_only_what_it_may():
    assert violations(ROOT) == []


def test_the_tables_name_rooms_only():
    rooms = set(ALLOWED_ROOMS)
    assert set().union(*ALLOWED_ROOMS.values(), *ALLOWED_PACKAGES.values()) <= rooms


def test_imports_point_downwards():
    seen = set()
    while len(seen) < len(ALLOWED_ROOMS):
        free = {room for room in ALLOWED_ROOMS if set(ALLOWED_ROOMS[room]) <= seen} - seen
        assert free, "the table of rooms has a cycle"
        seen |= free


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("data/x.py", "from uniq_jax.quantizers import uniq_weight", "data must not import"),
        ("data/x.py", "from uniq_jax import quantizers", "data must not import"),
        ("data/x.py", "from .. import nn", "data must not import uniq_jax.nn"),
        ("data/x.py", "import uniq_jax", "data must not import uniq_jax"),
        ("deploy/x.py", "import uniq_jax.train.loop", "deploy must not import uniq_jax.train.loop"),
        ("deploy/x.py", "import optax", "deploy must not import optax"),
        ("deploy/__init__.py", "from ..train import loop", "deploy must not import uniq_jax.train"),
        ("quantizers/a/b.py", "from ...nn import x", "quantizers must not import uniq_jax.nn.x"),
        ("quantizers/x.py", "def f():\n    import flax.nnx", "x.py:2: quantizers must not import"),
        ("quantizers/x.py", "import scipy", "quantizers must not import scipy"),
        ("nn/x.py", "if True:\n  from matplotlib import pyplot", "nn must not import matplotlib"),
        ("train/x.py", "import ml_collections", "train must not import ml_collections"),
        ("spec.py", "from uniq_jax.config import run_spec", "spec must not import"),
        ("helpers.py", "", "room 'helpers' has no row"),
    ],
)
def test_an_illegal_import_is_found(tmp_path, file, source, expected):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert expected in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("quantizers/x.py", "import math, jax\nfrom .grid import Grid\nfrom jax import lax"),
        ("quantizers/__init__.py", "from . import grid\nfrom uniq_jax import __version__"),
        ("data/x.py", "import grain.python\nfrom uniq_jax.data.splits import parse"),
        ("nn/x.py", "from uniq_jax import quantizers\nfrom flax import nnx"),
        ("main.py", "from uniq_jax.train import loop"),
        ("__init__.py", "from uniq_jax.train import anything"),
    ],
)
def test_a_legal_import_is_not_found(tmp_path, file, source):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []


# What an import really loads

HEAVY = ("flax", "optax", "grain", "matplotlib", "orbax", "tensorflow", "tensorflow_datasets",
         "torch", "rich", "ml_collections", "sklearn", "tensorboardX", "chex", "qwix",
         "cv2", "onnx", "onnxruntime", "openvino")  # fmt: skip


def loaded_by(statement: str) -> list[str]:
    program = f"{statement}\nimport sys\nprint(*[n for n in {HEAVY!r} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_quantizers_load_only_jax_and_numpy():
    assert loaded_by("import uniq_jax.quantizers") == []


def test_deploy_loads_no_model_and_no_runtime():
    assert loaded_by("import uniq_jax.deploy") == []


def test_data_loads_no_other_room():
    statement = "import uniq_jax.data; import sys; rooms = [m for m in sys.modules if "
    statement += (
        "m.startswith('uniq_jax.') and not m.startswith('uniq_jax.data')]; assert not rooms, rooms"
    )
    assert "flax" not in loaded_by(statement)


def test_pictures_need_no_jax_and_training_no_matplotlib():
    assert loaded_by("import uniq_jax.report, uniq_jax.plots") == ["matplotlib"]
    assert "matplotlib" not in loaded_by("import uniq_jax.train.loop, uniq_jax.main")
    statement = "import uniq_jax.report, sys; assert not {'jax', 'jaxlib'} & sys.modules.keys()"
    assert loaded_by(statement) == ["matplotlib"]


def test_a_heavy_import_would_be_noticed():
    assert "flax" in loaded_by("import uniq_jax.quantizers, flax.nnx")
