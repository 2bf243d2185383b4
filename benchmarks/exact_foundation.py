"""What a result of `exact.py` rests on: one that is kept must be of the code that is here."""

import argparse
import ast
import hashlib
import importlib.metadata
import pathlib

import uniq_jax

_DECISIVE = ("runtime_images", "qonnx_images", "steps")
_VERSIONS = ("jax", "jaxlib", "flax", "numpy", "onnx", "onnxruntime", "openvino", "qonnx")


def foundation_of(arguments: argparse.Namespace) -> str:
    """A digest of what a case's numbers come from, beside its name and how many images it has.

    That is the code that makes frozen networks and compares them, comments and docstrings aside;
    how much is compared elsewhere; and the versions of what runs.
    """
    package, here = pathlib.Path(uniq_jax.__file__).parent, pathlib.Path(__file__).parent
    rooms = ("quantizers", "nn", "models", "deploy")
    paths = [path for room in rooms for path in package.glob(f"{room}/*.py")]
    paths += [
        package / f"{name}.py" for name in ("quantization", "rules", "exact", "data_parallel")
    ]
    paths += here.glob("exact*.py")
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.parent.name}/{path.name}\0{code_of(path)}\0".encode())
    digest.update(repr([getattr(arguments, name) for name in _DECISIVE]).encode())
    digest.update(repr([importlib.metadata.version(name) for name in _VERSIONS]).encode())
    return digest.hexdigest()[:16]


def code_of(path: pathlib.Path) -> str:
    """What Python makes of a file, without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]
    return ast.dump(tree)


def _is_text(line: ast.AST) -> bool:
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )
