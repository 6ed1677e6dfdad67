"""Ops on all tensors of a model at once: pack and unpack slices of them, merge the slices of several models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvp_ext.ops import registry
from mvp_ext.ops.checks import check_tensor

_INDEX_TYPES = (torch.int64, torch.int32)
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
        TypeError, ValueError: kinds, dtypes, shapes, indices out of range, unequal devices.
    """
    tensors, rows, cols = list(tensors), list(rows), list(cols)
    _check("pack", "tensors", tensors, rows, cols)
    if not tensors:
        return []  # nothing that the dispatcher could choose a device by
    with torch.no_grad():
        return registry.pack(tensors, rows, cols)


def unpack(packed: Sequence[Tensor], out: Sequence[Tensor], rows: Indices, cols: Indices) -> None:
    """The inverse of ``pack``: writes ``packed[p]`` to ``out[p]`` at rows[p] × cols[p], in place. The rest stays.

    Args:
        packed: P tensors [K_rows, K_cols, ...], with the dtypes of ``out``.
        out: P full tensors, changed in place (also parameters that require a gradient). They must not overlap.
        rows, cols: as for ``pack``, but without repeats.

    Raises:
        TypeError, ValueError: as for ``pack``; nothing is written then.
    """
    packed, out, rows, cols = list(packed), list(out), list(rows), list(cols)
    _check("unpack", "out", out, rows, cols)
    if len(packed) != len(out):
        raise ValueError(
            f"unpack: packed: expected {len(out)} tensors, one for each of out, got {len(packed)}"
        )
    for p, (part, full, r, c) in enumerate(zip(packed, out, rows, cols, strict=True)):
        check_tensor("unpack", f"packed[{p}]", part, dtypes=(full.dtype,), device=full.device)
        _check_shape("unpack", f"packed[{p}]", part, full, r, c)
    if not out:
        return
    with torch.no_grad():
        registry.unpack(packed, out, rows, cols)


def _check(
    op: str, name: str, tensors: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None]
) -> None:
    for argument, lists in (("rows", rows), ("cols", cols)):
        if len(lists) != len(tensors):
            raise ValueError(
                f"{op}: {argument}: expected {len(tensors)} entries, one for each of {name}, got {len(lists)}"
            )
    seen: set[int] = set()  # the tensors of a model share few index tensors
    device = None
    for p, (tensor, r, c) in enumerate(zip(tensors, rows, cols, strict=True)):
        check_tensor(op, f"{name}[{p}]", tensor, device=device)
        device = tensor.device
        if tensor.ndim == 0 or (tensor.ndim == 1 and c is not None):
            need = 1 if c is None else 2
            raise ValueError(
                f"{op}: {name}[{p}]: expected at least {need} dimensions, got {tuple(tensor.shape)}"
            )
        if tensor.is_complex() or tensor.ndim > 6:
            raise TypeError(
                f"{op}: {name}[{p}]: expected a real dtype and at most 6 dimensions, got {tensor.dtype}, {tensor.ndim}"
            )
        if r is not None and id(r) not in seen:
            seen.add(id(r))
            check_tensor(op, f"rows[{p}]", r, ndim=1, dtypes=_INDEX_TYPES, device=device)
        if c is not None and id(c) not in seen:
            seen.add(id(c))
            check_tensor(op, f"cols[{p}]", c, ndim=1, dtypes=_INDEX_TYPES, device=device)


def _check_shape(
    op: str, name: str, part: Tensor, full: Tensor, rows: Tensor | None, cols: Tensor | None
) -> None:
    expected = registry.packed_shape(full, rows, cols)
    if list(part.shape) != expected:
        raise ValueError(f"{op}: {name}: expected shape {tuple(expected)}, got {tuple(part.shape)}")
