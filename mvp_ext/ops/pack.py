"""Slices of all tensors of a model at once, and the way back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mvp_ext.ops._native import native
from mvp_ext.ops.checks import INDICES, check_tensor
from mvp_ext.ops.define import define, dispatch_is_observed
from mvp_ext.ops.device import cuda_kernels, device_and_stream, is_emulated, on_cuda

_MOVABLE = frozenset(
    dtype for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not dtype.is_complex and "q" not in str(dtype) and "bits" not in str(dtype)
)  # fmt: skip
Indices = Sequence[Tensor | None]


def pack(tensors: Sequence[Tensor], rows: Indices, cols: Indices) -> list[Tensor]:
    """Slices of many tensors, all in one native call: ``tensors[p][rows[p]][:, cols[p]]``.

    Args:
        tensors: P tensors [R, C, ...] or [R], any dtype of 1 to 8 bytes that is not complex.
        rows: for each tensor the kept indices of dimension 0, int32 or int64 [K] in [0, R), any order, repeats
            allowed; None: all.
        cols: the same for dimension 1 (tensors with at least 2 dimensions).

    Returns:
        P new tensors [K_rows, K_cols, ...]; channels_last stays channels_last, everything else becomes contiguous. They
        share no memory with the inputs, also where both lists are None, and carry no gradient.

    Raises:
        TypeError, ValueError: kinds, dtypes, shapes, indices out of range, unequal devices. On a GPU an index out of
            range ends the kernel with a CUDA error, as in torch.
    """
    tensors, rows, cols = list(tensors), list(rows), list(cols)
    # Small tensors take less time than their checks: one native call makes them, and explains nothing. The CUDA
    # emulator's tensors are plain ones, too.
    if not (is_emulated() or dispatch_is_observed()):
        packed = native().pack_plain(tensors, rows, cols, torch.get_num_threads())
        if packed is not None:
            return packed
    check_slices("pack", "tensors", tensors, rows, cols)
    if not tensors:
        return []  # nothing that the dispatcher could choose a device by
    return list(pack_op(tensors, rows, cols))


def unpack(packed: Sequence[Tensor], out: Sequence[Tensor], rows: Indices, cols: Indices) -> None:
    """The inverse of ``pack``: writes ``packed[p]`` to ``out[p]`` at rows[p] × cols[p], in place. The rest stays.

    Args:
        packed: P tensors [K_rows, K_cols, ...], with the dtypes of ``out``.
        out: P full tensors, changed in place (also parameters that require a gradient), none in the memory of another.
        rows, cols: as for ``pack``, but without repeats. On a GPU repeats are not noticed: one of the values wins.

    Raises:
        TypeError, ValueError: as for ``pack``; nothing is written then.
    """
    packed, out, rows, cols = list(packed), list(out), list(rows), list(cols)
    check_slices("unpack", "out", out, rows, cols)
    if len(packed) != len(out):
        raise ValueError(
            f"unpack: packed: expected {len(out)} tensors, one for each of out, got {len(packed)}"
        )
    for p, (part, full, r, c) in enumerate(zip(packed, out, rows, cols, strict=True)):
        check_tensor("unpack", f"packed[{p}]", part, dtypes=(full.dtype,), device=full.device)
        check_packed_shape("unpack", f"packed[{p}]", part, full, r, c)
    if not out:
        return
    if torch.compiler.is_compiling() or not any(full.is_neg() for full in out):
        _unpack_op(packed, out, rows, cols)
        return
    # The dispatcher, which resolves negative bits elsewhere, does not in tensors that are written.
    resolved = [full.detach().resolve_neg() for full in out]
    _unpack_op(packed, resolved, rows, cols)
    with torch.no_grad():
        for full, written in zip(out, resolved, strict=True):
            if full.is_neg():
                full.copy_(written)


def check_slices(
    op: str,
    name: str,
    tensors: list[Tensor],
    rows: list[Tensor | None],
    cols: list[Tensor | None],
    *,
    dtypes: Collection[torch.dtype] = _MOVABLE,
    device: torch.device | None = None,
    lists: tuple[str, str] = ("rows", "cols"),
) -> None:
    """Tensors of dimension 1 to 6 on one device, each with its index lists, if any; ``lists`` are their names."""
    for argument, indices in zip(lists, (rows, cols), strict=True):
        if len(indices) != len(tensors):
            raise ValueError(
                f"{op}: {argument}: expected {len(tensors)} entries, one for each of {name}, got {len(indices)}"
            )
    seen: set[int] = set()  # the tensors of a model share few index tensors
    for p, (tensor, r, c) in enumerate(zip(tensors, rows, cols, strict=True)):
        # A model has hundreds of tensors, most of them tiny: one expression for what is fine, words for what is not.
        if not (
            isinstance(tensor, Tensor)
            and tensor.layout is torch.strided
            and 0 < tensor.ndim <= 6
            and (c is None or tensor.ndim > 1)
            and tensor.dtype in dtypes
            and (device is None or tensor.device == device)
        ):
            _explain(op, f"{name}[{p}]", tensor, c is not None, dtypes, device)
        device = tensor.device
        for argument, index in zip(lists, (r, c), strict=True):
            if index is not None and id(index) not in seen:
                seen.add(id(index))
                check_tensor(op, f"{argument}[{p}]", index, ndim=1, dtypes=INDICES, device=device)


def _explain(
    op: str,
    name: str,
    tensor: object,
    has_columns: bool,
    dtypes: Collection[torch.dtype],
    device: torch.device | None,
) -> None:
    tensor = check_tensor(op, name, tensor, device=device)
    if dtypes is not _MOVABLE:
        check_tensor(op, name, tensor, dtypes=tuple(dtypes))
    elif tensor.dtype not in dtypes:
        raise TypeError(f"{op}: {name}: expected a real dtype of at most 8 bytes, got {tensor.dtype}")
    least = 2 if has_columns else 1
    raise ValueError(f"{op}: {name}: expected {least} to 6 dimensions, got shape {tuple(tensor.shape)}")


def check_packed_shape(
    op: str, name: str, part: Tensor, full: Tensor, rows: Tensor | None, cols: Tensor | None
) -> None:
    expected = _packed_shape(full, rows, cols)
    if list(part.shape) != expected:
        raise ValueError(f"{op}: {name}: expected shape {tuple(expected)}, got {tuple(part.shape)}")


def _packed_shape(tensor: Tensor, rows: Tensor | None, cols: Tensor | None) -> list[int]:
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


def dense(tensor: Tensor) -> Tensor:
    """In one of the two layouts that the kernels of whole models know: contiguous or channels_last."""
    return tensor if tensor.is_contiguous() or is_channels_last(tensor) else tensor.contiguous()


def dense_like(tensors: Sequence[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """``tensors`` in the layouts of dense ``others``."""
    return [
        t.contiguous(memory_format=torch.channels_last if is_channels_last(o) else torch.contiguous_format)
        for t, o in zip(tensors, others, strict=False)
    ]


def empty_packed(
    tensors: Sequence[Tensor], rows: Sequence[Tensor | None], cols: Sequence[Tensor | None]
) -> list[Tensor]:
    packed = []
    for tensor, r, c in zip(tensors, rows, cols, strict=True):
        shape = _packed_shape(tensor, r, c)
        if is_channels_last(tensor):
            form = torch.channels_last
            packed.append(torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=form))
        else:
            packed.append(tensor.new_empty(shape))
    return packed


_MOVED_AS = {1: torch.uint8, 2: torch.float16, 4: torch.int32, 8: torch.int64}
_KERNEL_DTYPES = {
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool,
}  # fmt: skip


def _as_bits(tensor: Tensor) -> Tensor:
    """For kernels that only move elements: a dtype that they know, of the same size."""
    return tensor if tensor.dtype in _KERNEL_DTYPES else tensor.view(_MOVED_AS[tensor.itemsize])


def _pack(tensors: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None]) -> list[Tensor]:
    packed = empty_packed(tensors, rows, cols)
    arguments = ([_as_bits(dense(t)) for t in tensors], rows, cols, [_as_bits(p) for p in packed])
    if on_cuda(tensors[0]):
        cuda_kernels().pack_cuda(*arguments, *device_and_stream(tensors[0]))
    else:
        native().pack_cpu(*arguments, torch.get_num_threads())
    return packed


pack_op = define(
    "pack(Tensor[] tensors, Tensor?[] rows, Tensor?[] cols) -> Tensor[]", fake=empty_packed, run=_pack
)


def _unpack_fake(
    packed: list[Tensor], out: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None]
) -> None:
    return None


def _check_overlap(out: list[Tensor]) -> None:
    """No element is written by two: which one would win is left to chance. Before anything is written."""
    spans = []
    for p, tensor in enumerate(out):
        if tensor.numel() == 0:
            continue
        if dense(tensor) is tensor:
            start = tensor.data_ptr()
            spans.append((start, start + tensor.numel() * tensor.itemsize, p))
        elif any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ValueError(f"unpack: out[{p}]: expected a place for each element, got an expanded tensor")
    spans.sort()
    for (_, end, p), (start, _, q) in pairwise(spans):
        if start < end:
            raise ValueError(f"unpack: out[{q}]: expected memory of its own, got some of out[{p}]'s")


def _apart(packed: list[Tensor], out: list[Tensor]) -> list[Tensor]:
    """``packed`` without memory of ``out``, which is read while that is written."""
    written = {tensor.untyped_storage().data_ptr() for tensor in out}
    return [part.clone() if part.untyped_storage().data_ptr() in written else part for part in packed]


def _unpack(
    packed: list[Tensor], out: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None]
) -> None:
    _check_overlap(out)
    full = [dense(t) for t in out]
    parts = dense_like(_apart(packed, out), full)
    arguments = ([_as_bits(p) for p in parts], rows, cols, [_as_bits(f) for f in full])
    if on_cuda(out[0]):
        cuda_kernels().unpack_cuda(*arguments, *device_and_stream(out[0]))
    else:
        native().unpack_cpu(*arguments, torch.get_num_threads())
    for target, written in zip(out, full, strict=True):
        if written is not target:
            with torch.no_grad():
                target.copy_(written)
        else:  # the kernel wrote behind autograd's back: whoever saved this tensor must notice
            torch.autograd.graph.increment_version(target)


_unpack_op = define(
    "unpack(Tensor[] packed, Tensor(a!)[] out, Tensor?[] rows, Tensor?[] cols) -> ()",
    fake=_unpack_fake,
    run=_unpack,
)
