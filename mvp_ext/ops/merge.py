"""The weights of a new sub-network from those of several others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle

import torch
from torch import Tensor

from mvp_ext.ops._native import native
from mvp_ext.ops.checks import FLOATS, check_shape, check_tensor
from mvp_ext.ops.define import define
from mvp_ext.ops.device import cuda_kernels, device_and_stream, on_cuda, reject_float64
from mvp_ext.ops.pack import Indices, check_packed_shape, check_slices, dense, dense_like, empty_packed

_Indices = list[Tensor | None]


def merge(
    base: Sequence[Tensor],
    voters: Sequence[Sequence[Tensor]],
    voter_rows: Sequence[Indices],
    voter_cols: Sequence[Indices],
    weights: Tensor,
    rows: Indices,
    cols: Indices,
) -> list[Tensor]:
    """Weights of a new sub-network from those of N others: the weighted mean over the voters that kept an element.

    `merged[p][r, c] = Σ_j w_j · voter_j[r, c] / Σ_j w_j` over the voters j that kept row r and column c of tensor p;
    `base[p][r, c]` where none did. All tensors of a model in one native call; voters are read in their compact form.

    Args:
        base: P full tensors [R, C, ...] or [R]: float32, float16, bfloat16 or float64.
        voters: N lists of P compact tensors, as ``pack`` made them; any of these dtypes.
        voter_rows, voter_cols: N lists of P index lists: where each voter's rows and columns lie in ``base``; int32 or
            int64, no repeats; None: all.
        weights: floating [N], finite and ≥ 0, used as float32. A voter with weight 0 does not count.
        rows, cols: the wanted rows and columns of each tensor, as for ``pack`` but without repeats.

    Returns:
        P new tensors [K_rows, K_cols, ...] with the dtypes of ``base``, in its memory format, without gradient.

    Raises:
        TypeError, ValueError: kinds, dtypes, shapes, ranges, devices. On a GPU float64 in ``base`` is a TypeError, and
            wrong indices or weights end the kernel with a CUDA error (repeats in rows or cols are not noticed).

    Deterministic: float32 sums (float64 for float64) in the order of the voters, on a GPU the same bits as on the CPU.

    Source: decided here. Meta-Vote Pruning (arXiv 2301.11560) also starts from its voters; its rule could not be read.
    """
    base, rows, cols = list(base), list(rows), list(cols)
    check_tensor("merge", "weights", weights, dtypes=FLOATS)
    check_shape("merge", "weights", weights, (len(voters),), "[N]")
    for name, lists in (("voter_rows", voter_rows), ("voter_cols", voter_cols)):
        if len(lists) != len(voters):
            raise ValueError(f"merge: {name}: expected {len(voters)} lists, one a voter, got {len(lists)}")
    check_slices("merge", "base", base, rows, cols, dtypes=FLOATS)
    device = base[0].device if base else None
    check_tensor("merge", "weights", weights, device=device)
    all_parts: list[Tensor] = []
    all_rows: list[Tensor | None] = []
    all_cols: list[Tensor | None] = []
    for v in range(len(voters)):
        parts, r, c = list(voters[v]), list(voter_rows[v]), list(voter_cols[v])
        name, names = f"voters[{v}]", (f"voter_rows[{v}]", f"voter_cols[{v}]")
        if len(parts) != len(base):
            raise ValueError(
                f"merge: {name}: expected {len(base)} tensors, one for each of base, got {len(parts)}"
            )
        check_slices("merge", name, parts, r, c, dtypes=FLOATS, device=device, lists=names)
        for p, (part, full) in enumerate(zip(parts, base, strict=True)):
            check_packed_shape("merge", f"{name}[{p}]", part, full, r[p], c[p])
        all_parts += parts
        all_rows += r
        all_cols += c
    if not base:
        return []
    return list(_merge_op(base, all_parts, all_rows, all_cols, weights.to(torch.float32), rows, cols))


def _fake(
    base: list[Tensor],
    voters: list[Tensor],
    voter_rows: _Indices,
    voter_cols: _Indices,
    weights: Tensor,
    rows: _Indices,
    cols: _Indices,
) -> list[Tensor]:
    return empty_packed(base, rows, cols)


def _run(
    base: list[Tensor],
    voters: list[Tensor],
    voter_rows: _Indices,
    voter_cols: _Indices,
    weights: Tensor,
    rows: _Indices,
    cols: _Indices,
) -> list[Tensor]:
    base = [dense(t) for t in base]
    voters = dense_like(voters, cycle(base))
    merged = empty_packed(base, rows, cols)
    if on_cuda(base[0]):
        _run_cuda(base, voters, voter_rows, voter_cols, weights, rows, cols, merged)
    else:
        check_shape("merge", "weights", weights, (len(voters) // len(base),), "[N]")  # a list takes memory
        lists = (weights.tolist(), rows, cols)
        native().merge_cpu(base, voters, voter_rows, voter_cols, *lists, merged, torch.get_num_threads())
    return merged


def _run_cuda(
    base: list[Tensor],
    voters: list[Tensor],
    voter_rows: _Indices,
    voter_cols: _Indices,
    weights: Tensor,
    rows: _Indices,
    cols: _Indices,
    merged: list[Tensor],
) -> None:
    for p, tensor in enumerate(base):
        reject_float64("merge", f"base[{p}]", tensor)
    widened = {at % len(base) for at, v in enumerate(voters) if v.dtype is not base[at % len(base)].dtype}
    if widened:  # rare: sums are in float32 anyway
        full = [t.float() if p in widened else t for p, t in enumerate(base)]
        voters = [v.float() if at % len(base) in widened else v for at, v in enumerate(voters)]
        out = [torch.empty_like(t, dtype=f.dtype) for t, f in zip(merged, full, strict=True)]
        _run_cuda(full, voters, voter_rows, voter_cols, weights, rows, cols, out)
        for target, result in zip(merged, out, strict=True):
            target.copy_(result)
        return
    size = _positions(base, 0, voter_rows, rows) + _positions(base, 1, voter_cols, cols)
    workspace = base[0].new_empty(size, dtype=torch.int32)
    lists = (weights.contiguous(), rows, cols)
    cuda_kernels().merge_cuda(
        base, voters, voter_rows, voter_cols, *lists, workspace, merged, *device_and_stream(base[0])
    )


def _positions(base: list[Tensor], dim: int, kept: _Indices, wanted: _Indices) -> int:
    """The workspace that merge_cuda needs for the rows (columns): for each pair of lists that belong to one tensor."""
    sizes = [t.shape[dim] if dim < t.ndim else 1 for t in base]
    sizes = [size + (size if w is None else w.shape[0]) for size, w in zip(sizes, wanted, strict=True)]
    wanted_ids = [id(w) for w in wanted]
    base_ids = [id(None)] * len(base)  # the base has all
    pairs: Iterable[tuple[int, int, int]] = zip([*map(id, kept), *base_ids], cycle(wanted_ids), cycle(sizes))
    return sum(size for *_, size in set(pairs))


_merge_op = define(
    "merge(Tensor[] base, Tensor[] voters, Tensor?[] voter_rows, Tensor?[] voter_cols, Tensor weights,"
    " Tensor?[] rows, Tensor?[] cols) -> Tensor[]",
    fake=_fake,
    run=_run,
)
