"""Tables that benchmarks write, put where a page says `<!-- benchmarks/results.md -->`.

A hook of mkdocs. Without such a file the page says what writes it.
"""

import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_COMMANDS = {
    "benchmarks/results.md": "make bench",
    "benchmarks/peers/results.md": "make peers",
    "benchmarks/accelerators/results.md": "make accelerators",
}
_PLACE = re.compile(rf"<!-- ({'|'.join(map(re.escape, _COMMANDS))}) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables into a page, before it becomes HTML."""
    return _PLACE.sub(lambda match: table(_ROOT, match[1]), markdown)


def table(root: Path, name: str) -> str:
    """What stands in the place of a file, which may be missing."""
    if (root / name).is_file():
        return (root / name).read_text(encoding="utf-8")
    return f"`{_COMMANDS[name]}` has not been run here. It writes this table to `{name}`."
