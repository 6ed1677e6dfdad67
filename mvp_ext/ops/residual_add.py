"""The end of a residual block whose last layer lost channels: add what is left into the full stream."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mvp_ext.ops._native import native
from mvp_ext.ops.checks import FLOATS, INDICES, check_int, check_range, check_shape, check_tensor
from mvp_ext.ops.define import define, derivative_by, dispatch_is_observed
from mvp_ext.ops.device import cuda_kernels, device_and_stream, is_emulated, on_cuda, reject_float64
from mvp_ext.ops.pack import is_channels_last


def residual_add(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Literal["relu"] | None = None,
    dim: int = 1,
) -> Tensor:
    """act(residual + scatter(y · scale + shift)): y's channels are added to the channels ``index`` of the residual.

    One pass instead of a batch norm's affine, ``index_add`` and ``relu``. Channels that are not in ``index`` become
    act(residual).

    Args:
        residual: float32, float16, bfloat16 or float64, C channels in dimension ``dim``: [B, C, H, W] (contiguous or
            channels_last), [B, n, C] with dim = -1, or any other rank up to 6. Other strides are copied first.
        y: the same dtype and shape, but K channels.
        index: int32 or int64 [K] in [0, C), any order, no repeats; None: all channels.
        scale, shift: floating [K], used in float32 (float64 beside float64); default 1 and 0.
        activation: None or "relu".
        dim: the dimension of the channels.

    Returns:
        A new tensor like ``residual``, in its memory format. Gradients flow to residual, y, scale and shift.

    Raises:
        TypeError, ValueError: kinds, dtypes, shapes, ranges, devices.

    Deterministic: each output is one sum, in float32, rounded once.
    """
    if type(dim) is not int:
        dim = check_int("residual_add", "dim", dim)
    if activation not in (None, "relu"):
        raise ValueError(f'residual_add: activation: expected None or "relu", got {activation!r}')
    relu = activation is not None
    # As in ``pack``: small blocks take less time than their checks.
    if scale is None and shift is None and not (is_emulated() or dispatch_is_observed()):
        grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
        out: Tensor | None = native().residual_add_plain(residual, y, index, relu, dim, grad, threads)
        if out is not None:
            return out
    _check(residual, y, index, scale, shift, dim)
    if dim < 0:
        dim += residual.ndim
    way = derivative_by(residual, y, scale, shift)
    if way == "function":
        return _ResidualAdd.apply(residual, y, index, scale, shift, relu, dim)
    if way == "formula":
        return _formula(residual, y, index, scale, shift, relu, dim)
    return residual_add_op(residual, y, index, scale, shift, relu, dim)


def _check(
    residual: Tensor, y: Tensor, index: Tensor | None, scale: Tensor | None, shift: Tensor | None, dim: int
) -> None:
    check_tensor("residual_add", "residual", residual, dtypes=FLOATS)
    device, dtype, rank = residual.device, residual.dtype, residual.ndim
    check_tensor("residual_add", "y", y, ndim=rank, dtypes=(dtype,), device=device)
    if not 1 <= rank <= 6 or not -rank <= dim < rank:
        raise ValueError(
            f"residual_add: dim: expected 1 to 6 dimensions and dim among them, got {rank} dimensions, {dim}"
        )
    expected = list(residual.shape)
    if index is not None:
        check_tensor("residual_add", "index", index, ndim=1, dtypes=INDICES, device=device)
        expected[dim] = index.shape[0]
    if list(y.shape) != expected:
        raise ValueError(f"residual_add: y: expected shape {tuple(expected)}, got {tuple(y.shape)}")
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            check_tensor("residual_add", name, value, ndim=1, dtypes=FLOATS, device=device)
            check_shape("residual_add", name, value, (expected[dim],), "[K]")


def _formula(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dim: int,
) -> Tensor:
    """The op in torch's own ops, for every transform that torch has."""
    if index is not None:
        check_range("residual_add", "index", index, residual.shape[dim], noun="indices", unique=True)
    accumulator = torch.float64 if residual.dtype is torch.float64 else torch.float32
    shape = [y.shape[dim] if d == dim else 1 for d in range(residual.ndim)]
    term, out = y.to(accumulator), residual.to(accumulator)
    if scale is not None:
        term = term * scale.to(accumulator).reshape(shape)
    if shift is not None:
        term = term + shift.to(accumulator).reshape(shape)
    out = out + term if index is None else out.index_add(dim, index, term)
    return (out.relu() if relu else out).to(residual.dtype)


class _ResidualAdd(torch.autograd.Function):
    """The backward is made of plain differentiable ops, so second derivatives work too."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        y: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        relu: bool,
        dim: int,
    ) -> Tensor:
        out = residual_add_op(residual, y, index, scale, shift, relu, dim)
        ctx.save_for_backward(y if scale is not None else None, index, scale, out if relu else None)
        ctx.dim = dim
        ctx.shift_dtype = None if shift is None else shift.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, index, scale, out = ctx.saved_tensors
        needs_residual, needs_y, _, needs_scale, needs_shift, _, _ = ctx.needs_input_grad
        if out is not None:  # what ReLU cut off is 0 in the saved output; NaN went through, as in torch
            grad = torch.where(out <= 0, 0, grad)
        grad_y = grad_scale = grad_shift = None
        if needs_y or needs_scale or needs_shift:
            accumulator = torch.float64 if grad.dtype is torch.float64 else torch.float32
            kept = (grad if index is None else grad.index_select(ctx.dim, index)).to(accumulator)
            others = [d for d in range(grad.ndim) if d != ctx.dim]
            if needs_y:
                shape = [kept.shape[d] if d == ctx.dim else 1 for d in range(grad.ndim)]
                grad_y = kept if scale is None else kept * scale.to(accumulator).reshape(shape)
                grad_y = grad_y.to(grad.dtype)
            if needs_scale:
                grad_scale = (kept * y.to(accumulator)).sum(others).to(scale.dtype)
            if needs_shift:
                grad_shift = kept.sum(others).to(ctx.shift_dtype)
        return grad if needs_residual else None, grad_y, None, grad_scale, grad_shift, None, None


def _memory_format(residual: Tensor, dim: int) -> torch.memory_format:
    return torch.channels_last if dim == 1 and is_channels_last(residual) else torch.contiguous_format


def _fake(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dim: int,
) -> Tensor:
    return torch.empty_like(residual.contiguous(memory_format=_memory_format(residual, dim)))


def _run(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dim: int,
) -> Tensor:
    if on_cuda(residual):
        return _run_cuda(residual, y, index, scale, shift, relu, dim)
    form = _memory_format(residual, dim)
    residual, y = residual.contiguous(memory_format=form), y.contiguous(memory_format=form)
    out = torch.empty_like(residual)
    if scale is not None or shift is not None:
        accumulator = torch.float64 if residual.dtype is torch.float64 else torch.float32
        scale = None if scale is None else scale.to(accumulator)
        shift = None if shift is None else shift.to(accumulator)
    native().residual_add_cpu(residual, y, index, scale, shift, relu, dim, out, torch.get_num_threads())
    return out


def _run_cuda(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dim: int,
) -> Tensor:
    reject_float64("residual_add", "residual", residual)
    form = _memory_format(residual, dim)
    residual = residual.contiguous(memory_format=form)
    out = torch.empty_like(residual)
    # The kernel reads vectors of 16 bytes; torch allocates at multiples of them, but a slice may start anywhere.
    if residual.data_ptr() % 16:
        residual = residual.clone(memory_format=form)
    cuda_kernels().residual_add_cuda(
        residual,
        y.contiguous(memory_format=form),
        None if index is None else index.contiguous(),
        None if scale is None else scale.float().contiguous(),
        None if shift is None else shift.float().contiguous(),
        relu,
        dim,
        out,
        *device_and_stream(residual),
    )
    return out


residual_add_op = define(
    "residual_add(Tensor residual, Tensor y, Tensor? index, Tensor? scale, Tensor? shift, bool relu, int dim)"
    " -> Tensor",
    fake=_fake,
    run=_run,
)
