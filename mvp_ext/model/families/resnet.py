"""Filters of a ResNet's residual blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvp_ext.model.families.parts import Rule, computes_as, need_elementwise, reader, writer
from mvp_ext.model.scatter_block import ScatterBlock
from mvp_ext.model.structure import Probe, Slice, UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm


def _is_block(module: nn.Module) -> bool:
    resnet = import_timm().models.resnet
    return computes_as(module, ScatterBlock, resnet.BasicBlock, resnet.Bottleneck)


def _inner_layers(path: str, block: Any) -> list[UnitLayer]:
    """The convolutions of one residual block but its last."""
    depth = _check(path, block)
    layers = []
    for i in range(1, depth):
        conv, after = f"{path}.conv{i}", f"{path}.conv{i + 1}"
        units = getattr(block, f"conv{i}").out_channels
        slices = (*_filter_slices(path, block, i), reader(after))
        layers.append(UnitLayer(conv, "filter", units, slices, Probe(after, "input", dim=1)))
    return layers


def _last_layer(path: str, block: Any) -> list[UnitLayer]:
    """The last convolution of one residual block."""
    depth = _check(path, block)
    need_elementwise(f"{path}.act{depth}", getattr(block, f"act{depth}"))
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
    return [UnitLayer(f"{path}.conv{depth}", "filter", units, slices, probe, scatter=path)]


def _check(path: str, block: Any) -> int:
    """The number of convolutions of a block all of whose parts are understood."""
    depth = 3 if getattr(block, "conv3", None) is not None else 2
    for i in range(1, depth + 1):
        _check_convolution(f"{path}.conv{i}", getattr(block, f"conv{i}"))
        norm = getattr(block, f"bn{i}")
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedModelError(
                f"{path}.bn{i}: expected a batch normalisation, got {type(norm).__name__}"
            )
        if i < depth:
            need_elementwise(f"{path}.act{i}", getattr(block, f"act{i}"))
    aa = getattr(block, "aa", None)
    if aa is not None and not isinstance(aa, (nn.Identity, nn.AvgPool2d)):
        raise UnsupportedModelError(f"{path}.aa: expected none or an average pool, got {type(aa).__name__}")
    drop = getattr(block, "drop_block", None)
    if drop is not None and not isinstance(drop, (nn.Identity, import_timm().layers.DropBlock2d)):
        raise UnsupportedModelError(
            f"{path}.drop_block: expected none or a DropBlock2d, got {type(drop).__name__}"
        )
    return depth


def _filter_slices(path: str, block: Any, i: int) -> tuple[Slice, ...]:
    """The tensors of convolution i and its normalisation, along its filters."""
    own = (f"conv{i}", f"bn{i}")
    return tuple(each for name in own for each in writer(f"{path}.{name}", getattr(block, name)))


def _check_convolution(path: str, conv: nn.Module) -> None:
    if type(conv) is not nn.Conv2d:
        raise UnsupportedModelError(f"{path}: expected a plain Conv2d, got {type(conv).__name__}")
    if conv.groups != 1:
        raise UnsupportedModelError(
            f"{path}: expected groups = 1, got a grouped convolution (groups = {conv.groups})"
        )


RESNET = (Rule("resnet", "inner", _is_block, _inner_layers), Rule("resnet", "last", _is_block, _last_layer))
