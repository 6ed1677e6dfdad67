"""Hidden neurons of timm's other MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mvp_ext.model.families.parts import (
    Rule,
    computes_as,
    need_elementwise,
    need_no_norm,
    need_plain,
    neuron_layer,
    writer,
)
from mvp_ext.model.structure import Attribute, UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm


def _glu_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """GluMlp: the first layer puts out values and gates, one behind the other."""
    need_no_norm(path, mlp, "hidden neurons")
    need_elementwise(f"{path}.act", mlp.act)
    return [neuron_layer(path, mlp, {"fc1": 2}, "fc2")]


def _swiglu_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """SwiGLU: values and gates from a layer each."""
    need_no_norm(path, mlp, "hidden neurons")
    need_elementwise(f"{path}.act", mlp.act)
    return [neuron_layer(path, mlp, {"fc1_g": 1, "fc1_x": 1}, "fc2")]


def _norm_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """The MLP of TinyViT, with a norm of its input."""
    need_elementwise(f"{path}.act", mlp.act)
    return [neuron_layer(path, mlp, {"fc1": 1}, "fc2")]


def _depthwise_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """The MLP of PVTv2: each hidden neuron has a filter of its own between the layers."""
    conv = mlp.dwconv
    need_plain(f"{path}.dwconv", conv, nn.Conv2d)
    need_elementwise(f"{path}.act", mlp.act)
    need_elementwise(f"{path}.relu", mlp.relu)
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise UnsupportedModelError(
            f"{path}.dwconv: expected a depthwise convolution, got groups = {conv.groups}"
        )
    layer = neuron_layer(path, mlp, {"fc1": 1}, "fc2", more=writer(f"{path}.dwconv", conv))
    return [replace(layer, attributes=(Attribute(f"{path}.dwconv", "groups"),))]


def _levit_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """The MLP of LeViT: a batch norm behind each layer."""
    layers = import_timm().models.levit
    need_elementwise(f"{path}.act", mlp.act)
    for name in ("ln1", "ln2"):
        if not computes_as(getattr(mlp, name), layers.LinearNorm, layers.ConvNorm):
            raise UnsupportedModelError(
                f"{path}.{name}: expected a layer with a batch norm, got {type(getattr(mlp, name)).__name__}"
            )
    more = writer(f"{path}.ln1.bn", mlp.ln1.bn)
    return [neuron_layer(path, mlp, {"ln1.linear": 1}, "ln2.linear", more=more)]


MLP = (
    Rule("vit", "mlp", lambda m: computes_as(m, import_timm().layers.GluMlp), _glu_layers),
    Rule("vit", "mlp", lambda m: computes_as(m, import_timm().layers.SwiGLU), _swiglu_layers),
    Rule("vit", "mlp", lambda m: computes_as(m, import_timm().models.tiny_vit.NormMlp), _norm_layers),
    Rule(
        "vit",
        "mlp",
        lambda m: computes_as(m, import_timm().models.pvt_v2.MlpWithDepthwiseConv),
        _depthwise_layers,
    ),
    Rule("vit", "mlp", lambda m: computes_as(m, import_timm().models.levit.LevitMlp), _levit_layers),
)
