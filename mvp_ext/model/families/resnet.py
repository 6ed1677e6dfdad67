"""Filters of a ResNet's residual blocks: the scopes ``inner`` and ``all``."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvp_ext.model.families.parts import Family, computes_as, is_elementwise
from mvp_ext.model.scatter_block import ScatterBlock
from mvp_ext.model.structure import Probe, Slice, UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm


def _filter_layers(path: str, block: Any, scope: str) -> list[UnitLayer]:
    """The convolutions of one residual block: all but its last, and in scope `all` that too."""
    last = scope == "all"
    resnet = import_timm().models.resnet
    if not computes_as(block, ScatterBlock, resnet.BasicBlock, resnet.Bottleneck):
        raise UnsupportedModelError(
            f"{path} ({type(block).__name__}): expected a block that computes as timm's BasicBlock or Bottleneck does"
        )
    depth = 3 if getattr(block, "conv3", None) is not None else 2
    for i in range(1, depth + 1):
        _check_convolution(f"{path}.conv{i}", getattr(block, f"conv{i}"))
        norm = getattr(block, f"bn{i}")
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedModelError(
                f"{path}.bn{i}: expected a batch normalisation, got {type(norm).__name__}"
            )
        if (i < depth or last) and not is_elementwise(act := getattr(block, f"act{i}")):
            raise UnsupportedModelError(
                f"{path}.act{i}: expected an activation without parameters, got {type(act).__name__}"
            )
    aa = getattr(block, "aa", None)
    if aa is not None and not isinstance(aa, (nn.Identity, nn.AvgPool2d)):
        raise UnsupportedModelError(f"{path}.aa: expected none or an average pool, got {type(aa).__name__}")
    drop = getattr(block, "drop_block", None)
    if drop is not None and not isinstance(drop, (nn.Identity, import_timm().layers.DropBlock2d)):
        raise UnsupportedModelError(
            f"{path}.drop_block: expected none or a DropBlock2d, got {type(drop).__name__}"
        )
    layers = []
    for i in range(1, depth):
        conv, reader = f"{path}.conv{i}", f"{path}.conv{i + 1}"
        layers.append(
            UnitLayer(
                conv,
                "filter",
                getattr(block, f"conv{i}").out_channels,
                (*_filter_slices(path, block, i), Slice(f"{reader}.weight", 1)),
                Probe(reader, "input", dim=1),
            )
        )
    if last:
        if block.se is not None:
            raise UnsupportedModelError(
                f"{path}.se ({type(block.se).__name__}): it mixes the channels of the residual stream, so scope `all` "
                "cannot cut them"
            )
        slices = _filter_slices(path, block, depth)
        if isinstance(block, ScatterBlock):
            slices = (*slices, Slice(f"{path}.kept", 0))
        units = getattr(block, f"conv{depth}").out_channels
        probe = Probe(f"{path}.bn{depth}", "output", dim=1)
        layers.append(UnitLayer(f"{path}.conv{depth}", "filter", units, slices, probe, scatter=path))
    return layers


def _filter_slices(path: str, block: Any, i: int) -> tuple[Slice, ...]:
    """The tensors of convolution i and its normalisation, along its filters."""
    conv, norm = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
    own = [f"conv{i}.{name}" for name in ("weight", "bias") if getattr(conv, name) is not None]
    own += [
        f"bn{i}.{n}"
        for n in ("weight", "bias", "running_mean", "running_var")
        if getattr(norm, n) is not None
    ]
    return tuple(Slice(f"{path}.{name}", 0) for name in own)


def _check_convolution(path: str, conv: nn.Module) -> None:
    if type(conv) is not nn.Conv2d:
        raise UnsupportedModelError(f"{path}: expected a plain Conv2d, got {type(conv).__name__}")
    if conv.groups != 1:
        raise UnsupportedModelError(
            f"{path}: expected groups = 1, got a grouped convolution (groups = {conv.groups})"
        )


RESNET = Family("resnet", ("inner", "all"), frozenset({"conv1", "conv2"}), _filter_layers)
