"""Docstrings as griffe reads them: an extension of it, which changes no file.

It calls sections of examples "Examples:", where our docstrings say "Example:"; under that it would
show doctests as text. And of "mean, std: …" it would make one entry, "mean", of type "std".
"""

import re
from typing import Any

import griffe

# Names, and what is said of them, in lines that are indented further.
_SEVERAL = re.compile(r"^( +)(\w+)((?:, \w+)*(?:, …)?)(: .*(?:\n\1 +\S.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes docstrings while the package is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _SEVERAL.sub(_one_by_one, text)


def _one_by_one(entry: re.Match[str]) -> str:
    indent, first, others, text = entry.groups()
    lines = [f"{indent}{first}{text}"]
    # For "…" there is no entry: the text says what is meant.
    lines += [f"{indent}{name}: see `{first}`." for name in re.findall(r"\w+", others)]
    return "\n".join(lines)
