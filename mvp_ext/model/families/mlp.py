"""Hidden neurons of timm's other MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mvp_ext.model.families.chain import knows
from mvp_ext.model.families.parts import (
    Rule,
    need_elementwise,
    need_no_norm,
    need_plain,
    neuron_layer,
    writer,
)
from mvp_ext.model.structure import Attribute, UnitLayer, UnsupportedModelError


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


MLP = (
    Rule("vit", "mlp", knows("timm.layers.GluMlp"), _glu_layers),
    Rule("vit", "mlp", knows("timm.layers.SwiGLU"), _swiglu_layers),
    Rule("vit", "mlp", knows("timm.models.pvt_v2.MlpWithDepthwiseConv"), _depthwise_layers),
)
