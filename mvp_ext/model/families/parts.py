"""What the families' rules ask of a module."""

from __future__ import annotations

from torch import nn


def computes_as(module: nn.Module, *known: type[nn.Module]) -> bool:
    """Whether ``module`` runs the very forward of one of these classes: its parts do not say how they are used."""
    return "forward" not in vars(module) and any(type(module).forward is cls.forward for cls in known)


def is_elementwise(act: nn.Module) -> bool:
    known = type(act).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")
    mixes = isinstance(
        act, (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)
    )
    return isinstance(act, nn.Identity) or (known and not mixes and not list(act.parameters()))
