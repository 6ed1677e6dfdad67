"""What every family is made of: what it is called, how its blocks are known, and what its rules ask of a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mvp_ext.model.structure import UnitLayer


@dataclass(frozen=True)
class Family:
    """A family of backbones.

    Attributes:
        name: as ``Structure.family`` says it.
        scopes: the scopes it knows, its default first.
        children: names of the submodules that make a module one of its blocks.
        layers: (path of a block, the block, scope) → the block's layers of units; UnsupportedModelError names a part
            that is not understood.
    """

    name: Literal["resnet", "vit"]
    scopes: tuple[str, ...]
    children: frozenset[str]
    layers: Callable[[str, Any, str], list[UnitLayer]]

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Every module of ``model`` that looks like a block of this family, with its path."""
        return [
            (path, module)
            for path, module in model.named_modules()
            if self.children <= dict(module.named_children()).keys()
        ]


def computes_as(module: nn.Module, *known: type[nn.Module]) -> bool:
    """Whether ``module`` runs the very forward of one of these classes: its parts do not say how they are used."""
    return "forward" not in vars(module) and any(type(module).forward is cls.forward for cls in known)


def is_elementwise(act: nn.Module) -> bool:
    """Whether ``act`` is an activation without parameters that looks at one value at a time."""
    known = type(act).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")
    mixes = isinstance(
        act, (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)
    )
    return isinstance(act, nn.Identity) or (known and not mixes and not list(act.parameters()))
