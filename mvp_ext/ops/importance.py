"""Scores of units from an activation and the loss's gradient there."""

from __future__ import annotations

import torch
from torch import Tensor

from mvp_ext.ops._native import native
from mvp_ext.ops.checks import FLOATS, check_int, check_shape, check_tensor, same_kind
from mvp_ext.ops.define import define
from mvp_ext.ops.device import cuda_kernels, device_and_stream, on_cuda, reject_float64

IMPORTANCE_KINDS = ("taylor", "taylor2", "activation")


def importance(
    a: Tensor, grad: Tensor | None = None, *, kind: str, dim: int = 1, heads: int | None = None
) -> Tensor:
    """Importance of units (filters, channels, heads) from an activation and the loss's gradient there, in one pass.

    With s[b, u] = Σ a · grad over the positions (and, for heads, the head's dimensions) of example b:
    ``taylor`` Σ_b |s[b, u]|, ``taylor2`` Σ_b s[b, u]². ``activation``: the mean of |a| over examples and positions.
    The abs is per example: the gradient of one mask shared by the batch would give |Σ_b s[b, u]| instead.

    Args:
        a: float [B, ..., C, ...]: NCHW, channels_last, [B, n, H·D], or any other strided tensor; dim 0 is the batch.
        grad: like ``a`` (another memory layout costs a copy); not used by ``activation``.
        kind: "taylor", "taylor2" or "activation".
        dim: the dimension of the units, not 0.
        heads: the units are this many equal blocks of ``dim``, instead of its single entries.

    Returns:
        float32 [C] or [heads], summed in float32 and over the batch in float64; float64 for float64 input (slow: for
        checks). Not differentiable. NaN and inf go through. ``activation`` of no elements is NaN.

    Raises:
        TypeError, ValueError: kinds, shapes, ranges, devices; on a GPU more than 2^30 positions of an example, or more
            than 2^30 channels of all examples (B · a.shape[dim]).

    The same bits in every run and with every number of threads. Sources: Molchanov et al., ICLR 2017 and CVPR 2019
    (taylor, taylor2); Michel et al., NeurIPS 2019 (heads).
    """
    if kind not in IMPORTANCE_KINDS:
        raise ValueError(f"importance: kind: expected one of {', '.join(IMPORTANCE_KINDS)}, got {kind!r}")
    known = kind != "activation" and same_kind(a, grad)
    if not known:
        check_tensor("importance", "a", a, dtypes=FLOATS)
    dim = check_int("importance", "dim", dim)
    if not -a.ndim < dim < a.ndim or dim == 0:
        raise ValueError(
            f"importance: dim: expected a dimension of a after the batch, got {dim} for {a.ndim} dimensions"
        )
    dim %= a.ndim
    channels = a.shape[dim]
    if heads is not None:
        heads = check_int("importance", "heads", heads)
        if heads < 1 or channels % heads:
            raise ValueError(
                f"importance: heads: expected a divisor of a.shape[{dim}] = {channels}, got {heads}"
            )
    if kind == "activation":
        grad = None
    elif grad is None:
        raise ValueError(f"importance: grad: expected the gradient at a, which {kind} needs, got None")
    else:
        if not known:
            check_tensor("importance", "grad", grad, dtypes=(a.dtype,), device=a.device)
            check_shape("importance", "grad", grad, a.shape, "like a")
        grad = grad.detach() if grad.requires_grad else grad
    a = a.detach() if a.requires_grad else a
    return importance_op(a, grad, kind, dim, channels if heads is None else heads)


def _fake(a: Tensor, grad: Tensor | None, kind: str, dim: int, units: int) -> Tensor:
    return a.new_empty(units, dtype=torch.float64 if a.dtype is torch.float64 else torch.float32)


def _run(a: Tensor, grad: Tensor | None, kind: str, dim: int, units: int) -> Tensor:
    if on_cuda(a):
        return _run_cuda(a, grad, kind, dim, units)
    scores = _fake(a, grad, kind, dim, units)
    if grad is not None and grad.stride() != a.stride():
        grad = torch.empty_like(a).copy_(grad)  # a copy costs less than reading two layouts at once
    native().importance_cpu(a, grad, kind, dim, scores, torch.get_num_threads())
    return scores


def _run_cuda(a: Tensor, grad: Tensor | None, kind: str, dim: int, units: int) -> Tensor:
    reject_float64("importance", "a", a)
    scores = _fake(a, grad, kind, dim, units)
    if a.numel() == 0:
        return scores.fill_(float("nan") if kind == "activation" else 0.0)  # a mean, a sum of nothing
    if grad is not None and not _same_layout(a, grad):
        grad = torch.empty_like(a).copy_(grad)
        if not _same_layout(a, grad):  # a has holes, or does not start where torch lets tensors start
            a = torch.empty_like(a).copy_(a)
    partial_sums = cuda_kernels().importance_workspace_cuda(a, dim, units)
    workspace = torch.empty(partial_sums, dtype=torch.float32, device=a.device)
    cuda_kernels().importance_cuda(a, grad, kind, dim, workspace, scores, *device_and_stream(a))
    return scores


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """The same strides, and as far from a multiple of 16 bytes: so are their rows."""
    return a.stride() == b.stride() and (a.data_ptr() - b.data_ptr()) % 16 == 0


importance_op = define(
    "importance(Tensor a, Tensor? grad, str kind, int dim, int units) -> Tensor", fake=_fake, run=_run
)
