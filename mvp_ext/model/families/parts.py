"""What every family is made of: rules, and what rules ask of a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mvp_ext.model.structure import Slice, UnitLayer, UnsupportedModelError

# What a rule's units are: filters inside of a block, its last filters, channels of residual streams, attention heads,
# hidden neurons of an MLP.
Part = Literal["inner", "last", "stream", "heads", "mlp"]


@dataclass(frozen=True)
class Rule:
    """How the units of one kind of module are found.

    Attributes:
        family: as ``Structure.family`` says it.
        part: which of a scope's parts the units are.
        knows: whether a module is of this kind: by what it computes (``computes_as``), never by its name.
        layers: (path of such a module, the module) → its layers of units. UnsupportedModelError names a part in the
            way of cutting it; the module then stays whole.
        within: whether what it refuses is refused for every part inside of the module, too.
        by_class: whether ``knows`` looks at nothing but the module's forward: it is then asked once a class.
    """

    family: str
    part: Part
    knows: Callable[[nn.Module], bool]
    layers: Callable[[str, Any], list[UnitLayer]]
    within: bool = False
    by_class: bool = False


def computes_as(module: nn.Module, *known: type[nn.Module]) -> bool:
    """Whether ``module`` runs the very forward of one of these classes: its parts do not say how they are used."""
    return "forward" not in vars(module) and any(type(module).forward is cls.forward for cls in known)


def is_elementwise(act: nn.Module) -> bool:
    """Whether ``act`` is an activation that looks at one value at a time, and treats all channels alike."""
    known = type(act).__module__ in (
        "torch.nn.modules.activation",
        "timm.layers.activations",
        "transformers.activations",
    )
    known = known or (type(act).__module__, type(act).__name__) == ("timm.models.metaformer", "StarReLU")
    mixes = isinstance(
        act, (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)
    )
    alike = all(parameter.numel() == 1 for parameter in act.parameters())
    return isinstance(act, nn.Identity) or (known and not mixes and alike)


def need_elementwise(path: str, act: nn.Module) -> None:
    """UnsupportedModelError unless ``act`` is an activation that looks at one value at a time."""
    if not is_elementwise(act):
        raise UnsupportedModelError(
            f"{path}: expected an activation that treats all channels alike, got {type(act).__name__}"
        )


def need_plain(path: str, module: nn.Module, *kinds: type[nn.Module]) -> None:
    """UnsupportedModelError unless ``module`` is exactly of one of these classes."""
    if type(module) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise UnsupportedModelError(f"{path}: expected a plain {expected}, got {type(module).__name__}")


def writer(path: str, module: Any, block: int = 1, repeat: int = 1) -> tuple[Slice, ...]:
    """What shrinks of a layer, or a norm over channels, when units that it puts out go: all that is one a channel."""
    names = ("weight", "bias", "running_mean", "running_var")
    return tuple(
        Slice(f"{path}.{name}", 0, block, repeat) for name in names if getattr(module, name, None) is not None
    )


def reader(path: str, block: int = 1, repeat: int = 1) -> Slice:
    """What shrinks of a layer when units that it reads go."""
    return Slice(f"{path}.weight", 1, block, repeat)
