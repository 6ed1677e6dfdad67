"""Neurons of torchvision's transformers. The heads of ViT's attention are those of ``nn.MultiheadAttention``."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from mvp_ext.model.families.parts import Rule, is_elementwise, reader, writer
from mvp_ext.model.structure import Probe, UnitLayer, UnsupportedModelError


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module is torchvision's MLP: a sequence that its users run as a whole."""
    misc = sys.modules.get("torchvision.ops.misc")
    return (
        misc is not None
        and isinstance(module, misc.MLP)
        and "forward" not in vars(module)
        and type(module).forward is nn.Sequential.forward
    )


def _neuron_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """The hidden neurons of an MLP of two linear layers."""
    parts = [(name, part) for name, part in mlp.named_children() if not isinstance(part, nn.Dropout)]
    kinds = [type(part) for _, part in parts]
    if (
        len(parts) != 3
        or kinds[0] is not nn.Linear
        or kinds[2] is not nn.Linear
        or not is_elementwise(parts[1][1])
    ):
        got = ", ".join(kind.__name__ for kind in kinds)
        raise UnsupportedModelError(f"{path}: expected Linear, an activation and Linear, got {got}")
    (first, fc1), _, (last, fc2) = parts
    slices = (*writer(f"{path}.{first}", fc1), reader(f"{path}.{last}"))
    probe = Probe(f"{path}.{last}", "input", dim=-1)
    return [UnitLayer(path, "neuron", fc2.in_features, slices, probe)]


TORCHVISION = (Rule("torchvision", "mlp", _is_mlp, _neuron_layers),)
