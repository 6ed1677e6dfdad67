"""Kept blocks of a dimension: from block numbers to positions, and the gradients of a part back to full size."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(index: Tensor, block: int) -> Tensor:
    """The positions that the blocks cover: [K] → [K · block], in the index's order and dtype."""
    if block == 1:
        return index
    return (index[:, None] * block + torch.arange(block, device=index.device, dtype=index.dtype)).flatten()


def select(tensor: Tensor, dim: int, index: Tensor | None, block: int = 1) -> Tensor:
    """The kept blocks of a dimension; all of it without an index. By torch's own op, which every transform knows."""
    return tensor if index is None else tensor.index_select(dim, positions(index, block))


def scatter_back(
    part: Tensor,
    shape: tuple[int, ...],
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int = 1,
    in_block: int = 1,
) -> Tensor:
    """Zeros of ``shape`` with ``part`` [N, K, ...] (or [N]) added at the kept places. Differentiable."""
    if in_index is not None:
        wide = part.new_zeros((part.shape[0], *shape[1:]))
        part = wide.index_add(1, positions(in_index, in_block), part)
    if out_index is not None:
        part = part.new_zeros(shape).index_add(0, positions(out_index, out_block), part)
    return part
