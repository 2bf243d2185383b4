"""Notebooks as scripts, run and made into pages: code, and below it what it printed.

A hook of mkdocs. `docs/notebooks/NAME.py` is in the percent format, which editors and Jupytext
open as a notebook: a line `# %% [markdown]` begins text, in comments, and `# %%` code. As in a
notebook, the value of a cell's last expression is shown: a picture where it is an `<svg>` element.
Pages link to the script, which readers of the repository have; here the links are of its page.
"""

import ast
import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_DIRECTORY = Path(__file__).parents[1] / "notebooks"
_LINK = re.compile(r"(?<=\]\()(notebooks/\w+)\.py(?=\))")
_CELL = re.compile(r"^# %%(?: \[(markdown)\])?\n", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each notebook."""
    for path in sorted(_DIRECTORY.glob("*.py")):
        name = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, name, content=render(path.read_text("utf-8"), name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leads links to scripts to their pages."""
    return _LINK.sub(r"\1.md", markdown)


def render(text: str, name: str) -> str:
    """Runs a notebook in an empty directory.

    Args:
      text: of the script.
      name: for tracebacks.

    Returns:
      Markdown. What a cell raises is raised.
    """
    parts, namespace = [], {"__name__": "notebook"}
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        for kind, source in cells(text):
            if kind == "markdown":
                parts.append(source)
                continue
            parts.append(f"```python\n{source}\n```")
            printed, shown = _run(source, name, namespace)
            if printed:
                parts.append(f"```text\n{printed}\n```")
            if shown:
                parts.append(f"<figure>{shown}</figure>")
    return "\n\n".join(parts) + "\n"


def cells(text: str) -> Iterator[tuple[str, str]]:
    """Kind, "markdown" or "code", and source of each cell that isn't empty."""
    before, *parts = _CELL.split(text)
    if before.strip():
        raise ValueError(f"a notebook must begin with a line '# %%', not with {before[:40]!r}")
    for kind, source in zip(parts[::2], parts[1::2]):
        source = source.strip()
        if kind:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        if source:
            yield kind or "code", source


def _run(source: str, name: str, namespace: dict[str, Any]) -> tuple[str, str]:
    """What a cell prints, the value of its last expression included; and its picture."""
    tree = ast.parse(source, name)
    last = tree.body[-1]
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(tree.body[:-1], []), name, "exec"), namespace)
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
        else:
            exec(compile(tree, name, "exec"), namespace)
        if isinstance(value, str) and value.startswith("<svg"):
            return printed.getvalue().rstrip(), value
        if value is not None:
            print(value)
    return printed.getvalue().rstrip(), ""
