"""Filters of residual blocks of ResNets and their kin: bottlenecks with or without groups, pre-activation, RegNets."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvp_ext.model.families.chain import PLAIN_BATCH_NORMS, chains, layers_along, runs
from mvp_ext.model.families.parts import Rule, computes_as, need_elementwise, need_plain, writer
from mvp_ext.model.scatter_block import BASIC, BOTTLENECK, ScatterBlock
from mvp_ext.model.structure import Probe, Slice, UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm


def _is_block(module: nn.Module) -> bool:
    resnet = import_timm().models.resnet
    return computes_as(module, ScatterBlock, resnet.BasicBlock, resnet.Bottleneck)


def _inner_layers(path: str, block: Any) -> list[UnitLayer]:
    """The convolutions of one residual block but its last."""
    return layers_along("inner", BASIC if _depth(block) == 2 else BOTTLENECK, path, block)


def _last_layer(path: str, block: Any) -> list[UnitLayer]:
    """The last convolution of one residual block."""
    depth = _depth(block)
    conv, norm = (getattr(block, f"{name}{depth}") for name in ("conv", "bn"))
    need_plain(f"{path}.conv{depth}", conv, nn.Conv2d)
    if not runs(norm, *PLAIN_BATCH_NORMS):
        raise UnsupportedModelError(
            f"{path}.bn{depth}: expected a batch normalisation, got {type(norm).__name__}"
        )
    need_elementwise(f"{path}.act{depth}", getattr(block, f"act{depth}"))
    if block.se is not None:
        raise UnsupportedModelError(
            f"{path}.se ({type(block.se).__name__}): it mixes the channels of the residual stream, so scope `all` "
            "cannot cut them"
        )
    slices = (*writer(f"{path}.conv{depth}", conv), *writer(f"{path}.bn{depth}", norm))
    if isinstance(block, ScatterBlock):
        slices = (*slices, Slice(f"{path}.kept", 0))
    probe = Probe(f"{path}.bn{depth}", "output", dim=1)
    return [UnitLayer(f"{path}.conv{depth}", "filter", conv.out_channels, slices, probe, scatter=path)]


def _depth(block: Any) -> int:
    return 3 if getattr(block, "conv3", None) is not None else 2


_BASIC = "conv1 bn1 relu conv2"
_BOTTLENECK = "conv1 bn1 relu conv2 bn2 relu conv3"
_CHAINS = {
    "torchvision.models.resnet.BasicBlock": _BASIC,
    "torchvision.models.resnet.Bottleneck": _BOTTLENECK,
    "timm.models.dla.DlaBasic": _BASIC,
    "timm.models.dla.DlaBottleneck": _BOTTLENECK,
    "timm.models.senet.SEResNetBlock": _BASIC,
    "timm.models.senet.Bottleneck": _BOTTLENECK,
    "timm.models.tresnet.BasicBlock": "conv1 conv2",
    "timm.models.tresnet.Bottleneck": "conv1 conv2 se conv3",
    "timm.models.resnetv2.PreActBasic": "conv1 norm2 conv2",
    "timm.models.resnetv2.PreActBottleneck": "conv1 norm2 conv2 norm3 conv3",
    "timm.models.resnetv2.Bottleneck": "conv1 norm1 conv2 norm2 conv3",
    # Their convolutions are standardised over what they read: refused by that name.
    "timm.models.nfnet.NormFreeBlock": "conv1 act2 conv2 act2b conv2b act3 conv3",
}

RESNET = (
    Rule("resnet", "inner", _is_block, _inner_layers, by_class=True),
    Rule("resnet", "last", _is_block, _last_layer, by_class=True),
    *chains("resnet", "inner", _CHAINS),
)
