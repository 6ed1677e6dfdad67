"""Heads of timm's other attentions. What is not here mixes its heads, or has them in an order of its own."""

from __future__ import annotations

from typing import Any

from mvp_ext.model.families.chain import knows
from mvp_ext.model.families.parts import Rule, head_layer, need_no_norm
from mvp_ext.model.structure import Slice, UnitLayer, UnsupportedModelError


def _eva_layers(path: str, attn: Any) -> list[UnitLayer]:
    """EVA, EVA02, DINOv3 and ViTs with rotary positions."""
    need_no_norm(path, attn, "heads")
    projections = {"qkv": 3, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1}
    return [head_layer(path, attn, projections, more=_biases(path, attn), narrowed=True)]


def _beit_layers(path: str, attn: Any) -> list[UnitLayer]:
    """BEiT: each block's own table of relative positions has a column a head."""
    if attn.relative_position_bias_table is None:
        raise UnsupportedModelError(
            f"{path}: expected a table of relative positions of its own, got none: one may be shared by all blocks"
        )
    more = (*_biases(path, attn), Slice(f"{path}.relative_position_bias_table", 1))
    return [head_layer(path, attn, {"qkv": 3}, more=more, narrowed=True)]


def _biases(path: str, attn: Any) -> tuple[Slice, ...]:
    """Biases of q, k and v that are no linear layer's."""
    return tuple(
        Slice(f"{path}.{name}", 0, len(bias) // attn.num_heads)
        for name in ("q_bias", "v_bias")
        if (bias := getattr(attn, name, None)) is not None
    )


def _swin_layers(path: str, attn: Any) -> list[UnitLayer]:
    """Swin: a column of its table of relative positions a head."""
    return [head_layer(path, attn, {"qkv": 3}, more=(Slice(f"{path}.relative_position_bias_table", 1),))]


def _sam_layers(path: str, attn: Any) -> list[UnitLayer]:
    """SAM: its relative positions are the same for all heads."""
    return [head_layer(path, attn, {"qkv": 3})]


def _hiera_layers(path: str, attn: Any) -> list[UnitLayer]:
    """Hiera: attention inside of mask units."""
    sizes = {"heads": 1, "dim_out": attn.head_dim}
    return [head_layer(path, attn, {"qkv": 3}, heads=attn.heads, attributes=sizes)]


def _multihead_layers(path: str, attn: Any) -> list[UnitLayer]:
    """torch's own."""
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        raise UnsupportedModelError(
            f"{path}: expected one packed projection of q, k and v, got several, or keys without a token"
        )
    width = attn.head_dim
    names = [name for name in ("in_proj_weight", "in_proj_bias") if getattr(attn, name) is not None]
    more = [Slice(f"{path}.{name}", 0, width, 3) for name in names]
    return [head_layer(path, attn, {}, out="out_proj", more=more, narrowed=True)]


_OURS = "mvp_ext.model.narrow.attention"
ATTENTION = tuple(
    Rule("vit", "heads", knows(*classes), layers)
    for layers, *classes in (
        (_eva_layers, "timm.models.eva.EvaAttention", f"{_OURS}.NarrowEvaAttention"),
        (_beit_layers, "timm.models.beit.Attention", f"{_OURS}.NarrowBeitAttention"),
        (_swin_layers, "timm.models.swin_transformer.WindowAttention"),
        (_sam_layers, "timm.models.vision_transformer_sam.Attention"),
        (_hiera_layers, "timm.models.hiera.MaskUnitAttention"),
        (_multihead_layers, "torch.nn.MultiheadAttention", f"{_OURS}.NarrowMultiheadAttention"),
    )
)
