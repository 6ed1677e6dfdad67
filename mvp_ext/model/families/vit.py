"""Heads and neurons of a transformer's blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvp_ext.model.families.parts import Rule, computes_as, need_elementwise, need_plain, reader, writer
from mvp_ext.model.structure import Attribute, Probe, Slice, UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm


def _head_layers(path: str, attn: Any) -> list[UnitLayer]:
    """The heads of timm's Attention."""
    if not hasattr(attn, "attn_dim"):
        raise UnsupportedModelError(
            f"{path}: this timm's Attention cannot be narrower than its input; a newer timm can"
        )
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise UnsupportedModelError(
            f"{path}.norm ({type(attn.norm).__name__}): it normalises across heads (scale_norm)"
        )
    # q_norm and k_norm work inside one head and share their weights between heads: nothing of theirs is cut.
    heads, width = attn.num_heads, attn.head_dim
    slices: list[Slice] = []
    for name, repeat in (("qkv", 3), ("gate", 1)):
        if (linear := getattr(attn, name, None)) is not None:
            need_plain(f"{path}.{name}", linear, nn.Linear)
            slices += writer(f"{path}.{name}", linear, width, repeat)
    need_plain(f"{path}.proj", attn.proj, nn.Linear)
    slices.append(reader(f"{path}.proj", width))
    probe = Probe(f"{path}.proj", "input", dim=-1, heads=heads)
    # The scale depends on head_dim only, and stays.
    attributes = (Attribute(path, "num_heads"), Attribute(path, "attn_dim", width))
    return [UnitLayer(path, "head", heads, tuple(slices), probe, attributes=attributes)]


def _neuron_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """The hidden neurons of timm's Mlp."""
    if not isinstance(mlp.norm, nn.Identity):
        raise UnsupportedModelError(
            f"{path}.norm ({type(mlp.norm).__name__}): it normalises across hidden neurons"
        )
    need_elementwise(f"{path}.act", mlp.act)
    need_plain(f"{path}.fc1", mlp.fc1, nn.Linear)
    need_plain(f"{path}.fc2", mlp.fc2, nn.Linear)
    slices = (*writer(f"{path}.fc1", mlp.fc1), reader(f"{path}.fc2"))
    return [UnitLayer(path, "neuron", mlp.fc1.out_features, slices, Probe(f"{path}.fc2", "input", dim=-1))]


VIT = (
    Rule("vit", "heads", lambda m: computes_as(m, import_timm().layers.Attention), _head_layers),
    Rule("vit", "mlp", lambda m: computes_as(m, import_timm().layers.Mlp), _neuron_layers),
)
