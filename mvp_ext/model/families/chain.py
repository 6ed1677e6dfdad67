"""Layers of units along a chain: convolutions (or linear layers), and what lies between them.

Every dense convolution reads the units of the layer before it and makes those of the next one. What lies between two of
them handles each unit by itself: activations and pools have nothing to cut; norms, depthwise convolutions and the two
ends of a squeeze-and-excitation have tensors with a place for each channel. Where a grouped convolution or a group norm
is between, a unit is a whole group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import pairwise
from math import gcd
from typing import Any, Literal

import torch
from torch import nn

from mvp_ext.model.families.parts import Part, Rule, computes_as, is_elementwise, need_elementwise, writer
from mvp_ext.model.structure import Attribute, Probe, Slice, UnitLayer, UnsupportedModelError

# Modules that only run their parts, one after the other.
_RUNS = {
    "timm.layers.ConvNormAct": ("conv", "bn", "aa"),
    "timm.models.efficientvit_mit.ConvNormAct": ("dropout", "conv", "norm", "act"),
    "timm.models.efficientformer_v2.ConvNorm": ("conv", "bn"),
    "timm.models.levit.ConvNorm": ("linear", "bn"),
    "timm.models.xception_aligned.SeparableConv2d": (
        *("conv_dw", "bn_dw", "act_dw"),
        *("conv_pw", "bn_pw", "act_pw"),
    ),
    "transformers.models.resnet.modeling_resnet.ResNetConvLayer": (
        *("convolution", "normalization", "activation"),
    ),
}
_CONVS = ("torch.nn.Conv2d", "timm.layers.Conv2dSame", "timm.layers.conv2d_same.Conv2dSameExport")
# They standardise a filter over all of its inputs: without some of them the filter is another one. As writers, or
# depthwise, they lose whole filters only.
_STANDARDISED = tuple(
    f"timm.layers.{name}" for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
)
PLAIN_BATCH_NORMS = (
    "torch.nn.BatchNorm2d",
    "torch.nn.SyncBatchNorm",
    "torchvision.ops.misc.FrozenBatchNorm2d",
)
_BATCH_NORMS = (
    *PLAIN_BATCH_NORMS,
    "timm.layers.BatchNormAct2d",
    "timm.layers.SyncBatchNormAct",
    "timm.layers.FrozenBatchNormAct2d",
)
_GROUP_NORMS = ("torch.nn.GroupNorm", "timm.layers.GroupNorm", "timm.layers.GroupNormAct")
# What reads all channels, what makes their weights, and the last activation of these.
_SQUEEZES = {
    "timm.layers.SEModule": ("fc1", "fc2", "gate"),
    "timm.layers.EffectiveSEModule": ("fc", "fc", "gate"),
    "timm.models._efficientnet_blocks.SqueezeExcite": ("conv_reduce", "conv_expand", "gate"),
    "torchvision.ops.misc.SqueezeExcitation": ("fc1", "fc2", "scale_activation"),
}
_NOTHING_TO_CUT = (
    "torch.nn.Dropout",
    "torch.nn.Dropout2d",
    "torch.nn.AvgPool2d",
    "torch.nn.MaxPool2d",
    "timm.layers.DropBlock2d",
)
_GRNS = ("timm.layers.grn.GlobalResponseNorm", "mvp_ext.model.narrow.grn.GlobalResponseNorm")


def chains(family: str, part: Literal["inner", "mlp"], known: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules for modules that run parts of theirs one after the other.

    Args:
        family: as in ``Rule``.
        part: "inner" (a layer is named after the convolution that makes its units) or "mlp" (after the module).
        known: a class by its full name, whose forward such a module runs → the names of the parts, with points for
            parts of parts. Those that a module does not have, or that are None, are left out; what comes before the
            first dense convolution and after the last does not matter.
    """
    return tuple(
        Rule(family, part, knows(name), partial(layers_along, part, parts.split()), by_class=True)
        for name, parts in known.items()
    )


def knows(*known: str) -> Callable[[nn.Module], bool]:
    """``runs`` as a rule has it."""
    return lambda module: runs(module, *known)


def runs(module: nn.Module, *known: str) -> bool:
    """Whether ``module`` runs the forward of a class, by its full name. Nothing is imported for that: what has not been
    imported yet, or is not in this version of its package, has no modules."""
    return any(computes_as(module, cls) for cls in _classes(known))


def layers_along(part: Part, parts: Sequence[str], path: str, module: Any) -> list[UnitLayer]:
    """The layers of units along ``parts`` of the module at ``path``; the others as in ``chains``.

    Raises:
        UnsupportedModelError: a part in the way, by its path; or no two dense convolutions follow each other.
    """
    stages = [stage for name in parts for stage in flat(f"{path}.{name}", _part(module, name))]
    dense = [i for i, (_, stage) in enumerate(stages) if _is_dense(stage)]
    if len(dense) < 2:
        raise UnsupportedModelError(
            f"{path}: expected two convolutions without groups, one after the other, got {len(dense)}"
        )
    layers = [_layer(part, stages[a : b + 1]) for a, b in pairwise(dense)]
    if part == "mlp":
        if len(layers) > 1:
            raise UnsupportedModelError(f"{path}: expected one hidden layer, got {len(layers)}")
        layers = [replace(layers[0], name=path)]
    return layers


def _part(module: Any, name: str) -> Any:
    return reduce(lambda part, leaf: getattr(part, leaf, None), name.split("."), module)


def _classes(known: Sequence[str]) -> Iterator[type[nn.Module]]:
    for name in known:
        home, _, leaf = name.rpartition(".")
        cls = getattr(sys.modules.get(home), leaf, None)
        if cls is not None:
            yield cls


def flat(path: str, module: nn.Module | None) -> Iterator[tuple[str, Any]]:
    """The parts that compute, in their order."""
    if module is None:
        return
    names: Sequence[str] | None = None
    if computes_as(module, nn.Sequential):
        names = tuple(module._modules)
    else:
        names = next((parts for known, parts in _RUNS.items() if runs(module, known)), None)
    if names is None:
        yield path, module
    else:
        for name in names:
            yield from flat(f"{path}.{name}", getattr(module, name, None))


def _is_dense(module: nn.Module) -> bool:
    known = isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "groups", 1) == 1
    return known and not _had_groups(module)


def _had_groups(module: nn.Module) -> bool:
    """Whether surgery left it one group of those that it had, which are units still."""
    return "had_groups" in vars(module)


def need(path: str, module: nn.Module, *known: str) -> None:
    """UnsupportedModelError unless ``module`` is exactly of one of these classes, with its forward."""
    if type(module) not in _classes(known) or "forward" in vars(module):
        raise UnsupportedModelError(
            f"{path}: expected a plain {known[0].rpartition('.')[2]}, got {type(module).__name__}"
        )


def _layer(part: Part, stages: Sequence[tuple[str, Any]]) -> UnitLayer:
    """The units that the first stage makes and the last one reads."""
    (first, making), *between, (last, reading) = stages
    if isinstance(making, nn.Linear):
        need(first, making, "torch.nn.Linear")
        need(last, reading, "torch.nn.Linear")
        channels, dim = making.out_features, -1
    else:
        need(first, making, *_CONVS, *_STANDARDISED)
        need(last, reading, *_CONVS)
        channels, dim = making.out_channels, 1
    groups = [_groups(stage) for _, stage in between]
    units = gcd(channels, *(n for n in groups if n is not None))
    if units == 1 < channels and not any(_had_groups(stage) for _, stage in between):
        raise UnsupportedModelError(
            f"{first}: expected channels that fall into groups, got one group of {channels} for what lies between it "
            f"and {last}"
        )
    found = Units(units, channels, dim)
    found.make(first, making)
    for path, stage in between:
        found.carry(path, stage)
    found.read(last)
    probe = Probe(last, "input", dim, heads=None if found.width == 1 else units)
    return found.layer(first, "filter" if part == "inner" else "neuron", probe)


def _groups(stage: nn.Module) -> int | None:
    """Into how many parts a stage divides its channels, if it does."""
    if isinstance(stage, nn.Conv2d):
        return stage.groups
    return stage.num_groups if isinstance(stage, nn.GroupNorm) else None


@dataclass
class Units:
    """What goes with the units of one layer, collected along the way.

    Attributes:
        units: how many.
        channels: that they have at this point of the chain.
        dim: of an activation that holds them: 1, or -1 where channels are last.
        copies: of all units, one after the other, that these channels are (``Slice.repeat``).
        zero_stays: whether a unit that was zeroed (``masked_model``) is still zero at this point.
    """

    units: int
    channels: int
    dim: int = 1
    copies: int = 1
    zero_stays: bool = True
    slices: list[Slice] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    narrowed: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Channels of a unit in one copy."""
        return self.channels // (self.units * self.copies)

    def layer(self, name: str, kind: Literal["filter", "neuron"], probe: Probe) -> UnitLayer:
        """All that was collected."""
        return UnitLayer(
            name,
            kind,
            self.units,
            tuple(dict.fromkeys(self.slices)),
            probe,
            attributes=tuple(self.attributes),
            narrowed=tuple(self.narrowed),
        )

    def make(self, path: str, module: nn.Module) -> None:
        """``module`` puts the channels out, or is a norm over them."""
        self.slices += writer(path, module, self.width, self.copies)
        if getattr(module, "gain", None) is not None:
            self.slices.append(Slice(f"{path}.gain", 0, self.width, self.copies))

    def read(self, path: str) -> None:
        """The layer at ``path`` reads all channels."""
        self.slices.append(Slice(f"{path}.weight", 1, self.width, self.copies))

    def carry(self, path: str, module: Any) -> None:
        """``module`` handles each unit by itself; UnsupportedModelError if that is not known of it."""
        if is_elementwise(module):
            self.zero_stays = self.zero_stays and _keeps_zero(module)
        elif runs(module, *_NOTHING_TO_CUT):
            pass
        elif runs(module, *_GRNS):
            self._grn(path, module)
        elif self.dim == -1:
            raise UnsupportedModelError(
                f"{path}: expected an activation between linear layers, got {type(module).__name__}"
            )
        elif isinstance(module, nn.Conv2d):
            need(path, module, *_CONVS, *_STANDARDISED)
            self.attributes.append(Attribute(path, "groups", module.groups // self.units))
            self.channels = module.out_channels
            self.make(path, module)
        elif runs(module, *_BATCH_NORMS, *_GROUP_NORMS):
            self._norm(path, module)
        elif (names := next((n for known, n in _SQUEEZES.items() if runs(module, known)), None)) is not None:
            self._squeeze(path, module, *names)
        elif runs(module, "timm.layers.BlurPool2d"):
            # One filter for each channel, all the same, in a buffer that is no part of the state.
            if module.channels is not None:
                self.narrowed.append(path)
        else:
            raise UnsupportedModelError(
                f"{path}: expected a part that keeps channels apart, got {type(module).__name__}"
            )

    def _norm(self, path: str, module: Any) -> None:
        for name in ("drop", "act"):
            if (part := getattr(module, name, None)) is not None and not runs(part, *_NOTHING_TO_CUT):
                need_elementwise(f"{path}.{name}", part)
        if isinstance(module, nn.GroupNorm):
            self.attributes.append(Attribute(path, "num_groups", module.num_groups // self.units))
        self.make(path, module)

    def _squeeze(self, path: str, module: Any, reads: str, makes: str, gate: str) -> None:
        for name in (reads, makes):
            need(f"{path}.{name}", getattr(module, name), "torch.nn.Conv2d")
        need_elementwise(f"{path}.{gate}", getattr(module, gate))
        self.read(f"{path}.{reads}")
        self.make(f"{path}.{makes}", getattr(module, makes))

    def _grn(self, path: str, module: Any) -> None:
        """It divides by a mean over all channels: ours goes on to divide by their first number."""
        if not self.zero_stays or module.channel_dim != self.dim:
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}): expected units that are zero once removed, along dimension "
                f"{module.channel_dim}"
            )
        self.make(path, module)
        self.narrowed.append(path)


def _keeps_zero(act: nn.Module) -> bool:
    """Whether an activation of zero is zero."""
    if list(act.parameters()):
        return False
    with torch.no_grad():
        return bool(act(torch.zeros(1, device="cpu")) == 0)
