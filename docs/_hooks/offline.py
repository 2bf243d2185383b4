"""A page that would load something from a network is an error: the site opens without one.

A hook of mkdocs. Links to other sites are none of this: readers follow them, pages do not.
"""

import re
from typing import Any

from mkdocs.exceptions import PluginError

_LOADED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]*)"
)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Looks at a finished page."""
    found = _LOADED.findall(output)
    if found:
        raise PluginError(f"{page.file.src_uri} would load {', '.join(sorted(set(found)))}")
    return output
