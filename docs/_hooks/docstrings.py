"""Docstrings as griffe reads them: an extension of it, which changes no file.

It calls sections of examples "Examples:", where our docstrings say "Example:"; under that it would
show doctests as text. And of "mean, std: …" it would make "mean", of type "std".
"""

import re
from typing import Any

import griffe

_SEVERAL_NAMES = re.compile(r"^ +\w+(?:, (?:\w+|…))+(?=: )", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes docstrings while the package is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        # Names are separated from types by a plain space.
        text = _SEVERAL_NAMES.sub(lambda names: names[0].replace(", ", ",\N{NO-BREAK SPACE}"), text)
        obj.docstring.value = text
