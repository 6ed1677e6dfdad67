"""Attentions whose output is as wide as their input, whatever their heads: here it is as wide as the heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvp_ext.model.narrow.taken import Taken
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.timm_compat import import_timm


class _SelfAttention(Taken):
    """Self-attention from a packed projection, or three, by torch's fused attention.

    Their keys have a bias of zeros, a buffer that no file holds: here it is none.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        bias = self._buffers.get("k_bias")
        if bias is not None:
            self._buffers["k_bias"] = None
        if bias is not None and not bias.is_meta and bool(bias.any()):
            raise UnsupportedModelError(
                f"{self.taken_from}: expected a bias of zeros for the keys (k_bias), got other values"
            )

    def _split(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of x, float [B, heads, N, head width] each."""
        batch, tokens, _ = x.shape
        if self.qkv is None:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k, v = (part.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2) for part in parts)
            return q, k, v
        bias = (
            None
            if self.q_bias is None
            else torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        )
        # As they do it: under autocast, or in bfloat16, it is another rounding.
        if bias is None or self.qkv_bias_separate:
            qkv = self.qkv(x) if bias is None else self.qkv(x) + bias
        else:
            qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _attend(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """float [B, N, heads · head width]."""
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.scale
        )
        return y.transpose(1, 2).flatten(2)


class NarrowEvaAttention(_SelfAttention):
    """In the place of timm's EvaAttention (EVA, EVA02, DINOv3, ViTs with rotary positions)."""

    def forward(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """x: float [B, N, C] → float [B, N, C]; the others as there."""
        q, k, v = self._split(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._turned(q, rope).type_as(v), self._turned(k, rope).type_as(v)
        y = self._attend(q, k, v, attn_mask, is_causal)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def _turned(self: Any, x: Tensor, rope: Tensor) -> Tensor:
        """Rotary positions on all tokens but the first, which stand for no place of the image."""
        turn = import_timm().layers.apply_rot_embed_cat
        first = self.num_prefix_tokens
        half = getattr(self, "rotate_half", False)
        return torch.cat((x[:, :, :first], turn(x[:, :, first:], rope, half=half)), 2)


class NarrowBeitAttention(_SelfAttention):
    """In the place of the Attention of timm's BEiT, with a table of relative positions: a column a head."""

    # So that both ways of projecting are asked for in one way.
    q_proj = k_proj = v_proj = None

    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """x: float [B, N, C] → float [B, N, C]; the other as there."""
        side = self.window_size[0] * self.window_size[1] + 1
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(side, side, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if shared_rel_pos_bias is not None:
            bias = bias + shared_rel_pos_bias
        return self.proj_drop(self.proj(self._attend(*self._split(x), bias)))


class NarrowMultiheadAttention(Taken):
    """In the place of torch's MultiheadAttention with one packed projection."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # torch's encoder layers would else hand the tensors to a kernel that knows one width.
        self._qkv_same_embed_dim = False

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As there, for batches: float [B, L, E] (or [L, B, E]) → the same shape, and the weights where asked for.

        Raises:
            ValueError: a mask for each head: some heads are gone. Or no batch.
        """
        if query.ndim != 3:
            raise ValueError(
                f"MultiheadAttention: query: expected a batch, [B, L, E], got {tuple(query.shape)}"
            )
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = _both(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        scores = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            scores = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = scores @ v
            scores = scores.mean(1) if average_attn_weights else scores
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y if self.batch_first else y.transpose(0, 1), scores


def _both(attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One mask to add, for [L, S] of places and [B, S] of keys; what is True in a mask of flags is left out."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype is not torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))

    if attn_mask is not None and attn_mask.ndim != 2:
        raise ValueError(
            f"MultiheadAttention: attn_mask: expected [L, S], as some heads were cut, got {tuple(attn_mask.shape)}"
        )
    masks = [] if attn_mask is None else [added(attn_mask)]
    if padding is not None:
        masks.append(added(padding)[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None
