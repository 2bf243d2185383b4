"""Every shell command that README, docs and configs show is one that its program would take.

Nothing is trained or installed: configs are built and validated, arguments are parsed, targets and
files looked up. A command of another kind fails here until someone says how it is to be checked.
"""

import argparse
import copy
import importlib
import pathlib
import re
import shlex
import tomllib

import pytest
from absl import flags
from ml_collections import config_flags

from uniq_jax import config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# ml_collections reads config files by a function that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

FLAGS_OF_MAIN = ("workdir", "mode", "distributed", "coordinator", "num_processes", "process_id")


def commands(text):
    """The commands of a page's shell blocks, and of code in its lines that begins as one."""
    blocks = re.findall(r"^ *```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"(?<!`)`((?:python|pip|make) [^`]*)`(?!`)", text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in [*lines, *inline]]
    return [words for words in found if words]


def commands_of_config(path):
    """The commands of a config file's docstring, which are indented."""
    docstring = path.read_text().split('"""')[1].replace("\\\n", " ")
    return [shlex.split(x) for x in docstring.splitlines() if x.startswith("    python ")]


def write_configs(text, directory):
    """The config files that a page shows: Python blocks that begin with a file's name."""
    blocks = re.findall(r"^```python\n(# (\w+\.py)\n.*?)```", text, re.DOTALL | re.MULTILINE)
    for block, name in blocks:
        (directory / name).write_text(block)


def check(words):
    """Raises an error if a command is not one that works."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if words[1] not in targets:
            raise ValueError(f"no target {words[1]}")
    elif program == "pip":
        check_install(words[1:])
    elif program == "python" and words[1] == "-m":
        check_module(words[2], words[3:])
    elif program == "python":
        check_script(words[1], words[2:])
    else:
        raise ValueError(f"nothing checks {program}")


def check_install(words):
    """That it installs this package, with extras there are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    match words:
        case ["install", what]:
            name = re.fullmatch(r"(?:\.|uniq_jax)(?:\[([a-z,]+)\])?", what)
        case _:
            name = None
    if name is None:
        raise ValueError(f"pip {' '.join(words)}")
    missing = set((name[1] or "").split(",")) - {"", *project["optional-dependencies"]}
    if missing:
        raise ValueError(f"no extra {missing}")


def check_module(name, words):
    """That a module which is a program takes these arguments."""
    if name == "uniq_jax.main":
        check_main(words)
    elif name in ("uniq_jax.predict", "uniq_jax.report"):
        check_parser(importlib.import_module(f"{name}.__main__").main, words)
    elif name == "pytest":
        for path in words:
            if not (ROOT / path).is_file():
                raise ValueError(f"no file {path}")
    elif name != "pre_commit":
        raise ValueError(f"nothing checks {name}")


def check_main(words):
    """Builds the config with its overrides and validates it, as `uniq_jax.main` does."""
    importlib.import_module("uniq_jax.main")
    values = flags.FlagValues()
    for name in FLAGS_OF_MAIN:
        values[name] = copy.deepcopy(flags.FLAGS[name])
    words = ["main", *(x.replace("=configs/", f"={ROOT}/configs/") for x in words)]
    # "…" stands for what a page has said before.
    if "--config=…" in words:
        return
    # Which keys are overridden is looked up in the arguments when the flag is defined.
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=words)
    rest = values(words)
    if len(rest) > 1:
        raise ValueError(f"unexpected arguments {rest[1:]}")
    if values["workdir"].value is None:
        raise ValueError("--workdir is missing")
    config.run_spec(values["config"].value)


class Parsed(Exception):
    """Arguments that a parser took."""


def check_parser(main, words):
    """That the parser of a program takes these arguments; the program goes no further."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments, **options):
        raise Parsed(parse(self, *arguments, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        try:
            main(words)
        except Parsed:
            return
        except SystemExit:
            raise ValueError(f"{' '.join(words)} is not parsed") from None
    raise AssertionError("it has no parser")


def check_script(path, words):
    """That a script exists, and has the options."""
    if not (ROOT / path).is_file():
        raise ValueError(f"no file {path}")
    text = (ROOT / path).read_text()
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in text and option != "--help":
            raise ValueError(f"{path} has no {option}")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_pages(page, tmp_path, monkeypatch):
    write_configs(page.read_text(), tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands(page.read_text()):
        check(words)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda x: x.stem)
def test_commands_of_configs(path):
    found = commands_of_config(path)
    assert f"--config=configs/{path.name}" in found[0]
    for words in found:
        check(words)


def test_there_are_commands():
    found = [words for page in PAGES for words in commands(page.read_text())]
    assert ["make", "demo"] in found
    assert any(words[:3] == ["python", "-m", "uniq_jax.main"] for words in found)


MAIN = "python -m uniq_jax.main --config=configs/digits_w2a2.py"


@pytest.mark.parametrize(
    "command",
    [
        "make dmo",
        "pip install uniq_jax[onx]",
        "pip uninstall uniq_jax",
        f"{MAIN}",
        f"{MAIN} --workdir=x --config.sed=1",
        f"{MAIN} --workdir=x --config.quantized.weight_bits=9",
        f"{MAIN}:seeds=1 --workdir=x",
        f"{MAIN} --workdir=x --mode=test",
        f"{MAIN} --workdir=x more",
        "python -m uniq_jax.main --config=configs/missing.py --workdir=x",
        "python -m uniq_jax.predict model.safetensors images --tops=3",
        "python -m uniq_jax.report compare --output=x y",
        "python -m uniq_jax.other",
        "python -m pytest tests/test_missing.py",
        "python benchmarks/missing.py",
        "python benchmarks/input.py --turn=3",
        "curl x",
    ],
)
def test_a_command_that_does_not_work_is_found(command):
    # What absl raises is no ValueError, and an unknown key an AttributeError.
    with pytest.raises((ValueError, AttributeError, flags.Error, OSError)):
        check(shlex.split(command))
