"""What became of a state dict's tensors."""

import dataclasses
from collections.abc import Collection, Mapping

_FEW = 8


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a state dict, and of every variable of the model.

    Attributes:
      scheme: whose names they are: "torchvision", "pytorchcv", "uniq", "n2uq", "akamaster" or
        "plain".
      loaded: name in the state dict → path in the model.
      missing: path in the model → why it kept its value.
      unexpected: name in the state dict → why it was not used.
      kept: name in the state dict → what it is, of tensors that no forward pass of the model uses
        and that only `to_torch_state_dict` writes again.
    """

    scheme: str
    loaded: Mapping[str, str]
    missing: Mapping[str, str]
    unexpected: Mapping[str, str]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, named as in {self.scheme}"]
        for title in ("missing", "unexpected", "kept"):
            by_reason: dict[str, list[str]] = {}
            for name, reason in getattr(self, title).items():
                by_reason.setdefault(reason, []).append(name)
            lines += [
                f"{len(names)} {title} ({reason}): {some(names)}"
                for reason, names in by_reason.items()
            ]
        return "\n".join(lines)


def some(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - _FEW
    return ", ".join(list(names)[:_FEW]) + (f" and {rest} more" if rest > 0 else "")
