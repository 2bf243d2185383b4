"""Split expressions in the syntax of TFDS: "train", "train[:90%]", "train[45000:]", "a+b"."""

import re
import types
from collections.abc import Mapping
from typing import Any

Part = tuple[str, int, int]
"""A split's name, and the half-open range of its examples."""


def resolve_split(split: str, sizes: Mapping[str, int]) -> tuple[str, list[Part]]:
    """Translate a split expression into ranges of examples.

    "test" means "validation" for a set that has no "test", with any slice kept.

    Args:
        split: A split, a slice of one in absolute numbers or percent, or a sum of these.
        sizes: Number of examples of each split of the set.

    Returns:
        The expression with "test" replaced where need be, and its parts in order.

    Raises:
        ValueError: On an unknown split, a malformed or empty slice.
    """
    if "test" not in sizes and "validation" in sizes:
        split = rename(split, "test", "validation")
    if split in sizes:
        parts = [(split, 0, sizes[split])]
    else:
        parts = [_absolute(term.strip(), sizes) for term in split.split("+")]
    for name, start, stop in parts:
        if start >= stop:
            raise ValueError(
                f"split={split!r} selects no example: {name!r} has {sizes[name]} examples, "
                f"the slice is [{start}:{stop}]"
            )
    return split, parts


def rename(split: str, old: str, new: str) -> str:
    """A split expression in which one split has another name.

    Example:
        >>> rename("train+val[:50%]+interval[:9]", "val", "validation")
        'train+validation[:50%]+interval[:9]'
    """
    return re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", new, split)


def _absolute(term: str, sizes: Mapping[str, int]) -> Part:
    from tensorflow_datasets.core import ReadInstruction  # gives exactly the rounding of TFDS

    name = term.partition("[")[0]
    if name not in sizes:
        raise ValueError(
            f"split={term!r} is unknown: this set has {sorted(sizes)}, with slices such as "
            "'train[:90%]', 'train[45000:]' or sums of these"
        )
    # TFDS reads these two attributes of a split's description and no other.
    infos: Any = {
        name: types.SimpleNamespace(num_examples=size, shard_lengths=[size])
        for name, size in sizes.items()
    }
    try:
        (part,) = ReadInstruction.from_spec(term).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"split={term!r} is not a valid slice of {name!r} with {sizes[name]} examples; "
            f"allowed are slices such as '{name}[:90%]' or '{name}[10:20]'"
        ) from error
    return name, part.from_ or 0, sizes[name] if part.to is None else part.to
