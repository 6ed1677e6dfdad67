"""What all modules that take the place of others' share."""

from __future__ import annotations

from typing import Any

from torch import nn


class Taken(nn.Module):
    """A module in the place of another, with its parts, tensors, hooks and settings under their names.

    Args:
        module: the one that is taken over. It is not changed: both hold the same tensors and parts until one is given
            others.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Its dictionaries (of parts, of parameters, …) are copied, or a change here would be one there.
        own: dict[str, Any] = {
            k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(module).items()
        }
        vars(self).update(own)
        self.taken_from = type(module).__qualname__

    def extra_repr(self) -> str:
        return f"in the place of {self.taken_from}"
