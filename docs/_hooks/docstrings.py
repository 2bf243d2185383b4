"""Docstrings as griffe reads them: its sections of examples begin with "Examples:".

An extension of griffe. Under "Example:", which the docstrings say, it would show doctests as text.
"""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Changes the heading while the package is read; its files stay as they are."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
