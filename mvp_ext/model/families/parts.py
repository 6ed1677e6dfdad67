"""What every family is made of: rules, and what rules ask of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mvp_ext.model.structure import Attribute, Probe, Slice, UnitLayer, UnsupportedModelError

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
    """

    family: str
    part: Part
    knows: Callable[[nn.Module], bool]
    layers: Callable[[str, Any], list[UnitLayer]]


def computes_as(module: nn.Module, *known: type[nn.Module]) -> bool:
    """Whether ``module`` runs the very forward of one of these classes: its parts do not say how they are used."""
    return "forward" not in vars(module) and any(type(module).forward is cls.forward for cls in known)


def is_elementwise(act: nn.Module) -> bool:
    """Whether ``act`` is an activation that looks at one value at a time, and treats all channels alike."""
    known = type(act).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")
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


def head_layer(
    path: str,
    attn: Any,
    packed: Mapping[str, int],
    *,
    heads: int | None = None,
    out: str = "proj",
    more: Sequence[Slice] = (),
    attributes: Mapping[str, int] | None = None,
    narrowed: bool = False,
) -> UnitLayer:
    """The heads of an attention whose output projection reads one head after the other.

    Args:
        path, attn: the module, with its path.
        packed: name of a linear layer that writes for the heads → how many of q, k, v, gates it holds. The module may
            lack some.
        heads: how many units there are; default: ``attn.num_heads``.
        out: name of the output projection.
        more: what else has places for the heads.
        attributes: name of an attribute of the module → how much of it a unit makes; default: ``num_heads``, 1.
        narrowed: whether the module is to be taken over.
    """
    heads = attn.num_heads if heads is None else heads
    projection = getattr(attn, out)
    if not computes_as(projection, nn.Linear):
        raise UnsupportedModelError(f"{path}.{out}: expected a plain Linear, got {type(projection).__name__}")
    slices: list[Slice] = []
    for name, repeat in packed.items():
        if (linear := getattr(attn, name, None)) is not None:
            need_plain(f"{path}.{name}", linear, nn.Linear)
            slices += writer(f"{path}.{name}", linear, linear.out_features // (repeat * heads), repeat)
    return UnitLayer(
        path,
        "head",
        heads,
        (*slices, *more, reader(f"{path}.{out}", projection.in_features // heads)),
        Probe(f"{path}.{out}", "input", dim=-1, heads=heads),
        attributes=tuple(Attribute(path, n, k) for n, k in (attributes or {"num_heads": 1}).items()),
        narrowed=(path,) if narrowed else (),
    )


def neuron_layer(
    path: str, mlp: Any, into: Mapping[str, int], out: str, *, more: Sequence[Slice] = ()
) -> UnitLayer:
    """The hidden neurons of an MLP of linear layers or 1 × 1 convolutions.

    Args:
        path, mlp: the module, with its path.
        into: name of a layer that writes hidden neurons → how many parts of them (2 for a gate beside) it holds.
        out: name of the layer that reads them.
        more: what else has places for them.
    """
    parts = {name: mlp.get_submodule(name) for name in (*into, out)}
    for name, part in parts.items():
        need_plain(f"{path}.{name}", part, nn.Linear, nn.Conv2d)
        if isinstance(part, nn.Conv2d) and part.groups != 1:
            raise UnsupportedModelError(f"{path}.{name}: expected groups = 1, got groups = {part.groups}")
    slices = [each for name, n in into.items() for each in writer(f"{path}.{name}", parts[name], 1, n)]
    probe = Probe(f"{path}.{out}", "input", dim=1 if isinstance(parts[out], nn.Conv2d) else -1)
    units = parts[out].weight.shape[1]
    return UnitLayer(path, "neuron", units, (*slices, *more, reader(f"{path}.{out}")), probe)


def need_no_norm(path: str, module: Any, across: str) -> None:
    """UnsupportedModelError where ``module.norm`` normalises across the units."""
    if not isinstance(norm := getattr(module, "norm", nn.Identity()), nn.Identity):
        raise UnsupportedModelError(f"{path}.norm ({type(norm).__name__}): it normalises across {across}")


def reader(path: str, block: int = 1, repeat: int = 1) -> Slice:
    """What shrinks of a layer when units that it reads go."""
    return Slice(f"{path}.weight", 1, block, repeat)
