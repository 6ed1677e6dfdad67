"""Hidden neurons of MLPs of 1 × 1 convolutions, and of those with something between their layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mvp_ext.model.families.chain import chains, knows, layers_along, runs
from mvp_ext.model.families.parts import Rule, need_plain, writer
from mvp_ext.model.structure import UnitLayer

_MLP = "fc1 act drop1 norm fc2"
_CHAINS = {
    "timm.layers.GlobalResponseNormMlp": "fc1 act drop1 grn fc2",
    "timm.layers.ConvMlp": "fc1 norm act drop fc2",
    "timm.models.inception_next.ConvMlp": "fc1 norm act drop fc2",
    "timm.models.fastvit.ConvMlp": "fc1 act drop fc2",
    "timm.models.efficientformer.ConvMlpWithNorm": "fc1 norm1 act drop fc2",
    "timm.models.efficientformer_v2.ConvMlpWithNorm": "fc1 mid drop1 fc2",
    "timm.models.efficientvit_msra.ConvMlp": "pw1 act pw2",
    "timm.models.fasternet.MLPBlock": "mlp",
    "timm.models.repvit.RepVitMlp": "conv1 act conv2",
    "timm.models.shvit.FFN": "pw1 act pw2",
    "timm.models.swiftformer.ConvEncoder": "pwconv1 act pwconv2",
    "timm.models.swiftformer.LocalRepresentation": "pwconv1 act pwconv2",
    "timm.models.swiftformer.Mlp": "fc1 act drop fc2",
    "timm.models.tiny_vit.NormMlp": "fc1 act drop1 fc2",
    "timm.models.visformer.SpatialMlp": "conv1 act1 drop1 conv2 act2 conv3",
    "torchvision.models.convnext.CNBlock": "block",
}


def _star_layers(path: str, block: Any) -> list[UnitLayer]:
    """The hidden neurons of a StarNet's block: products of what two convolutions make of the same."""
    one, other = (layers_along("mlp", (name, "act", "g"), path, block)[0] for name in ("f1", "f2"))
    return [replace(one, slices=tuple(dict.fromkeys((*one.slices, *other.slices))))]


def _levit_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """The hidden neurons of LeViT's MLP: its linear layers have batch norms, for which all positions are one batch."""
    for name in ("ln1", "ln2"):
        need_plain(f"{path}.{name}.bn", getattr(mlp, name).bn, nn.BatchNorm1d, nn.BatchNorm2d)
    [layer] = layers_along("mlp", ("ln1.linear", "act", "drop", "ln2.linear"), path, mlp)
    return [replace(layer, slices=(*layer.slices, *writer(f"{path}.ln1.bn", mlp.ln1.bn)))]


CONVNEXT = (
    Rule(
        "convnext",
        "mlp",
        # Those of linear layers are a transformer's.
        lambda module: runs(module, "timm.layers.Mlp") and isinstance(module.fc1, nn.Conv2d),
        lambda path, mlp: layers_along("mlp", _MLP.split(), path, mlp),
    ),
    *chains("convnext", "mlp", _CHAINS),
    Rule("levit", "mlp", knows("timm.models.levit.LevitMlp"), _levit_layers, by_class=True),
    Rule("starnet", "mlp", knows("timm.models.starnet.Block"), _star_layers, by_class=True),
)
