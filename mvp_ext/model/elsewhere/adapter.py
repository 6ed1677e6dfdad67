"""What has to be said of a module of others, so that it can be used as a backbone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from mvp_ext.model.preprocessing import Preprocessing


@dataclass(frozen=True)
class Adapter:
    """How a module is used as a backbone.

    Attributes:
        preprocessing: how images become its input.
        head: path of its linear classifier, which is taken out; None: it has none.
        features: (module without its classifier, images [B, 3, S, S]) → pooled features [B, D]. None: what the module
            puts out without its classifier.
        any_size: whether it takes images of other sizes than the preprocessing's.
        name: under which ``register_backbone`` knows it; letters, digits, "_", "." and "-". None: models made of it
            cannot be saved.
        build: makes the module anew; its tensors are overwritten.

    Raises:
        ValueError: another kind of name, or a name without ``build``.
    """

    preprocessing: Preprocessing
    head: str | None = None
    features: Callable[[nn.Module, Tensor], Tensor] | None = None
    any_size: bool = False
    name: str | None = None
    build: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        if self.name is None:
            return
        if re.fullmatch(r"[\w.-]{1,100}", self.name) is None:
            raise ValueError(
                f"Adapter: name: expected up to 100 letters, digits, '_', '.' and '-', got {self.name!r}"
            )
        if self.build is None:
            raise ValueError(f"Adapter: {self.name}: expected build, which makes its module anew, got None")


_REGISTERED: dict[str, Adapter] = {}


def register_backbone(adapter: Adapter) -> None:
    """Have files name this adapter's models, for as long as this process runs; one of the same name is replaced.

    A process that loads such a file registers the adapter first: what a file says never picks code to run.

    Raises:
        ValueError: the adapter has no name.
    """
    if adapter.name is None:
        raise ValueError("register_backbone: expected an adapter with a name, got None")
    _REGISTERED[adapter.name] = adapter


def registered(name: str) -> Adapter:
    """The adapter of this name; ValueError where this process knows none."""
    if name not in _REGISTERED:
        raise ValueError(
            f"backbone 'own:{name}': expected an adapter of this name, and this process knows none: "
            "register_backbone(adapter) first"
        )
    return _REGISTERED[name]
