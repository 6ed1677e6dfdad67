"""Attentions of timm and torch that end in a tensor as wide as their input; ours end in one as wide as their heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvp_ext.model.narrow import NARROW
from mvp_ext.timm_compat import import_timm

_timm: Any = import_timm()
_models: Any = _timm.models


class _Narrow(nn.Module):
    """An attention that takes over another one: its parts, tensors, numbers and hooks, under their names.

    Args:
        attn: the attention to take over; it stays as it is.
    """

    def __init__(self, attn: nn.Module) -> None:
        # Not nn.Module's: there is nothing to be made.
        self.__dict__.update(
            {name: value.copy() if isinstance(value, dict) else value for name, value in vars(attn).items()}
        )

    if TYPE_CHECKING:
        # Its parts are those of the other one.
        def __getattr__(self, name: str) -> Any: ...

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, in the place of {_original(type(self)).__name__}"


def _original(ours: Any) -> Any:
    """The class whose modules one of ours takes over."""
    return next(base for base in ours.__bases__ if not issubclass(base, _Narrow))


def _heads(y: Tensor, parts: int, heads: int) -> list[Tensor]:
    """[B, N, parts · heads · d] → ``parts`` of [B, heads, N, d]."""
    return list(y.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))


def _joined(x: Tensor) -> Tensor:
    """[B, heads, N, d] → [B, N, heads · d]."""
    return x.transpose(1, 2).flatten(2)


def _attended(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q · kᵀ · scale + bias) · v, its heads joined, through the attention's last layer."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
    return attn.proj_drop(attn.proj(_joined(x)))


def _qkv(attn: Any, x: Tensor) -> Tensor:
    """[B, N, C] → [B, N, 3 · heads · d], where the keys have no bias."""
    if attn.q_bias is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
    return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


class _NoKeyBias(_Narrow):
    """Of an attention with a buffer of zeros as its keys' bias, which no file holds: ours does without."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__(attn)
        self._buffers["k_bias"] = None


class NarrowEvaAttention(_NoKeyBias, _models.eva.EvaAttention):  # type: ignore[misc]
    """timm's EvaAttention (EVA, DINOv3, Perception Encoder) with any number of heads."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x: float [B, N, C] → [B, N, C]; the rest as timm has it."""
        gate = None if self.gate is None else self.gate(x).sigmoid()
        if self.qkv is not None:
            q, k, v = _heads(_qkv(self, x), 3, self.num_heads)
        else:
            q, k, v = (_heads(f(x), 1, self.num_heads)[0] for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            n, half = self.num_prefix_tokens, self.rotate_half
            turn = _timm.layers.apply_rot_embed_cat
            q, k = (
                torch.cat([t[:, :, :n], turn(t[:, :, n:], rope, half=half)], dim=2).type_as(v) for t in (q, k)
            )
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
        x = _joined(x)
        return self.proj_drop(self.proj(x if gate is None else x * gate))


class NarrowBeitAttention(_NoKeyBias, _models.beit.Attention):  # type: ignore[misc]
    """BEiT's Attention with any number of heads; a relative position is a bias of each head."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """x: float [B, N, C] → [B, N, C]."""
        q, k, v = _heads(_qkv(self, x), 3, self.num_heads)
        bias = self._get_rel_pos_bias()
        return _attended(self, q, k, v, bias if shared_rel_pos_bias is None else bias + shared_rel_pos_bias)


def _windows_bias(bias: Tensor, mask: Tensor | None, windows: int) -> Tensor:
    """bias [1, heads, N, N] and a mask [n, N, N] of each image's windows → [windows or 1, heads, N, N]."""
    if mask is None:
        return bias
    return (bias + mask[:, None]).repeat(windows // mask.shape[0], 1, 1, 1)


def _cosine(attn: Any, x: Tensor, qkv: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of Swin V2: by the cosine of q and k, with a scale for each head."""
    q, k, v = _heads(qkv, 3, attn.num_heads)
    scale = attn.logit_scale.reshape(-1, 1, 1).clamp(max=4.605170185988092).exp()
    weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
    weights = (weights + _windows_bias(bias, mask, x.shape[0])).softmax(-1)
    return attn.proj_drop(attn.proj(_joined(attn.attn_drop(weights) @ v)))


class NarrowSwinV2Attention(_NoKeyBias, _models.swin_transformer_v2.WindowAttention):  # type: ignore[misc]
    """Swin V2's WindowAttention with any number of heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: float [B · windows, N, C], mask: [windows, N, N] or None → as x."""
        area = self.window_size[0] * self.window_size[1]
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        bias = table[self.relative_position_index.view(-1)].view(1, area, area, -1).permute(0, 3, 1, 2)
        return _cosine(self, x, _qkv(self, x), 16 * bias.sigmoid(), mask)


class NarrowSwinV2CrAttention(_Narrow, _models.swin_transformer_v2_cr.WindowMultiHeadAttention):  # type: ignore[misc]
    """The window attention of timm's swin_transformer_v2_cr with any number of heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: float [B · windows, N, C], mask: [windows, N, N] or None → as x."""
        return _cosine(self, x, self.qkv(x), self._relative_positional_encodings(), mask)


class NarrowRelPosAttention(_Narrow, _models.vision_transformer_relpos.RelPosAttention):  # type: ignore[misc]
    """timm's RelPosAttention with any number of heads."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """x: float [B, N, C] → [B, N, C]."""
        q, k, v = _heads(self.qkv(x), 3, self.num_heads)
        return _attended(self, self.q_norm(q), self.k_norm(k), v, self.rel_pos.get_bias())


class NarrowGcVitAttention(_Narrow, _models.gcvit.WindowAttentionGlobal):  # type: ignore[misc]
    """GC ViT's window attention with any number of heads, where its queries are its own."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """x: float [B, N, C] → [B, N, C]."""
        q, k, v = _heads(self.qkv(x), 3, self.num_heads)
        return _attended(self, q, k, v, self.rel_pos.get_bias())


class _NarrowPlain(_Narrow):
    """Of attentions that are no more than q, k, v of one matrix, softmax and a last layer."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, N, C] → [B, N, C]."""
        return _attended(self, *_heads(self.qkv(x), 3, self.num_heads))


class NarrowMHSA(_NarrowPlain, _models.convit.MHSA):  # type: ignore[misc]
    """ConViT's MHSA with any number of heads."""


class NarrowMetaFormerAttention(_NarrowPlain, _models.metaformer.Attention):  # type: ignore[misc]
    """MetaFormer's Attention (CAFormer) with any number of heads."""


class NarrowGPSA(_Narrow, _models.convit.GPSA):  # type: ignore[misc]
    """ConViT's gated positional self-attention with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, N, C] → [B, N, C]."""
        indices: Any = self._buffers["rel_indices"]
        if indices.shape[1] != x.shape[1]:
            self._buffers["rel_indices"] = indices = self.get_rel_indices(x.shape[1])
        q, k = _heads(self.qk(x), 2, self.num_heads)
        content = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        position = self.pos_proj(indices).permute(0, 3, 1, 2).softmax(-1)
        gate = self.gating_param.view(1, -1, 1, 1).sigmoid()
        weights = (1 - gate) * content + gate * position
        weights = self.attn_drop(weights / weights.sum(-1, keepdim=True))
        v = _heads(self.v(x), 1, self.num_heads)[0]
        return self.proj_drop(self.proj(_joined(weights @ v)))


class NarrowDaVitAttention(_Narrow, _models.davit.WindowAttention):  # type: ignore[misc]
    """DaViT's window attention with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B · windows, N, C] → as x."""
        q, k, v = _heads(self.qkv(x), 3, self.num_heads)
        return self.proj(_joined(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))


class NarrowVoloAttention(_Narrow, _models.volo.Attention):  # type: ignore[misc]
    """VOLO's Attention with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, H, W, C] → as x."""
        q, k, v = _heads(self.qkv(x.flatten(1, 2)), 3, self.num_heads)
        return _attended(self, q, k, v).reshape(x.shape)


class NarrowClassAttn(_Narrow, _models.cait.ClassAttn):  # type: ignore[misc]
    """CaiT's ClassAttn with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, N, C], the class token first → [B, 1, C]."""
        q, k, v = (
            _heads(f(t), 1, self.num_heads)[0] for f, t in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        return _attended(self, q, k, v)


class NarrowCrossAttention(_Narrow, _models.crossvit.CrossAttention):  # type: ignore[misc]
    """CrossViT's CrossAttention with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, N, C], the class token first → [B, 1, C]."""
        q, k, v = (
            _heads(f(t), 1, self.num_heads)[0] for f, t in ((self.wq, x[:, :1]), (self.wk, x), (self.wv, x))
        )
        return _attended(self, q, k, v)


class _NarrowCrossCovariance(_Narrow):
    """Of an attention between channels."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, N, C] → [B, N, C]."""
        q, k, v = (t.transpose(-2, -1) for t in _heads(self.qkv(x), 3, self.num_heads))
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        # timm's XCA drops none of them where it is fused.
        weights = (
            weights.softmax(-1)
            if vars(self).get("fused_attn", False)
            else self.attn_drop(weights.softmax(-1))
        )
        return self.proj_drop(self.proj(_joined((weights @ v).transpose(-2, -1))))


class NarrowXCA(_NarrowCrossCovariance, _models.xcit.XCA):  # type: ignore[misc]
    """XCiT's cross-covariance attention with any number of heads."""


class NarrowCrossCovarianceAttn(_NarrowCrossCovariance, _models.edgenext.CrossCovarianceAttn):  # type: ignore[misc]
    """EdgeNeXt's cross-covariance attention with any number of heads."""


def _as_map(x: Tensor, size: Any) -> Tensor:
    """[B, h · w, C] → [B, C, h, w]."""
    return x.transpose(1, 2).unflatten(2, tuple(size))


def _as_tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] → [B, h · w, C]."""
    return x.flatten(2).transpose(1, 2)


class NarrowPvtAttention(_Narrow, _models.pvt_v2.Attention):  # type: ignore[misc]
    """PVT v2's Attention with any number of heads."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """x: float [B, h · w, C] → as x."""
        (q,) = _heads(self.q(x), 1, self.num_heads)
        if self.pool is not None:
            x = self.act(self.norm(_as_tokens(self.sr(self.pool(_as_map(x, feat_size))))))
        elif self.sr is not None:
            x = self.norm(_as_tokens(self.sr(_as_map(x, feat_size))))
        return _attended(self, q, *_heads(self.kv(x), 2, self.num_heads))


class NarrowGlobalSubSampleAttn(_Narrow, _models.twins.GlobalSubSampleAttn):  # type: ignore[misc]
    """Twins' attention to a smaller map, with any number of heads."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: float [B, h · w, C] → as x."""
        (q,) = _heads(self.q(x), 1, self.num_heads)
        if self.sr is not None:
            x = self.norm(_as_tokens(self.sr(_as_map(x, size))))
        return _attended(self, q, *_heads(self.kv(x), 2, self.num_heads))


class NarrowLocallyGroupedAttn(_Narrow, _models.twins.LocallyGroupedAttn):  # type: ignore[misc]
    """Twins' attention in windows, with any number of heads."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: float [B, h · w, C] → as x."""
        (h, w), side = size, self.ws
        x = F.pad(x.unflatten(1, (h, w)), (0, 0, 0, -w % side, 0, -h % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3).flatten(3, 4)
        x = x.flatten(0, 2)
        x = _attended(self, *_heads(self.qkv(x), 3, self.num_heads))
        x = x.unflatten(1, (side, side)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1, 2)


class NarrowAttentionPoolLatent(_Narrow, _timm.layers.AttentionPoolLatent):  # type: ignore[misc]
    """timm's AttentionPoolLatent (SigLIP's head) with any number of heads."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x: float [B, N, C] → [B, C], or [B, latents, C] where nothing is pooled."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        (q,) = _heads(self.q(self.latent.expand(x.shape[0], -1, -1)), 1, self.num_heads)
        k, v = _heads(self.kv(x), 2, self.num_heads)
        x = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, scale=self.scale
        )
        x = self.proj_drop(self.proj(_joined(x)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x


class _WithoutCache(_Narrow):
    """Of an attention that keeps the biases of its heads in eval mode: ours looks them up each time."""

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """float [heads, N, N]."""
        return self.attention_biases[:, self.attention_bias_idxs]


class NarrowTinyVitAttention(_WithoutCache, _models.tiny_vit.Attention):  # type: ignore[misc]
    """TinyViT's Attention with any number of heads."""


class NarrowEfficientFormerAttention(_WithoutCache, _models.efficientformer.Attention):  # type: ignore[misc]
    """EfficientFormer's Attention with any number of heads."""


class _NarrowTable(_Narrow):
    """Of a relative position's bias of each head: its shape names their number, and here only that it is the rest."""

    def __init__(self, table: Any) -> None:
        super().__init__(table)
        self.bias_shape = (*table.bias_shape[:2], -1)

    def extra_repr(self) -> str:
        return f"in the place of {_original(type(self)).__name__}"


class NarrowRelPosBias(_NarrowTable, _timm.layers.RelPosBias):  # type: ignore[misc]
    """timm's RelPosBias for any number of heads."""


class NarrowRelPosMlp(_NarrowTable, _timm.layers.RelPosMlp):  # type: ignore[misc]
    """timm's RelPosMlp for any number of heads."""


class NarrowMultiheadAttention(_Narrow, nn.MultiheadAttention):  # type: ignore[misc]
    """torch's self-attention of one packed projection (vit_b_16, CLIP) with any number of heads.

    ``num_heads``, ``in_proj_weight``, ``in_proj_bias`` and ``out_proj`` are those of the heads that are left;
    ``embed_dim`` and ``head_dim`` stay.
    """

    def __init__(self, attn: nn.Module) -> None:
        super().__init__(attn)
        # What torch's encoder layers ask before they compute it all without calling us.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's; a mask of each head is refused.

        Returns:
            As query; and the attention [B, L, S], or [B, heads, L, S], if ``need_weights``.

        Raises:
            ValueError: a mask [B · heads, L, S].
        """
        if attn_mask is not None and attn_mask.ndim != 2:
            raise ValueError(
                f"NarrowMultiheadAttention: attn_mask: expected shape [L, S], got {tuple(attn_mask.shape)}"
            )
        weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            _heads(F.linear(self._first(x), weight, bias), 1, self.num_heads)[0]
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        bias = None if attn_mask is None else _added(attn_mask, q.dtype)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype).reshape(q.shape[0], 1, 1, -1)
            bias = padding if bias is None else bias + padding
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
            return self._as_query(self.out_proj(_joined(y)), query), None
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        attention = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
        y = self._as_query(self.out_proj(_joined(attention @ v)), query)
        attention = attention.mean(1) if average_attn_weights else attention
        return y, attention if query.ndim == 3 else attention[0]

    def _first(self, x: Tensor) -> Tensor:
        """The batch first: [B, N, C]."""
        if x.ndim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _as_query(self, y: Tensor, query: Tensor) -> Tensor:
        if query.ndim == 2:
            return y[0]
        return y if self.batch_first else y.transpose(0, 1)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is True where nobody looks, as one that is added."""
    return (
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
        if mask.dtype is torch.bool
        else mask
    )


NARROW.update(
    {
        _original(each): each
        for each in list(globals().values())
        if isinstance(each, type) and issubclass(each, _Narrow) and not each.__name__.startswith("_")
    }
)
