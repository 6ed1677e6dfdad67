"""Heads and neurons of a transformer's blocks: timm's Attention, with rotary positions too, and its Mlp."""

from __future__ import annotations

from typing import Any

from mvp_ext.model.families.parts import (
    Rule,
    computes_as,
    head_layer,
    need_elementwise,
    need_no_norm,
    neuron_layer,
)
from mvp_ext.model.structure import UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm


def _head_layers(path: str, attn: Any) -> list[UnitLayer]:
    """The heads of timm's Attention."""
    if not hasattr(attn, "attn_dim"):
        raise UnsupportedModelError(
            f"{path}: this timm's Attention cannot be narrower than its input; a newer timm can"
        )
    need_no_norm(path, attn, "heads")
    # q_norm and k_norm work inside one head and share their weights between heads: nothing of theirs is cut. The
    # scale depends on head_dim only, and stays.
    sizes = {"num_heads": 1, "attn_dim": attn.head_dim}
    return [head_layer(path, attn, {"qkv": 3, "gate": 1}, attributes=sizes)]


def _rope_layers(path: str, attn: Any) -> list[UnitLayer]:
    """The heads of timm's AttentionRope: with grouped queries, the keys' heads with all queries that they answer."""
    need_no_norm(path, attn, "heads")
    width, sizes = attn.head_dim, {"num_heads": 1, "attn_dim": attn.head_dim}
    # Older timms have no grouped queries.
    if hasattr(attn, "num_kv_heads"):
        each = attn.num_heads // attn.num_kv_heads
        sizes = {"num_heads": each, "attn_dim": width * each, "num_kv_heads": 1, "kv_dim": width}
    projections = {"qkv": 3, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1}
    return [head_layer(path, attn, projections, heads=attn.num_heads // sizes["num_heads"], attributes=sizes)]


def _neuron_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """The hidden neurons of timm's Mlp."""
    need_no_norm(path, mlp, "hidden neurons")
    need_elementwise(f"{path}.act", mlp.act)
    return [neuron_layer(path, mlp, {"fc1": 1}, "fc2")]


VIT = (
    Rule("vit", "heads", lambda m: computes_as(m, import_timm().layers.Attention), _head_layers),
    Rule("vit", "heads", lambda m: computes_as(m, import_timm().layers.AttentionRope), _rope_layers),
    Rule("vit", "mlp", lambda m: computes_as(m, import_timm().layers.Mlp), _neuron_layers),
)
