"""Filters of blocks that hold several copies of their channels side by side: Res2Net, SK, ResNeSt and Ghost nets.

A unit is one channel in all the copies. No module reads one channel a unit there, so a probe looks at one of the copies
where there is no better place.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mvp_ext.model.families.chain import Units, flat, knows, need, runs
from mvp_ext.model.families.parts import Rule
from mvp_ext.model.structure import Attribute, Probe, UnitLayer, UnsupportedModelError

_CONV = "torch.nn.Conv2d"


def _dense(path: str, conv: Any) -> None:
    need(path, conv, _CONV)
    if conv.groups != 1:
        raise UnsupportedModelError(f"{path}: expected groups = 1, got {conv.groups}")


def _make(found: Units, path: str, module: nn.Module) -> None:
    """The units come out of the first part of ``module`` and go through the others."""
    (first, conv), *others = flat(path, module)
    _dense(first, conv)
    found.make(first, conv)
    for name, part in others:
        found.carry(name, part)


def _carry(found: Units, path: str, block: Any, *names: str) -> None:
    for name in names:
        for stage in flat(f"{path}.{name}", getattr(block, name)):
            found.carry(*stage)


def _res2net_layers(path: str, block: Any) -> list[UnitLayer]:
    """Channels of a hierarchy of convolutions: each reads its own copy, and what the one before made."""
    found = Units(block.width, block.width * block.scale, copies=block.scale)
    _dense(f"{path}.conv1", block.conv1)
    found.make(f"{path}.conv1", block.conv1)
    _carry(found, path, block, "bn1", "relu", "pool")
    _carry(found, path, block, *(name for name in ("drop_block",) if hasattr(block, name)))
    _dense(f"{path}.conv3", block.conv3)
    found.read(f"{path}.conv3")
    found.channels, found.copies = block.width, 1
    for i, conv in enumerate(block.convs):
        _dense(f"{path}.convs.{i}", conv)
        found.read(f"{path}.convs.{i}")
        found.make(f"{path}.convs.{i}", conv)
        found.carry(f"{path}.bns.{i}", block.bns[i])
    found.attributes.append(Attribute(path, "width"))
    # What the last one reads is made of all before it, but in a stage's first block.
    probe = Probe(f"{path}.convs.{len(block.convs) - 1}", "input", dim=1)
    return [found.layer(f"{path}.conv1", "filter", probe)]


def _selective_layers(path: str, block: Any) -> list[UnitLayer]:
    """Channels that all paths of a selective kernel make, and those that its paths share out among themselves."""
    bottleneck = hasattr(block, "conv3")
    name, after = ("conv2", "conv3") if bottleneck else ("conv1", "conv2")
    kernel, home = getattr(block, name), f"{path}.{name}"
    if not runs(kernel, "timm.layers.SelectiveKernel"):
        raise UnsupportedModelError(f"{home}: expected a SelectiveKernel, got {type(kernel).__name__}")
    layers = []
    if bottleneck:
        copies = kernel.num_paths if kernel.split_input else 1
        found = Units(kernel.in_channels // copies, kernel.in_channels, copies=copies)
        _make(found, f"{path}.conv1", block.conv1)
        found.channels, found.copies = found.units, 1
        for i, branch in enumerate(kernel.paths):
            _dense(f"{home}.paths.{i}.conv", branch.conv)
            found.read(f"{home}.paths.{i}.conv")
        found.attributes.append(Attribute(home, "in_channels", copies))
        probe = Probe(f"{home}.paths.0.conv", "input", dim=1)
        layers.append(found.layer(f"{path}.conv1.conv", "filter", probe))
    found = Units(kernel.out_channels, kernel.out_channels)
    for i, branch in enumerate(kernel.paths):
        _make(found, f"{home}.paths.{i}", branch)
    for end in ("fc_reduce", "fc_select"):
        _dense(f"{home}.attn.{end}", getattr(kernel.attn, end))
    found.read(f"{home}.attn.fc_reduce")
    found.channels, found.copies = found.units * kernel.num_paths, kernel.num_paths
    found.make(f"{home}.attn.fc_select", kernel.attn.fc_select)
    found.channels, found.copies = found.units, 1
    _dense(f"{path}.{after}.conv", getattr(block, after).conv)
    found.read(f"{path}.{after}.conv")
    found.attributes.append(Attribute(home, "out_channels"))
    layers.append(found.layer(home, "filter", Probe(f"{path}.{after}.conv", "input", dim=1)))
    return layers


def _split_attention_layers(path: str, block: Any) -> list[UnitLayer]:
    """Channels that a split attention adds up, each from ``radix`` copies."""
    split, home = block.conv2, f"{path}.conv2"
    if not runs(split, "timm.layers.SplitAttn") or split.rsoftmax.cardinality != 1:
        raise UnsupportedModelError(
            f"{home}: expected a SplitAttn of cardinality 1, got {type(split).__name__}"
        )
    need(f"{home}.conv", split.conv, _CONV)
    found = Units(split.fc1.in_channels, split.conv.out_channels, copies=split.radix)
    found.make(f"{home}.conv", split.conv)
    _carry(found, home, split, "bn0", "drop", "act0")
    for name in ("fc1", "fc2"):
        _dense(f"{home}.{name}", getattr(split, name))
    found.make(f"{home}.fc2", split.fc2)
    found.channels, found.copies = found.units, 1
    found.read(f"{home}.fc1")
    _carry(found, path, block, "bn2", "drop_block", "act2", "avd_last")
    _dense(f"{path}.conv3", block.conv3)
    found.read(f"{path}.conv3")
    return [found.layer(f"{home}.conv", "filter", Probe(f"{path}.conv3", "input", dim=1))]


def _ghost_layers(path: str, block: Any) -> list[UnitLayer]:
    """Channels of a ghost module's convolution, each with the cheap copy that is made of it."""
    ghost, home = block.ghost1, f"{path}.ghost1"
    for name in ("ghost1", "ghost2"):
        if not runs(getattr(block, name), "timm.models.ghostnet.GhostModule"):
            got = type(getattr(block, name)).__name__
            raise UnsupportedModelError(f"{path}.{name}: expected a GhostModule, got {got}")
    found = Units(ghost.primary_conv[0].out_channels, ghost.primary_conv[0].out_channels)
    _make(found, f"{home}.primary_conv", ghost.primary_conv)
    _carry(found, home, ghost, "cheap_operation")
    if found.width != 1:
        raise UnsupportedModelError(f"{home}: expected one cheap copy, got {found.width}")
    found.channels, found.copies = 2 * found.units, 2
    _carry(found, path, block, "conv_dw", "bn_dw", "se")
    reading = f"{path}.ghost2.primary_conv.0"
    _dense(reading, block.ghost2.primary_conv[0])
    found.read(reading)
    found.attributes.append(Attribute(home, "out_chs", 2))
    # Both copies come from what the cheap operation reads.
    return [found.layer(home, "filter", Probe(f"{home}.cheap_operation.0", "input", dim=1))]


SPLIT = (
    Rule(
        "res2net",
        "inner",
        knows("timm.models.res2net.Bottle2neck", "timm.models.dla.DlaBottle2neck"),
        _res2net_layers,
        by_class=True,
    ),
    Rule(
        "sknet",
        "inner",
        knows("timm.models.sknet.SelectiveKernelBasic", "timm.models.sknet.SelectiveKernelBottleneck"),
        _selective_layers,
        by_class=True,
    ),
    Rule(
        "resnest",
        "inner",
        knows("timm.models.resnest.ResNestBottleneck"),
        _split_attention_layers,
        by_class=True,
    ),
    Rule("ghostnet", "inner", knows("timm.models.ghostnet.GhostBottleneck"), _ghost_layers, by_class=True),
)
