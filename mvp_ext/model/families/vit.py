"""Heads of attentions: of timm's transformers and torch's own.

Each line of ``_ATTENTIONS`` is one class: which of its parts make the heads, what it keeps one of a head, and which of
its numbers follow.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mvp_ext.model.families.parts import Rule, computes_as, need_plain, reader, writer
from mvp_ext.model.narrow import NARROW
from mvp_ext.model.structure import Attribute, Probe, Slice, UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm


@dataclass(frozen=True)
class _Attention:
    """A class of attentions.

    Attributes:
        known: where timm has the class; or the class.
        makers: layers, or tensors of theirs, whose places are those of the heads → of how many parts (q, k, v).
        tables: tensors with one place a head → in which dimension.
        numbers: that follow.
        units: the number of the units.
        out: the layer that reads the heads.
        narrow: whether one of ours takes over where heads go.
        refuses: what is in the way in one of its modules, or "".
    """

    known: str | type[nn.Module]
    makers: Mapping[str, int] = field(default_factory=lambda: {"qkv": 3})
    tables: Mapping[str, int] = field(default_factory=dict)
    numbers: tuple[str, ...] = ("num_heads",)
    units: str = "num_heads"
    out: str = "proj"
    narrow: bool = False
    refuses: Callable[[Any], str] = lambda attn: ""

    def knows(self, module: nn.Module) -> bool:
        """Whether a module is one, or ours in its place."""
        known = timms(self.known) if isinstance(self.known, str) else self.known
        if known is None:
            return False
        if self.narrow:
            importlib.import_module("mvp_ext.model.narrow.attentions")
        ours: Any = NARROW.get(known, known)
        return computes_as(module, known, ours)

    def layers(self, path: str, attn: Any) -> list[UnitLayer]:
        """Its heads."""
        norm = getattr(attn, "norm", None)
        if not isinstance(norm, (nn.Identity, type(None))) and self.known not in _NORM_IS_ELSEWHERE:
            raise UnsupportedModelError(
                f"{path}.norm ({type(norm).__name__}): it normalises across heads (scale_norm)"
            )
        if reason := self.refuses(attn):
            raise UnsupportedModelError(f"{path}: {reason}")
        # Norms of q and k work inside one head and share their weights between heads: nothing of theirs is cut.
        units, narrowed = getattr(attn, self.units), [path] if self.narrow else []
        slices: list[Slice] = []
        for name, repeat in self.makers.items():
            # With the heads first, q, k and v of one lie side by side.
            repeat = 1 if getattr(attn, "head_first", False) else repeat
            slices += _made(f"{path}.{name}", _part(attn, name), units, repeat)
        slices += [
            Slice(f"{path}.{name}", dim) for name, dim in self.tables.items() if _part(attn, name) is not None
        ]
        attributes = [Attribute(path, name, getattr(attn, name) // units) for name in self.numbers]
        if (table := getattr(attn, "rel_pos", None)) is not None:
            more = _of_table(f"{path}.rel_pos", table)
            slices += more.slices
            attributes += more.attributes
            narrowed += more.narrowed
        out = getattr(attn, self.out)
        need_plain(f"{path}.{self.out}", out, nn.Linear, nn.Conv2d, _ITS_OWN)
        slices.append(reader(f"{path}.{self.out}", out.weight.shape[1] // units))
        dim = 1 if isinstance(out, nn.Conv2d) else -1
        probe = Probe(f"{path}.{self.out}", "input", dim=dim, heads=units)
        return [
            UnitLayer(
                path,
                "head",
                units,
                tuple(slices),
                probe,
                attributes=tuple(attributes),
                narrowed=tuple(narrowed),
            )
        ]


# torch's own last layer of an attention.
_ITS_OWN = nn.modules.linear.NonDynamicallyQuantizableLinear
# Their norm is one of what they read, or of what comes out of them.
_NORM_IS_ELSEWHERE = (
    "models.tiny_vit.Attention",
    "layers.AttentionPoolLatent",
    "models.pvt_v2.Attention",
    "models.twins.GlobalSubSampleAttn",
)


@dataclass(frozen=True)
class _Table:
    slices: list[Slice]
    attributes: list[Attribute]
    narrowed: list[str]


def _of_table(path: str, table: Any) -> _Table:
    """What shrinks of a module that gives each head its bias by relative positions."""
    layers = import_timm().layers
    if isinstance(table, layers.RelPosBias):
        return _Table([Slice(f"{path}.relative_position_bias_table", 1)], [], [path])
    if isinstance(table, layers.RelPosBiasTf):
        return _Table([Slice(f"{path}.relative_position_bias_table", 0)], [Attribute(path, "num_heads")], [])
    if isinstance(table, layers.RelPosMlp):
        need_plain(f"{path}.mlp.fc2", table.mlp.fc2, nn.Linear)
        made = writer(f"{path}.mlp.fc2", table.mlp.fc2)
        return _Table(list(made), [Attribute(path, "num_heads")], [path])
    raise UnsupportedModelError(f"{path}: expected a bias of relative positions, got {type(table).__name__}")


def timms(path: str) -> Any:
    """A class of timm's by its path there; None where this timm has none."""
    found: Any = import_timm()
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _part(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _made(path: str, maker: Any, units: int, repeat: int) -> tuple[Slice, ...]:
    """What shrinks of a layer, or of a tensor, that makes the heads."""
    if maker is None:
        return ()
    if isinstance(maker, Tensor):
        return (Slice(path, 0, maker.shape[0] // (units * repeat), repeat),)
    need_plain(path, maker, nn.Linear, nn.Conv2d)
    weight: Tensor = maker.weight
    return writer(path, maker, weight.shape[0] // (units * repeat), repeat)


def _old(attn: Any) -> str:
    return (
        ""
        if hasattr(attn, "attn_dim")
        else "this timm's Attention cannot be narrower than its input; a newer timm can"
    )


def _biased_keys(attn: Any) -> str:
    bias = getattr(attn, "k_bias", None)
    if bias is not None and not bias.is_meta and bool(bias.any()):
        return "k_bias: expected zeros in a buffer that no file holds, got others"
    return ""


def _without_table(attn: Any) -> str:
    tables = ("rel_pos", "relative_position_bias_table")
    if all(getattr(attn, name, None) is None for name in tables):
        return "expected relative positions of its own, got none: they are shared, and those of all heads"
    return ""


def _beit(attn: Any) -> str:
    return _biased_keys(attn) or _without_table(attn)


def _global_queries(attn: Any) -> str:
    return "its queries come from elsewhere (use_global)" if attn.use_global else ""


def _no_query(attn: Any) -> str:
    if not isinstance(attn.q, nn.Linear):
        return "its latents are its queries (q_proj=False)"
    return "expected a last layer, got none" * (not isinstance(attn.proj, nn.Linear))


def _torchs(attn: Any) -> str:
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        return "expected one projection of q, k and v, without bias_k, bias_v and add_zero_attn"
    return ""


_ATTENTIONS: tuple[Any, ...] = (
    _Attention(
        "layers.Attention",
        {"qkv": 3, "gate": 1},
        numbers=("num_heads", "attn_dim"),
        refuses=_old,
    ),
    # A unit is a head of k and v with the queries that it answers.
    _Attention(
        "layers.AttentionRope",
        {"qkv": 3, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1},
        numbers=("num_heads", "num_kv_heads", "attn_dim", "kv_dim"),
        units="num_kv_heads",
    ),
    _Attention(
        "models.eva.EvaAttention",
        {"qkv": 3, "q_bias": 1, "v_bias": 1, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1},
        narrow=True,
        refuses=_biased_keys,
    ),
    _Attention(
        "models.beit.Attention",
        {"qkv": 3, "q_bias": 1, "v_bias": 1},
        {"relative_position_bias_table": 1},
        narrow=True,
        refuses=_beit,
    ),
    _Attention("models.swin_transformer.WindowAttention", tables={"relative_position_bias_table": 1}),
    _Attention(
        "models.swin_transformer_v2.WindowAttention",
        {"qkv": 3, "q_bias": 1, "v_bias": 1},
        {"logit_scale": 0, "cpb_mlp.2.weight": 0},
        narrow=True,
        refuses=_biased_keys,
    ),
    _Attention(
        "models.swin_transformer_v2_cr.WindowMultiHeadAttention",
        {"qkv": 3, "meta_mlp.fc2": 1},
        {"logit_scale": 0},
        narrow=True,
    ),
    _Attention("models.vision_transformer_relpos.RelPosAttention", narrow=True, refuses=_without_table),
    _Attention("models.maxxvit.Attention2d"),
    _Attention("models.maxxvit.AttentionCl"),
    _Attention("models.vision_transformer_sam.Attention"),
    _Attention("models.hiera.MaskUnitAttention", numbers=("heads", "dim_out"), units="heads"),
    _Attention("models.mvitv2.MultiScaleAttention", numbers=("num_heads", "dim_out")),
    _Attention("models.gcvit.WindowAttentionGlobal", narrow=True, refuses=_global_queries),
    _Attention("models.convit.MHSA", narrow=True),
    _Attention("models.convit.GPSA", {"qk": 2, "v": 1, "pos_proj": 1}, {"gating_param": 0}, narrow=True),
    _Attention("models.metaformer.Attention", numbers=("num_heads", "attention_dim"), narrow=True),
    _Attention("models.davit.WindowAttention", narrow=True),
    _Attention("models.volo.Attention", narrow=True),
    _Attention("models.volo.ClassAttention", {"q": 1, "kv": 2}),
    _Attention("models.cait.ClassAttn", {"q": 1, "k": 1, "v": 1}, narrow=True),
    _Attention("models.crossvit.CrossAttention", {"wq": 1, "wk": 1, "wv": 1}, narrow=True),
    _Attention("models.xcit.XCA", tables={"temperature": 0}, narrow=True),
    _Attention("models.edgenext.CrossCovarianceAttn", tables={"temperature": 0}, narrow=True),
    _Attention("models.pvt_v2.Attention", {"q": 1, "kv": 2}, narrow=True),
    _Attention("models.twins.GlobalSubSampleAttn", {"q": 1, "kv": 2}, narrow=True),
    _Attention("models.twins.LocallyGroupedAttn", narrow=True),
    _Attention("models.tnt.Attention", {"qk": 2, "v": 1}, numbers=("num_heads", "hidden_dim")),
    _Attention(
        "models.tiny_vit.Attention",
        {"qkv": 1},
        {"attention_biases": 0},
        numbers=("num_heads", "out_dim"),
        narrow=True,
    ),
    _Attention(
        "models.efficientformer.Attention",
        {"qkv": 1},
        {"attention_biases": 0},
        numbers=("num_heads", "key_attn_dim", "val_attn_dim"),
        narrow=True,
    ),
    _Attention("layers.AttentionPoolLatent", {"q": 1, "kv": 2}, narrow=True, refuses=_no_query),
    _Attention(
        nn.MultiheadAttention,
        {"in_proj_weight": 3, "in_proj_bias": 3},
        out="out_proj",
        narrow=True,
        refuses=_torchs,
    ),
)


def _has_positions_of_each_head(module: nn.Module) -> bool:
    kind = timms("layers.RotaryEmbeddingMixed")
    return kind is not None and any(isinstance(child, kind) for child in module.children())


def _refuse_positions(path: str, module: nn.Module) -> list[UnitLayer]:
    raise UnsupportedModelError(
        f"{path or type(module).__name__}: its rotary embeddings are those of each head, and made for all of them"
    )


VIT = (
    Rule("vit", "heads", _has_positions_of_each_head, _refuse_positions, within=True),
    *(Rule("vit", "heads", each.knows, each.layers, by_class=True) for each in _ATTENTIONS),
)
