"""Hidden neurons of transformers' MLPs, gated ones among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mvp_ext.model.families.parts import Rule, computes_as, need_elementwise, need_plain, reader, writer
from mvp_ext.model.families.vit import timms
from mvp_ext.model.structure import Attribute, Probe, Slice, UnitLayer, UnsupportedModelError


@dataclass(frozen=True)
class _Mlp:
    """A class of MLPs.

    Attributes:
        known: where timm has the class.
        makers: linear layers that make the neurons, or norms over each of them → of how many parts (value and gate).
        reads: the linear layer that reads them.
        acts: activations between.
        across: what would look at all neurons at once, where it is more than an identity.
        depthwise: a convolution of each neuron by itself.
    """

    known: str
    makers: Mapping[str, int]
    reads: str = "fc2"
    acts: tuple[str, ...] = ("act",)
    across: tuple[str, ...] = ("norm",)
    depthwise: str | None = None

    def knows(self, module: nn.Module) -> bool:
        """Whether a module is one."""
        known = timms(self.known)
        return known is not None and computes_as(module, known)

    def layers(self, path: str, mlp: Any) -> list[UnitLayer]:
        """Its hidden neurons."""
        for name in self.across:
            if not isinstance(part := getattr(mlp, name, nn.Identity()), nn.Identity):
                raise UnsupportedModelError(
                    f"{path}.{name} ({type(part).__name__}): it normalises across hidden neurons"
                )
        for name in self.acts:
            need_elementwise(f"{path}.{name}", getattr(mlp, name))
        slices: list[Slice] = []
        attributes: tuple[Attribute, ...] = ()
        for name, repeat in self.makers.items():
            maker = mlp.get_submodule(name)
            _need_layer(f"{path}.{name}", maker, nn.BatchNorm1d, nn.BatchNorm2d)
            slices += writer(f"{path}.{name}", maker, 1, repeat)
        read = mlp.get_submodule(self.reads)
        _need_layer(f"{path}.{self.reads}", read)
        if self.depthwise is not None:
            conv = mlp.get_submodule(self.depthwise)
            need_plain(f"{path}.{self.depthwise}", conv, nn.Conv2d)
            slices += writer(f"{path}.{self.depthwise}", conv)
            attributes = (Attribute(f"{path}.{self.depthwise}", "groups"),)
        slices.append(reader(f"{path}.{self.reads}"))
        weight: Tensor = read.weight
        probe = Probe(f"{path}.{self.reads}", "input", dim=1 if weight.ndim == 4 else -1)
        return [UnitLayer(path, "neuron", weight.shape[1], tuple(slices), probe, attributes=attributes)]


def _need_layer(path: str, layer: nn.Module, *norms: type[nn.Module]) -> None:
    """UnsupportedModelError unless ``layer`` is a plain one, with each of its outputs of all inputs; or a norm."""
    need_plain(path, layer, nn.Linear, nn.Conv2d, *norms)
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise UnsupportedModelError(f"{path}: expected one group, got groups = {layer.groups}")


_MLPS = (
    _Mlp("layers.Mlp", {"fc1": 1}),
    _Mlp("layers.GluMlp", {"fc1": 2}),
    _Mlp("layers.SwiGLU", {"fc1_g": 1, "fc1_x": 1}),
    _Mlp("layers.GatedMlp", {"fc1": 1}, across=("norm", "gate")),
    _Mlp("models.vitamin.GeGluMlp", {"w0": 1, "w1": 1}, reads="w2", across=()),
    _Mlp("models.pvt_v2.MlpWithDepthwiseConv", {"fc1": 1}, acts=("relu", "act"), depthwise="dwconv"),
)


def _makes_biases(module: nn.Module) -> bool:
    known = ("layers.RelPosMlp", "models.swin_transformer_v2_cr.WindowMultiHeadAttention")
    return any(isinstance(module, kind) for each in known if (kind := timms(each)) is not None)


def _refuse_biases(path: str, module: nn.Module) -> list[UnitLayer]:
    raise UnsupportedModelError(f"{path}: its MLP reads relative positions, not images")


NEURONS = (
    Rule("vit", "mlp", _makes_biases, _refuse_biases, within=True),
    *(Rule("vit", "mlp", each.knows, each.layers, by_class=True) for each in _MLPS),
)
