"""Where the state dict is in what a program has saved."""

from collections.abc import Callable, Mapping
from typing import Any

# Keys under which programs save the state dict of a network, the first of which is taken.
STATE_DICT_KEYS = (
    *("net", "state_dict", "model_state_dict", "model", "network", "module"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema"),
)
_MAX_NESTING = 4


def find_state_dict(
    tree: Any, is_tensor: Callable[[Any], bool], *, depth: int = _MAX_NESTING
) -> Mapping[str, Any] | None:
    """The mapping with tensors under the first of the keys, nested or not, else the outermost.

    Args:
      tree: what was saved.
      is_tensor: whether a value is one.
      depth: how many mappings within each other are looked into.

    Returns:
      None if no mapping that the keys lead to has a tensor.
    """
    if not isinstance(tree, Mapping) or not depth:
        return None
    for key in STATE_DICT_KEYS:
        found = find_state_dict(tree.get(key), is_tensor, depth=depth - 1)
        if found is not None:
            return found
    return tree if any(map(is_tensor, tree.values())) else None


def without_module(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without the "module." of DataParallel, where every name begins with it."""
    prefix = "module." if all(name.startswith("module.") for name in state_dict) else ""
    return {name.removeprefix(prefix): value for name, value in state_dict.items()}
