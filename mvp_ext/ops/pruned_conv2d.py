"""A convolution's kept filters and channels, computed from its FULL weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops.blocks import scatter_back
from mvp_ext.ops.checks import FLOATS, autocast_is_on, check_bias, check_index, check_tensor
from mvp_ext.ops.define import needs_gradient
from mvp_ext.ops.pack import pack_op


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
    """A convolution's kept filters and input channels, from its full weight: `conv2d(x, W[out][:, in], b[out])`.

    Args:
        x: float [B, K, height, width], the kept channels only; any memory format.
        weight: [O, I, kh, kw], dtype and device of x. bias: [O] or None.
        out_index: int32 or int64, kept filters in [0, O). in_index: kept input channels in [0, I). None: all.
        stride, padding, dilation: as for conv2d; groups are 1.

    Returns:
        [B, N, height', width']. Differentiable in x, weight and bias.

    Raises:
        TypeError, ValueError: kinds, dtypes, shapes, devices, an index out of range.

    The kept part is cut out and handed to the library's convolution: a compact weight is what that needs, and it is
    small beside the activations.
    """
    op = "pruned_conv2d"
    check_tensor(op, "x", x, ndim=4, dtypes=FLOATS)
    mixed = autocast_is_on(x)  # then conv2d itself casts
    check_tensor(op, "weight", weight, ndim=4, dtypes=FLOATS if mixed else (x.dtype,), device=x.device)
    filters, channels = weight.shape[:2]
    check_bias(op, bias, weight)
    kept_filters = check_index(op, "out_index", out_index, 1, filters, x.device)
    kept = check_index(op, "in_index", in_index, 1, channels, x.device)
    if x.shape[1] != kept:
        raise ValueError(
            f"{op}: x: expected shape [B, K, height, width] with K = {kept}, got {tuple(x.shape)}"
        )
    if filters and channels and not (kept and kept_filters):
        # The library refuses to convolve nothing, but knows the size of what comes out.
        one = F.conv2d(
            x.new_zeros(0, 1, *x.shape[2:]), weight.detach()[:1, :1], None, stride, padding, dilation
        )
        shape = (x.shape[0], kept_filters, *one.shape[2:])
        return (
            x.new_zeros(shape)
            if bias is None
            else _cut(bias, out_index, None)[:, None, None].expand(shape).clone()
        )
    bias = None if bias is None else _cut(bias, out_index, None)
    return F.conv2d(x, _cut(weight, out_index, in_index), bias, stride, padding, dilation)


def _cut(tensor: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> Tensor:
    """tensor[out][:, in], differentiable."""
    if out_index is None and in_index is None:
        return tensor
    if out_index is not None and in_index is None and tensor.is_contiguous():
        try:
            return tensor.index_select(0, out_index)
        except (IndexError, RuntimeError):
            pass  # an index out of range: the error of pack says which
    if needs_gradient(tensor):
        return _Cut.apply(tensor, out_index, in_index)
    return _cut_copy(tensor, out_index, in_index)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> Tensor:
        ctx.save_for_backward(out_index, in_index)
        ctx.shape = tensor.shape
        return _cut_copy(tensor, out_index, in_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return scatter_back(grad, ctx.shape, *ctx.saved_tensors), None, None


def _cut_copy(tensor: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> Tensor:
    (part,) = pack_op([tensor], [out_index], [in_index])
    return part
