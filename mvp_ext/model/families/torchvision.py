"""Neurons of torchvision's transformers. The heads of its ViT are those of ``nn.MultiheadAttention``."""

from __future__ import annotations

from torch import nn

from mvp_ext.model.families.chain import knows, layers_along
from mvp_ext.model.families.parts import Rule
from mvp_ext.model.structure import UnitLayer


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module is torchvision's MLP: a sequence that its users run as a whole."""
    kinds = (cls for cls in type(module).__mro__ if cls.__module__ == "torchvision.ops.misc")
    return any(cls.__name__ == "MLP" for cls in kinds) and knows("torch.nn.Sequential")(module)


def _neuron_layers(path: str, mlp: nn.Module) -> list[UnitLayer]:
    return layers_along("mlp", tuple(mlp._modules), path, mlp)


TORCHVISION = (Rule("torchvision", "mlp", _is_mlp, _neuron_layers),)
