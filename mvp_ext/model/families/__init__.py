"""What each family of backbones looks like: its layers of units, found by looking at its parts, never by its name.

| scope       | units                                                                                  |
|-------------|----------------------------------------------------------------------------------------|
| `inner`     | ResNet: conv1 of a BasicBlock, conv1 and conv2 of a Bottleneck. Nothing is coupled.    |
| `all`       | ResNet: each block's last convolution too; see nn.py. Still nothing is coupled.        |
| `heads`     | ViT: attention heads.                                                                  |
| `mlp`       | ViT: hidden neurons of the MLPs.                                                       |
| `heads+mlp` | both.                                                                                  |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mvp_ext.model.families.resnet import filter_layers
from mvp_ext.model.families.vit import head_layer, neuron_layer
from mvp_ext.model.structure import Structure, UnitLayer, UnsupportedModelError, check_fits

SCOPES = {"inner": "resnet", "all": "resnet", "heads": "vit", "mlp": "vit", "heads+mlp": "vit"}
_DEFAULT_SCOPE = {"resnet": "inner", "vit": "heads"}


def find_structure(model: nn.Module, scope: str | None = None) -> Structure:
    """The layers of units of ``model``.

    Args:
        model: a timm ResNet (BasicBlock, Bottleneck), ViT or DeiT, dense or already pruned, on any device.
        scope: `inner` (default) or `all` for a ResNet; `heads` (default), `mlp` or `heads+mlp` for a ViT.

    Raises:
        ValueError: the scope is unknown, or belongs to another family than the model's.
        UnsupportedModelError: a part of the model is not understood; the message names it.
    """
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"find_structure: scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    residual, transformer = _candidates(model)
    families = {"resnet": residual, "vit": transformer}
    found = [family for family in ("vit", "resnet") if families[family]]
    if not found:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children()) or "no parts"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected residual blocks (conv1, conv2) or transformer blocks (attn, mlp), "
            f"got {children}"
        )
    family = SCOPES[scope] if scope else found[0]
    if family not in found:
        raise ValueError(
            f"find_structure: scope {scope!r} is for the family {family!r}; this model looks like {found[0]!r}"
        )
    scope = scope or _DEFAULT_SCOPE[family]
    layers: list[UnitLayer] = []
    for path, block in families[family]:
        if family == "resnet":
            layers += filter_layers(path, block, last=scope == "all")
        else:
            if "heads" in scope:
                layers.append(head_layer(f"{path}.attn", block.attn))
            if "mlp" in scope:
                layers.append(neuron_layer(f"{path}.mlp", block.mlp))
    structure = Structure(
        "resnet" if family == "resnet" else "vit", scope, _architecture(model), tuple(layers)
    )
    check_fits(model, structure)
    return structure


def _candidates(model: nn.Module) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Everything that has the shape of a residual block, and of a transformer block, with its path."""
    residual, transformer = [], []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if {"conv1", "conv2"} <= children.keys():
            residual.append((path, module))
        elif {"attn", "mlp"} <= children.keys():
            transformer.append((path, module))
    return residual, transformer


def _architecture(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = (
        config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    )
    return str(name) if name else None
