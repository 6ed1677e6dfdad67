"""Ops on all tensors of a model at once: pack and unpack slices of them, merge the slices of several models."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mvp_ext.ops import registry_packing as registry
from mvp_ext.ops.checks import FLOATS, check_shape, check_tensor

_INDEX_TYPES = (torch.int64, torch.int32)
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
    packed = registry.pack_plain(tensors, rows, cols)
    if packed is not None:
        return packed
    _check("pack", "tensors", tensors, rows, cols)
    if not tensors:
        return []  # nothing that the dispatcher could choose a device by
    with torch.no_grad():
        return registry.pack_op(tensors, rows, cols)


def unpack(packed: Sequence[Tensor], out: Sequence[Tensor], rows: Indices, cols: Indices) -> None:
    """The inverse of ``pack``: writes ``packed[p]`` to ``out[p]`` at rows[p] × cols[p], in place. The rest stays.

    Args:
        packed: P tensors [K_rows, K_cols, ...], with the dtypes of ``out``.
        out: P full tensors, changed in place (also parameters that require a gradient). They must not overlap.
        rows, cols: as for ``pack``, but without repeats. On a GPU repeats are not noticed: one of the values wins.

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

    merged[p][r, c] = Σ_j w_j · voter_j[r, c] / Σ_j w_j over the voters j that kept row r and column c of tensor p;
    base[p][r, c] where none did. All tensors of a model in one native call; voters are read in their compact form.

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
    if voters and base and isinstance(base[0], Tensor) and base[0].device == weights.device:
        merged = registry.merge_plain(
            base, voters, voter_rows, voter_cols, weights.to(torch.float32), rows, cols
        )
        if merged is not None:
            return merged
    _check("merge", "base", base, rows, cols, dtypes=FLOATS)
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
        _check("merge", name, parts, r, c, dtypes=FLOATS, device=device, lists=names)
        for p, (part, full) in enumerate(zip(parts, base, strict=True)):
            _check_shape("merge", f"{name}[{p}]", part, full, r[p], c[p])
        all_parts += parts
        all_rows += r
        all_cols += c
    if not base:
        return []
    with torch.no_grad():
        return registry.merge_op(base, all_parts, all_rows, all_cols, weights.to(torch.float32), rows, cols)


def _check(
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
                check_tensor(op, f"{argument}[{p}]", index, ndim=1, dtypes=_INDEX_TYPES, device=device)


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


def _check_shape(
    op: str, name: str, part: Tensor, full: Tensor, rows: Tensor | None, cols: Tensor | None
) -> None:
    expected = registry.packed_shape(full, rows, cols)
    if list(part.shape) != expected:
        raise ValueError(f"{op}: {name}: expected shape {tuple(expected)}, got {tuple(part.shape)}")
