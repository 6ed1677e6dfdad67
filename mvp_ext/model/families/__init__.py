"""What each family of backbones looks like: its layers of units, found by looking at its parts, never by its name.

| scope       | units                                                                                          |
|-------------|------------------------------------------------------------------------------------------------|
| `inner`     | ResNet: conv1 of a BasicBlock, conv1 and conv2 of a Bottleneck. Nothing is coupled.            |
| `all`       | ResNet: each block's last convolution too (``scatter_block.py``). Still nothing is coupled.    |
| `heads`     | ViT: attention heads.                                                                          |
| `mlp`       | ViT: hidden neurons of the MLPs.                                                               |
| `heads+mlp` | ViT: both.                                                                                     |

A new family is a file here that makes a ``Family``, and its place in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mvp_ext.model.borrowed import unwrapped
from mvp_ext.model.families.resnet import RESNET
from mvp_ext.model.families.vit import VIT
from mvp_ext.model.structure import Structure, UnsupportedModelError

FAMILIES = (VIT, RESNET)
SCOPES = ("inner", "all", "heads", "mlp", "heads+mlp")


def find_structure(model: nn.Module, scope: str | None = None) -> Structure:
    """The layers of units of ``model``.

    Args:
        model: a timm ResNet (BasicBlock, Bottleneck), ViT or DeiT, dense or already pruned, on any device. What torch
            puts around one (torch.compile, DataParallel) is looked through: layers have the names of the model inside.
        scope: `inner` (default) or `all` for a ResNet; `heads` (default), `mlp` or `heads+mlp` for a ViT.

    Raises:
        ValueError: the scope is unknown, or belongs to another family than the model's.
        UnsupportedModelError: a part of the model is not understood; the message names it.
    """
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"find_structure: scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    model = unwrapped(model)
    found = [(family, blocks) for family in FAMILIES if (blocks := family.blocks(model))]
    if not found:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children()) or "no parts"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected residual blocks (conv1, conv2) or transformer blocks (attn, mlp), "
            f"got {children}"
        )
    matching = [(family, blocks) for family, blocks in found if scope is None or scope in family.scopes]
    if not matching:
        owner = next(family.name for family in FAMILIES if scope in family.scopes)
        raise ValueError(
            f"find_structure: scope {scope!r} is for the family {owner!r}; this model looks like {found[0][0].name!r}"
        )
    family, blocks = matching[0]
    scope = scope or family.scopes[0]
    layers = [layer for path, block in blocks for layer in family.layers(path, block, scope)]
    structure = Structure(family.name, scope, _architecture(model), tuple(layers))
    structure.check(model)
    return structure


def _architecture(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = (
        config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    )
    return str(name) if name else None
