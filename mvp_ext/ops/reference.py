"""The ops in plain torch: readable, any device, float64-capable. Every kernel is tested against these.

Same names and signatures as the ops'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops.philox import gumbel_noise
from mvp_ext.ops.vote import Vote, kept_units


def importance(
    a: Tensor, grad: Tensor | None = None, *, kind: str, dim: int = 1, heads: int | None = None
) -> Tensor:
    a = a if a.dtype == torch.float64 else a.float()
    if kind == "activation":
        terms = a.abs()
    else:
        assert grad is not None
        terms = a * grad.to(a.dtype)
    terms = terms.movedim(dim, 1)
    units = terms.shape[1] if heads is None else heads
    terms = terms.reshape(a.shape[0], units, -1) if terms.numel() else terms.new_zeros(a.shape[0], units, 0)
    if kind == "activation":
        return terms.mean((0, 2))
    example = terms.sum(2)  # [B, units]
    return (example.abs() if kind == "taylor" else example.square()).sum(0)


def merge(
    base: Sequence[Tensor],
    voters: Sequence[Sequence[Tensor]],
    voter_rows: Sequence[Sequence[Tensor | None]],
    voter_cols: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
) -> list[Tensor]:
    merged = []
    for p, full in enumerate(base):
        accumulator = torch.float64 if full.dtype is torch.float64 else torch.float32
        total = torch.zeros_like(full, dtype=accumulator)
        weighted = torch.zeros_like(full, dtype=accumulator)
        for v, weight in enumerate(weights.to(torch.float32).tolist()):
            if weight == 0:
                continue
            here = (voter_rows[v][p],), (voter_cols[v][p],)
            wide, kept = torch.zeros_like(total), torch.zeros_like(total)
            unpack([voters[v][p].to(accumulator)], [wide], *here)
            unpack([torch.ones_like(voters[v][p], dtype=accumulator)], [kept], *here)
            total += weight * kept
            weighted += weight * wide
        mean = torch.where(total > 0, weighted / total, full.to(accumulator)).to(full.dtype)
        merged += pack([mean], [rows[p]], [cols[p]])
    return merged


def meta_vote(
    masks: Tensor,
    weights: Tensor | None = None,
    *,
    layers: Sequence[int],
    keep: float | Sequence[float] | Sequence[int],
    prior: Tensor | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    align: int = 1,
) -> Vote:
    kept = kept_units(layers, keep, align)
    votes = _votes(masks, weights)
    if temperature is None:
        keys = votes
    else:
        assert seed is not None
        targets = votes.shape[0] if votes.ndim == 2 else None
        noise = gumbel_noise(votes.shape[-1], seed=seed, targets=targets, device=votes.device)
        keys = votes / torch.tensor(temperature, dtype=torch.float32, device=votes.device) + noise
    order = torch.zeros_like(keys) if prior is None else prior.float().expand_as(keys)
    index = torch.cat(
        [
            _largest(k, p, count)
            for k, p, count in zip(
                keys.split(list(layers), -1), order.split(list(layers), -1), kept, strict=True
            )
        ]
        or [keys.new_zeros(keys.shape, dtype=torch.int64)],
        dim=-1,
    )
    first = torch.tensor([0, *layers[:-1]]).cumsum(0).repeat_interleave(torch.tensor(kept, dtype=torch.int64))
    mask = torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, index + first.to(index.device), True)
    return Vote(mask, index.to(torch.int32), votes, kept)


def _votes(masks: Tensor, weights: Tensor | None) -> Tensor:
    """Voter by voter, in float32: the order of the additions is part of the definition. [U] or [T, U]"""
    if weights is None:
        weights = torch.ones(masks.shape[0], device=masks.device)
    votes = torch.zeros(*weights.shape[:-1], masks.shape[1], device=masks.device)
    for voter, mask in enumerate(masks):
        votes = votes + torch.where(mask, weights[..., voter, None].float(), 0.0)
    return votes


def _largest(keys: Tensor, prior: Tensor, count: int) -> Tensor:
    """Ascending positions of the ``count`` largest (key, prior, -position); NaN is below every number. [..., count]"""
    order = (-prior).sort(dim=-1, stable=True).indices  # ascending and of the negative: NaN comes last
    order = order.gather(-1, (-keys).gather(-1, order).sort(dim=-1, stable=True).indices)
    return order[..., :count].sort(dim=-1).values


def pack(
    tensors: Sequence[Tensor], rows: Sequence[Tensor | None], cols: Sequence[Tensor | None]
) -> list[Tensor]:
    packed = []
    for tensor, row, col in zip(tensors, rows, cols, strict=True):
        part = tensor.detach().clone()
        part = part if row is None else part.index_select(0, row)
        packed.append(part if col is None else part.index_select(1, col))
    return packed


def unpack(
    packed: Sequence[Tensor],
    out: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
) -> None:
    for part, full, row, col in zip(packed, out, rows, cols, strict=True):
        at = [
            torch.arange(size, device=full.device) if index is None else index.long()
            for size, index in zip(full.shape, (row, col), strict=False)
        ]
        with torch.no_grad():
            full[torch.meshgrid(*at, indexing="ij") if len(at) == 2 else at[0]] = part


def pruned_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_index: Tensor | None = None,
    in_index: Tensor | None = None,
    *,
    out_block: int = 1,
    in_block: int = 1,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    rows, columns = (
        torch.arange(size // block, device=x.device) if index is None else index.long()
        for size, block, index in zip(weight.shape, (out_block, in_block), (out_index, in_index), strict=True)
    )
    outputs, inputs = weight.shape
    blocks = weight.reshape(outputs // out_block, out_block, inputs // in_block, in_block)
    kept = blocks[rows][:, :, columns].reshape(rows.numel() * out_block, columns.numel() * in_block)
    kept_bias = None if bias is None else bias.reshape(-1, out_block)[rows].flatten()
    y = F.linear(x, kept, kept_bias)
    if residual is None:
        return y if activation is None else F.gelu(y)
    at = torch.arange(outputs, device=x.device).reshape(-1, out_block)[rows].flatten()
    return residual.index_add(-1, at, y.to(residual.dtype))


def pruned_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    head_index: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))  # [B, n, 3, H, D]
    q, k, v = qkv[:, :, :, head_index.long()].permute(2, 0, 3, 1, 4)  # [B, kept, n, D]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1) @ v
    proj = proj_weight.unflatten(1, (num_heads, -1))[:, head_index.long()].flatten(1)
    return F.linear(y.transpose(1, 2).flatten(2), proj, proj_bias)


def pruned_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_index: Tensor | None = None,
    in_index: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    if out_index is not None:
        weight = weight[out_index.long()]
        bias = None if bias is None else bias[out_index.long()]
    if in_index is not None:
        weight = weight[:, in_index.long()]
    return F.conv2d(x, weight, bias, stride, padding, dilation)


def residual_add(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    dim: int = 1,
) -> Tensor:
    dim %= residual.ndim
    accumulator = torch.float64 if residual.dtype is torch.float64 else torch.float32
    shape = [-1 if d == dim else 1 for d in range(residual.ndim)]
    term = y.to(accumulator)
    if scale is not None:
        term = term * scale.to(accumulator).reshape(shape)
    if shift is not None:
        term = term + shift.to(accumulator).reshape(shape)
    stream = residual.to(accumulator)
    out = stream + term if index is None else stream.index_add(dim, index, term)
    return (out if activation is None else out.relu()).to(residual.dtype)
