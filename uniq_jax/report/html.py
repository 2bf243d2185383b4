"""The few HTML elements that a page is made of. All text is escaped here."""

from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE_SHEET = Path(__file__).with_name("style.css")


def page(title: str, body: Iterable[str]) -> str:
    """A whole page; `body` is HTML."""
    style = _STYLE_SHEET.read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # No icon is asked for, of whoever serves the page.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def element(name: str, text: str, **attributes: str) -> str:
    """`<name attribute="…">text</name>`."""
    written = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{written}>{escape(text)}</{name}>"


def section(title: str, *parts: str) -> str:
    """A part of the page with its heading; `parts` are HTML."""
    return "\n".join(["<section>", element("h2", title), *parts, "</section>"])


def figure(picture: str, caption: str = "") -> str:
    """A picture, as `uniq_jax.plots` makes it."""
    below = element("figcaption", caption) if caption else ""
    return f"<figure>\n{picture}\n{below}</figure>"


def details(title: str, *parts: str) -> str:
    """What is shown on demand; `parts` are HTML."""
    return "\n".join(["<details>", element("summary", title), *parts, "</details>"])


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    marked: Collection[int] = (),
    *,
    is_text: bool = False,
) -> str:
    """A table. The first cell of a row is its header; numbers are on the right.

    Args:
      caption: of the table.
      header: of the columns; one of them may be empty.
      rows: of text, numbers (written as they are), or None (an empty cell).
      marked: numbers of the rows that stand out.
      is_text: whether numbers are not to be aligned: versions, values of a config.
    """
    rows = list(rows)
    columns = [{} if is_text else _class_of([r[i] for r in rows]) for i in range(len(header))]
    head = "".join(
        element("th", name, scope="col", **kind) if name else "<td></td>"
        for name, kind in zip(header, columns)
    )
    lines = []
    for index, (first, *others) in enumerate(rows):
        cells = [element("th", str(first), scope="row")]
        for value in others:
            kind = {} if is_text else _class_of([value])
            cells.append(element("td", "" if value is None else str(value), **kind))
        start = '<tr class="marked">' if index in marked else "<tr>"
        lines.append(f"{start}{''.join(cells)}</tr>")
    return "\n".join(
        [
            '<div class="wide" tabindex="0"><table>',
            element("caption", caption),
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *lines,
            "</tbody>",
            "</table></div>",
        ]
    )


def _class_of(values: Sequence[Any]) -> dict[str, str]:
    """That of a cell, or of a column's header: numbers, with or without unit, are on the right."""
    texts = [str(value) for value in values if value not in (None, "")]
    is_number = [text.lstrip("+-–")[:1].isdigit() or text == "–" for text in texts]
    return {"class": "number"} if texts and all(is_number) else {}
