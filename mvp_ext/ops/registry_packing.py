"""Schemas, fakes and device implementations of the ops on all tensors of a model: merge, pack, unpack.

The kernels know two layouts, contiguous and channels_last (whose columns are innermost). What has another is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvp_ext.ops import cuda, cuda_packing
from mvp_ext.ops._native import native
from mvp_ext.ops.define import define, nobody_listens
from mvp_ext.ops.memory import empty_tensors

Indices = list[Tensor | None]


def packed_shape(tensor: Tensor, rows: Tensor | None, cols: Tensor | None) -> list[int]:
    shape = list(tensor.shape)
    if rows is not None:
        shape[0] = rows.shape[0]
    if cols is not None:
        shape[1] = cols.shape[0]
    return shape


def is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _dense(tensor: Tensor) -> Tensor:
    """In one of the two layouts that the kernels of whole models know: contiguous or channels_last."""
    return tensor if tensor.is_contiguous() or is_channels_last(tensor) else tensor.contiguous()


def _empty_packed(tensor: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    form = torch.channels_last if is_channels_last(tensor) else torch.contiguous_format
    shape = packed_shape(tensor, rows, cols)
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=form)


_MOVED_AS = {1: torch.uint8, 2: torch.float16, 4: torch.int32, 8: torch.int64}
_KERNEL_DTYPES = {
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool,
}  # fmt: skip


def _as_bits(tensor: Tensor) -> Tensor:
    """For kernels that only move elements: a dtype that they know, of the same size."""
    return tensor if tensor.dtype in _KERNEL_DTYPES else tensor.view(_MOVED_AS[tensor.itemsize])


def _pack_fake(tensors: list[Tensor], rows: Indices, cols: Indices) -> list[Tensor]:
    return [_empty_packed(t, r, c) for t, r, c in zip(tensors, rows, cols, strict=True)]


def _pack_into(tensors: list[Tensor], rows: Indices, cols: Indices, packed: list[Tensor]) -> None:
    if cuda.runs(tensors[0]):
        cuda_packing.pack(tensors, rows, cols, packed)
    else:
        native().pack_cpu(tensors, rows, cols, packed, torch.get_num_threads())


def _pack(tensors: list[Tensor], rows: Indices, cols: Indices) -> list[Tensor]:
    packed = _pack_fake(tensors, rows, cols)
    _pack_into([_as_bits(_dense(t)) for t in tensors], rows, cols, [_as_bits(p) for p in packed])
    return packed


pack_op = define(
    "pack(Tensor[] tensors, Tensor?[] rows, Tensor?[] cols) -> Tensor[]",
    fake=_pack_fake,
    run=_pack,
)


def pack_plain(tensors: list[Tensor], rows: Indices, cols: Indices) -> list[Tensor] | None:
    """The op's result without the dispatcher, and without checks: one native call sees whether all is as it almost
    always is. None where it is not, or where someone would see a call of the op."""
    if torch.compiler.is_compiling() or not nobody_listens():
        return None
    layouts = native().packed_layouts(tensors, rows, cols)
    if not layouts:
        return None
    packed = empty_tensors(tensors, layouts)
    _pack_into(tensors, rows, cols, packed)
    return packed


def pack(tensors: list[Tensor], rows: Indices, cols: Indices) -> list[Tensor]:
    return pack_plain(tensors, rows, cols) or pack_op(tensors, rows, cols)


def _unpack_fake(packed: list[Tensor], out: list[Tensor], rows: Indices, cols: Indices) -> None:
    return None


def _unpack(packed: list[Tensor], out: list[Tensor], rows: Indices, cols: Indices) -> None:
    full = [_dense(t) for t in out]
    parts = [
        p.contiguous(memory_format=torch.channels_last if is_channels_last(f) else torch.contiguous_format)
        for p, f in zip(packed, full, strict=True)
    ]
    bits, full_bits = [_as_bits(p) for p in parts], [_as_bits(f) for f in full]
    if cuda.runs(out[0]):
        cuda_packing.unpack(bits, rows, cols, full_bits)
    else:
        native().unpack_cpu(bits, rows, cols, full_bits, torch.get_num_threads())
    for target, written in zip(out, full, strict=True):
        if written is not target:
            target.copy_(written)
        else:  # the kernel wrote behind autograd's back: whoever saved this tensor must notice
            torch.autograd.graph.increment_version(target)


unpack = define(
    "unpack(Tensor[] packed, Tensor(a!)[] out, Tensor?[] rows, Tensor?[] cols) -> ()",
    fake=_unpack_fake,
    run=_unpack,
)


def _merge_fake(
    base: list[Tensor],
    voters: list[Tensor],
    voter_rows: Indices,
    voter_cols: Indices,
    weights: Tensor,
    rows: Indices,
    cols: Indices,
) -> list[Tensor]:
    return _pack_fake(base, rows, cols)


def _merge_into(
    base: list[Tensor],
    voters: list[Tensor],
    voter_rows: Indices,
    voter_cols: Indices,
    weights: Tensor,
    rows: Indices,
    cols: Indices,
    merged: list[Tensor],
) -> None:
    if cuda.runs(base[0]):
        cuda_packing.merge(base, voters, voter_rows, voter_cols, weights, rows, cols, merged)
    else:
        native().merge_cpu(
            base,
            voters,
            voter_rows,
            voter_cols,
            weights.tolist(),
            rows,
            cols,
            merged,
            torch.get_num_threads(),
        )


def _merge(
    base: list[Tensor],
    voters: list[Tensor],
    voter_rows: Indices,
    voter_cols: Indices,
    weights: Tensor,
    rows: Indices,
    cols: Indices,
) -> list[Tensor]:
    full = [_dense(t) for t in base]
    merged = _pack_fake(full, rows, cols)
    forms = [torch.channels_last if is_channels_last(t) else torch.contiguous_format for t in full]
    parts = [v.contiguous(memory_format=forms[at % len(base)]) for at, v in enumerate(voters)]
    _merge_into(full, parts, voter_rows, voter_cols, weights, rows, cols, merged)
    return merged


merge_op = define(
    "merge(Tensor[] base, Tensor[] voters, Tensor?[] voter_rows, Tensor?[] voter_cols, Tensor weights,"
    " Tensor?[] rows, Tensor?[] cols) -> Tensor[]",
    fake=_merge_fake,
    run=_merge,
)


def merge_plain(
    base: list[Tensor],
    voters: Sequence[Sequence[Tensor]],
    voter_rows: Sequence[Sequence[Tensor | None]],
    voter_cols: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    rows: Indices,
    cols: Indices,
) -> list[Tensor] | None:
    """As ``pack_plain``; ``weights`` are checked."""
    if torch.compiler.is_compiling() or not nobody_listens():
        return None
    layouts = native().packed_layouts(base, rows, cols)
    if not layouts:
        return None
    everything = list(zip(voter_rows, voter_cols, voters, strict=True))
    if not all(type(x) is list for voter in everything for x in voter):
        return None
    if not all(native().are_packed(base, r, c, parts) for r, c, parts in everything):
        return None
    merged = [t.new_empty_strided(*layout) for t, layout in zip(base, layouts, strict=True)]
    flat_rows, flat_cols, flat_parts = (
        [x for one in of for x in one] for of in zip(*everything, strict=True)
    )
    _merge_into(base, flat_parts, flat_rows, flat_cols, weights, rows, cols, merged)
    return merged
