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

from collections.abc import Iterable, Mapping

from torch import nn

from mvp_ext.model.borrowed import unwrapped
from mvp_ext.model.families.parts import Family
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
        scope: `inner` or `all` for a ResNet; `heads`, `mlp` or `heads+mlp` for a ViT. None: the first that the model
            has: where its attention is of a kind that cannot be cut, its MLPs.

    Raises:
        ValueError: the scope is unknown, or belongs to another family than the model's.
        UnsupportedModelError: a part of the model is not understood. The message names it, and a scope that works, if
            one does.
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
    # In the order in which they are preferred.
    known = [(family, blocks, each) for family, blocks in found for each in family.scopes]
    refused: list[UnsupportedModelError] = []
    for family, blocks, each in known:
        if scope in (None, each):
            try:
                return _structure(model, family, blocks, each)
            except UnsupportedModelError as error:
                refused.append(error)
    remedy = _remedy(model, [way for way in known if scope not in (None, way[2])])
    if refused:
        raise UnsupportedModelError(f"{refused[0]}{remedy}")
    owner = next(family.name for family in FAMILIES if scope in family.scopes)
    raise ValueError(
        f"find_structure: scope {scope!r} is for the family {owner!r}; this model looks like {found[0][0].name!r}"
        f"{remedy}"
    )


_Blocks = list[tuple[str, nn.Module]]


def _structure(model: nn.Module, family: Family, blocks: _Blocks, scope: str) -> Structure:
    layers = [layer for path, block in blocks for layer in family.layers(path, block, scope)]
    structure = Structure(family.name, scope, _architecture(model), tuple(layers))
    structure.check(model)
    return structure


def _remedy(model: nn.Module, ways: Iterable[tuple[Family, _Blocks, str]]) -> str:
    """The end of a refusal: the first of other scopes that this model has."""
    for family, blocks, scope in ways:
        try:
            _structure(model, family, blocks, scope)
        except UnsupportedModelError:
            continue
        return f"; use scope {scope!r}"
    return ""


def _architecture(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = (
        config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    )
    return str(name) if name else None
