"""Channels of a ResNet's residual streams (scope `stream`).

All blocks of a stage add to one stream, so that one of its channels can only go from all of them at once: from
whatever writes it (the last convolution of every block, the shortcut's, the stem's) and from whatever reads it. What is
left is a plain ResNet with narrower stages. It takes a batch norm, which looks at one channel at a time: a norm whose
statistics run over the channels of the stream changes what stays when some of them go.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from torch import nn

from mvp_ext.model.families.parts import (
    Rule,
    computes_as,
    is_elementwise,
    need_elementwise,
    need_plain,
    reader,
    writer,
)
from mvp_ext.model.scatter_block import ScatterBlock
from mvp_ext.model.structure import Attribute, Probe, Slice, UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm

# Modules with their paths, in the order in which they run.
Chain = list[tuple[str, nn.Module]]
_STAGES = ("layer1", "layer2", "layer3", "layer4")


def _is_resnet(module: nn.Module) -> bool:
    timm, torchvision = _resnets()
    return _runs_as(module, timm.ResNet, "forward", "forward_features", "forward_head") or _runs_as(
        module, torchvision.ResNet, "forward", "_forward_impl"
    )


def _resnets() -> tuple[Any, Any]:
    """The modules with the ResNets of timm and torchvision. timm imports the latter."""
    return import_timm().models.resnet, importlib.import_module("torchvision.models.resnet")


def _runs_as(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    own = all(getattr(type(module), name, None) is getattr(kind, name) for name in methods)
    return own and vars(module).keys().isdisjoint(methods)


def _stream_layers(path: str, model: Any) -> list[UnitLayer]:
    """The streams of a whole ResNet: each begins at the stem, or at a shortcut with a convolution.

    A stream has the name of the last stage that writes to it, or of the stem or block where none does.
    """
    if path:
        raise UnsupportedModelError(
            f"{path}: expected a whole model, got a part of one, whose streams others may read"
        )
    streams = [_begin("conv1", _chain("", model, "conv1", "bn1", "act1", "relu", "maxpool"))]
    for stage in _STAGES:
        need_plain(stage, getattr(model, stage), nn.Sequential)
        for number, block in enumerate(getattr(model, stage)):
            at = f"{stage}.{number}"
            added = _added(at, block)
            _extend(streams, _read(_chain(at, block, "conv1")), probe=Probe(f"{at}.conv1", "input", dim=1))
            if shortcut := _chain(at, block, "downsample"):
                _extend(streams, _read(shortcut))
                streams.append(_begin(at, shortcut))
            _extend(streams, *added)
            if number == 0:
                streams[-1] = replace(streams[-1], name=stage)
    _read_by_head(model, streams)
    return streams


def _begin(name: str, chain: Chain) -> UnitLayer:
    slices = _written(chain)
    convolution: Any = dict(chain)[slices[0].tensor.removesuffix(".weight")]
    # Until something reads it.
    probe = Probe(chain[-1][0], "output", dim=1)
    return UnitLayer(name, "filter", convolution.out_channels, tuple(slices), probe)


def _extend(streams: list[UnitLayer], *slices: Slice, **others: Any) -> None:
    """The stream that the model is in is also cut at ``slices``."""
    streams[-1] = replace(streams[-1], slices=(*streams[-1].slices, *slices), **others)


def _added(path: str, block: Any) -> list[Slice]:
    """What shrinks of a block where it adds to the stream."""
    if isinstance(block, ScatterBlock):
        raise UnsupportedModelError(
            f"{path}: expected a block that adds to all channels of its stream, got one that was cut in scope `all`"
        )
    if not computes_as(block, *(kind for lib in _resnets() for kind in (lib.BasicBlock, lib.Bottleneck))):
        raise UnsupportedModelError(
            f"{path}: expected a BasicBlock or Bottleneck, got {type(block).__name__}"
        )
    last = 3 if getattr(block, "conv3", None) is not None else 2
    slices = _written(_chain(path, block, f"conv{last}", f"bn{last}", "drop_path", f"act{last}", "relu"))
    se = getattr(block, "se", None)
    if se is None:
        return slices
    if not computes_as(se, import_timm().layers.SEModule):
        raise UnsupportedModelError(
            f"{path}.se: expected none or an SEModule, got {type(se).__name__}, which mixes the stream's channels"
        )
    need_elementwise(f"{path}.se.gate", se.gate)
    return [*slices, _read(_chain(f"{path}.se", se, "fc1")), *_written(_chain(f"{path}.se", se, "fc2"))]


def _read_by_head(model: Any, streams: list[UnitLayer]) -> None:
    """The classifier reads the last stream, pooled: once, or as its mean and its maximum (timm's "catavgmax")."""
    name = "global_pool" if hasattr(model, "global_pool") else "avgpool"
    pool: Any = getattr(model, name)
    selects = computes_as(pool, import_timm().layers.SelectAdaptivePool2d)
    if not (pool.pool_type if selects else computes_as(pool, nn.AdaptiveAvgPool2d)):
        raise UnsupportedModelError(f"{name}: expected a pool over all positions, got {pool}")
    parts = pool.feat_mult() if selects else 1
    # timm makes a new classifier by them.
    sizes = (("num_features", 1), ("head_hidden_size", parts))
    _extend(
        streams,
        _read(_chain("", model, "fc"), repeat=parts),
        probe=Probe(name, "input", dim=1),
        attributes=tuple(Attribute("", n, per_unit) for n, per_unit in sizes if hasattr(model, n)),
    )


def _chain(path: str, parent: nn.Module, *names: str) -> Chain:
    """Those of these parts that ``parent`` has; for a Sequential its own parts."""
    found: Chain = []
    for name in names:
        module = getattr(parent, name, None)
        inner = f"{path}.{name}" if path else name
        if type(module) is nn.Sequential and len(module):
            found += _chain(inner, module, *module._modules)
        elif module is not None:
            found.append((inner, module))
    return found


def _written(chain: Chain) -> list[Slice]:
    """What makes the channels that come out of ``chain``: its last convolution, and the norms behind it."""
    slices: list[Slice] = []
    for path, module in reversed(chain):
        if isinstance(module, nn.Conv2d):
            _check_convolution(path, module)
            return [*writer(path, module), *slices]
        if computes_as(module, nn.BatchNorm2d, nn.SyncBatchNorm):
            slices = [*writer(path, module), *slices]
        else:
            _check_channelwise(path, module)
    raise UnsupportedModelError(f"{chain[0][0]}: expected a convolution, got none")


def _read(chain: Chain, repeat: int = 1) -> Slice:
    """What reads the channels that go into ``chain``: its first convolution or linear layer."""
    for path, module in chain:
        if isinstance(module, nn.Conv2d):
            _check_convolution(path, module)
            return reader(path)
        if type(module) is nn.Linear:
            return reader(path, repeat=repeat)
        _check_channelwise(path, module)
    raise UnsupportedModelError(f"{chain[0][0]}: expected a layer that reads the stream, got none")


def _check_convolution(path: str, conv: nn.Conv2d) -> None:
    need_plain(path, conv, nn.Conv2d)
    if conv.groups != 1:
        raise UnsupportedModelError(f"{path}: expected groups = 1 at the stream, got groups = {conv.groups}")


def _check_channelwise(path: str, module: nn.Module) -> None:
    layers = import_timm().layers
    known = (nn.MaxPool2d, nn.AvgPool2d, layers.AvgPool2dSame, layers.DropPath, nn.Dropout)
    if not is_elementwise(module) and not computes_as(module, *known):
        raise UnsupportedModelError(
            f"{path}: expected a batch norm, an activation or a pool, which keep the stream's channels apart, got "
            f"{type(module).__name__}"
        )


STREAM = (Rule("resnet", "stream", _is_resnet, _stream_layers),)
