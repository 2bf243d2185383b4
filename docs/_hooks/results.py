"""The table of `make bench`, put where a page says `<!-- benchmarks/results.md -->`.

A hook of mkdocs. Without that file, which a benchmark writes, the page says how to get it.
"""

from pathlib import Path
from typing import Any

_PLACE = "<!-- benchmarks/results.md -->"
_FILE = Path(__file__).parents[2] / "benchmarks" / "results.md"
_NONE = "`make bench` has not been run here. It writes this table to `benchmarks/results.md`."


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the table into a page, before it becomes HTML."""
    return markdown.replace(_PLACE, table(_FILE))


def table(path: Path) -> str:
    """What stands in its place."""
    return path.read_text(encoding="utf-8") if path.is_file() else _NONE
