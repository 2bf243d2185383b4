"""Numbers as readers want them."""

import math
from collections.abc import Mapping
from typing import Any


def percent(share: float | None, digits: int = 2) -> str:
    """A share in percent; a dash where it is not known."""
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def size(size_bytes: int) -> str:
    """Bytes, in the unit that suits them."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    return f"{size_bytes / 1e3:.1f} KB" if size_bytes < 1e6 else f"{size_bytes / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """A time, in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def number(value: float) -> str:
    """Three digits, and words for what is not a number."""
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def rows_of(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows: ("data.batch_size", "64")."""
    if isinstance(value, Mapping) and value:
        return [
            row
            for key, item in value.items()
            for row in rows_of(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value if isinstance(value, str) and value else repr(value))]
