"""pack, unpack and merge on CUDA tensors; as ``cuda.py``. Tensors are dense, as ``registry_packing`` makes them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle

import torch
from torch import Tensor

from mvp_ext.ops import cuda

Indices = list[Tensor | None]


def pack(tensors: list[Tensor], rows: Indices, cols: Indices, packed: list[Tensor]) -> None:
    cuda.kernels().pack_cuda(tensors, rows, cols, packed, *cuda.queue(tensors[0]))


def unpack(packed: list[Tensor], rows: Indices, cols: Indices, out: list[Tensor]) -> None:
    cuda.kernels().unpack_cuda(packed, rows, cols, out, *cuda.queue(out[0]))


def merge(
    base: list[Tensor],
    voters: list[Tensor],
    voter_rows: Indices,
    voter_cols: Indices,
    weights: Tensor,
    rows: Indices,
    cols: Indices,
    merged: list[Tensor],
) -> None:
    for p, tensor in enumerate(base):
        cuda.reject_float64("merge", f"base[{p}]", tensor)
    widened = {at % len(base) for at, v in enumerate(voters) if v.dtype is not base[at % len(base)].dtype}
    if widened:  # rare: sums are in float32 anyway
        full = [t.float() if p in widened else t for p, t in enumerate(base)]
        voters = [v.float() if at % len(base) in widened else v for at, v in enumerate(voters)]
        out = [torch.empty_like(t, dtype=f.dtype) for t, f in zip(merged, full, strict=True)]
        merge(full, voters, voter_rows, voter_cols, weights, rows, cols, out)
        for target, result in zip(merged, out, strict=True):
            target.copy_(result)
        return
    size = _positions(base, 0, voter_rows, rows) + _positions(base, 1, voter_cols, cols)
    workspace = base[0].new_empty(size, dtype=torch.int32)
    lists = (weights.contiguous(), rows, cols)
    cuda.kernels().merge_cuda(
        base, voters, voter_rows, voter_cols, *lists, workspace, merged, *cuda.queue(base[0])
    )


def _positions(base: list[Tensor], dim: int, kept: Indices, wanted: Indices) -> int:
    """The workspace that merge_cuda needs for the rows (columns): for each pair of lists that belong to one tensor."""
    sizes = [t.shape[dim] if dim < t.ndim else 1 for t in base]
    sizes = [size + (size if w is None else w.shape[0]) for size, w in zip(sizes, wanted, strict=True)]
    wanted_ids = [id(w) for w in wanted]
    base_ids = [id(None)] * len(base)  # the base has all
    pairs: Iterable[tuple[int, int, int]] = zip([*map(id, kept), *base_ids], cycle(wanted_ids), cycle(sizes))
    return sum(size for *_, size in set(pairs))
