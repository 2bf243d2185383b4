"""Every public name has an entry in the reference, and every entry is of a public name."""

import ast
import collections
import importlib
import inspect
import pathlib
import re
from typing import Any

import griffe
import pytest

import uniq_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "uniq_jax"
PAGES = ROOT / "docs" / "reference"

# A room whose files are what it shows, and not its `__init__`: these are its public ones.
PUBLIC_FILES = {"train": ("loop", "step", "state")}

# A command: it has --help, and guides.
COMMANDS = ("main",)


def shown_names(path: pathlib.Path) -> list[str]:
    """What an `__init__` shows: `from … import X as X`."""
    imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    aliases = [alias for node in imports for alias in node.names]
    return [alias.name for alias in aliases if alias.asname == alias.name]


def defined_names(path: pathlib.Path) -> list[str]:
    """A module's functions, classes and constants without a leading underscore."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            targets = [part for target in targets for part in ast.walk(target)]
            # Others are aliases of types, as in `Config = Any`.
            found = [part.id for part in targets if isinstance(part, ast.Name)]
            names += filter(str.isupper, found)
    return [name for name in names if not name.startswith("_")]


def public_names(package: pathlib.Path, front_door: dict[str, str]) -> set[str]:
    """Dotted public names of the package in this directory.

    Args:
      package: its directory.
      front_door: name → module of what the package itself shows, and public under this name only.
    """
    found = {f"{package.name}.{name}" for name in shown_names(package / "__init__.py")}
    for path in sorted(package.iterdir()):
        room, init = path.stem, path / "__init__.py"
        if room.startswith("_") or room in COMMANDS:
            continue
        names = {}
        if room in PUBLIC_FILES:
            files = {f"{room}.{file}": path / f"{file}.py" for file in PUBLIC_FILES[room]}
            names = {name: defined_names(file) for name, file in files.items()}
        elif init.is_file():
            names = {room: shown_names(init)}
        elif path.suffix == ".py":
            names = {room: defined_names(path)}
        for module, public in names.items():
            found |= {f"{package.name}.{module}.{name}" for name in public}
    return found - {f"{module}.{name}" for name, module in front_door.items()}


def entries(pages: pathlib.Path) -> list[str]:
    """What the reference has an entry for: a line `::: NAME`.

    Entries without members are the texts of packages, at the head of a page or of a section.
    """
    found = []
    for path in sorted(pages.rglob("*.md")):
        for name, below in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", path.read_text(), re.M):
            if "members: false" not in below:
                found.append(name)
    return found


def public_name(entry: str) -> str:
    """The name that an entry is for: that of its object is shorter, where one stands above it.

    `lsq.lsq` is the function in the file of its name, and public as `lsq`. What the front door
    shows is public there.
    """
    *room, name = entry.split(".")
    if room[-1] == name:
        room.pop()
    is_at_front = uniq_jax._LAZY.get(name) == ".".join(room)
    return f"uniq_jax.{name}" if is_at_front else ".".join([*room, name])


def imported(name: str) -> Any:
    """What a program gets by this name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def differences(package: pathlib.Path, pages: pathlib.Path) -> list[str]:
    """What is wrong, as "NAME: what"."""
    public = public_names(package, uniq_jax._LAZY)
    counts = collections.Counter(map(public_name, entries(pages)))
    return [
        *(f"{name}: public, but has no entry" for name in sorted(public - counts.keys())),
        *(f"{name}: has an entry, but is not public" for name in sorted(counts.keys() - public)),
        *(f"{name}: {count} entries" for name, count in sorted(counts.items()) if count > 1),
    ]


def test_the_reference_has_each_public_name_once():
    assert differences(PACKAGE, PAGES) == []


def test_public_names_exist():
    """They are read from the files, so that nothing hides behind an import that fails."""
    for name in public_names(PACKAGE, uniq_jax._LAZY):
        imported(name)


@pytest.mark.parametrize("room", [room for room in uniq_jax._ROOMS if room not in COMMANDS])
def test_every_room_has_public_names(room):
    assert any(name.startswith(f"uniq_jax.{room}.") for name in public_names(PACKAGE, {}))


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("nn/__init__.py", "from uniq_jax.nn.conv import New as New", "uniq_jax.nn.New"),
        ("deploy/__init__.py", "if a:\n    from b import New as New", "uniq_jax.deploy.New"),
        ("__init__.py", "from uniq_jax.rules import New as New", "uniq_jax.New"),
        ("exact.py", "def new():\n    pass", "uniq_jax.exact.new"),
        ("train/step.py", "class New:\n    pass", "uniq_jax.train.step.New"),
        ("a_new_room.py", "LIMIT = 3", "uniq_jax.a_new_room.LIMIT"),
        ("a_new_room/__init__.py", "from a import b as b", "uniq_jax.a_new_room.b"),
    ],
)
def test_a_name_without_an_entry_is_found(tmp_path, file, line, expected):
    package = tmp_path / "uniq_jax"
    for path in PACKAGE.rglob("*.py"):
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    changed = package / file
    changed.parent.mkdir(exist_ok=True)
    text = changed.read_text() if changed.exists() else ""
    changed.write_text(f"{text}\n{line}\n")
    assert differences(package, PAGES) == [f"{expected}: public, but has no entry"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("::: uniq_jax.nn.Gone", "uniq_jax.nn.Gone: has an entry, but is not public"),
        ("::: uniq_jax.nn.Step", "uniq_jax.nn.Step: 2 entries"),
        ("::: uniq_jax.deploy.freeze", "uniq_jax.freeze: 2 entries"),
    ],
)
def test_a_wrong_entry_is_found(tmp_path, line, expected):
    for path in PAGES.glob("*.md"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "more.md").write_text(line + "\n")
    assert differences(PACKAGE, tmp_path) == [expected]


# What an entry shows. Where a function has the name of its file, importing gives the function, and
# reading the files, as the reference does, the file.


@pytest.fixture(scope="module")
def read_package():
    return griffe.load("uniq_jax", search_paths=[ROOT])


def shows_what_it_names(package: griffe.Object, entry: str) -> bool:
    shown = package[entry.removeprefix("uniq_jax.")]
    shown = shown.final_target if shown.is_alias else shown
    is_module = inspect.ismodule(imported(public_name(entry)))
    return shown.is_module == is_module and shown.has_docstring


def test_entries_show_what_they_name(read_package):
    assert [e for e in entries(PAGES) if not shows_what_it_names(read_package, e)] == []


@pytest.mark.parametrize("entry", ["uniq_jax.quantizers.lsq", "uniq_jax.calibrate"])
def test_an_entry_that_shows_a_file_is_found(read_package, entry):
    assert not shows_what_it_names(read_package, entry)


def test_an_entry_without_a_docstring_is_found(read_package):
    assert not shows_what_it_names(read_package, "uniq_jax.recipes.Config")
