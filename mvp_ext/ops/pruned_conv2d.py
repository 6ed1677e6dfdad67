"""A convolution's kept filters and channels, computed from its FULL weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops._native import native
from mvp_ext.ops.blocks import select
from mvp_ext.ops.checks import (
    FLOATS,
    autocast_is_on,
    check_bias,
    check_index,
    check_int,
    check_range,
    check_tensor,
    renamed,
)
from mvp_ext.ops.define import (
    check_memory,
    derivative_by,
    dispatch_is_observed,
    functorch_is_active,
    is_only_computed,
)
from mvp_ext.ops.device import is_emulated
from mvp_ext.ops.faster import decide, known_exactly, known_way, remember_exactly, size_class
from mvp_ext.ops.pack import is_channels_last, pack_op


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
    small beside the activations. Where it is not (float32 on a CPU, at most 128 places of the result, no gradient), our
    kernel, which reads the full weight, and the library are tried on the first call of a class of sizes, and the faster
    one is used from then on in every process (``MVP_FASTER``: docs/kernels.md).
    """
    op = "pruned_conv2d"
    # After a convolution the caches hold none of the checks' code, and they take several times as long: of plain
    # tensors on the CPU one native call makes them, and explains nothing. The emulator's tensors are plain ones, too.
    numbers = type(stride) is type(padding) is type(dilation) is int
    if numbers and not (is_emulated() or dispatch_is_observed()):
        arguments = x, weight, bias, out_index, in_index, stride, padding, dilation
        try:
            grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
            found: Any = native().plain_conv2d(*arguments, grad, threads)
            if type(found) is tuple:
                part, part_bias = found
                return F.conv2d(x, part, part_bias, stride, padding, dilation)
            if found is not None and is_only_computed(x, weight, bias):
                call = _Call._make((*arguments, found))
                return _by_kernel(call) if _way(call) == "kernel" else _by_library(call)
        except (IndexError, RuntimeError, TypeError, ValueError):
            pass
    check_tensor(op, "x", x, ndim=4, dtypes=FLOATS)
    mixed = autocast_is_on(x) and x.dtype is not torch.float64  # then conv2d itself casts
    dtypes = FLOATS if mixed else (x.dtype,)
    check_tensor(op, "weight", weight, ndim=4, dtypes=dtypes, device=x.device)
    filters, channels = weight.shape[:2]
    check_bias(op, bias, weight, dtypes=dtypes)
    kept_filters = check_index(op, "out_index", out_index, 1, filters, x.device)
    kept = check_index(op, "in_index", in_index, 1, channels, x.device)
    if x.shape[1] != kept:
        raise ValueError(
            f"{op}: x: expected shape [B, K, height, width] with K = {kept}, got {tuple(x.shape)}"
        )
    check_memory(op, x=x, weight=weight, bias=bias)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if not isinstance(padding, str):
        padding = _pair("padding", padding, 0)
    elif padding not in ("same", "valid"):
        raise ValueError(f'{op}: padding: expected numbers, "same" or "valid", got {padding!r}')
    elif padding == "same" and stride != (1, 1):
        raise ValueError(f'{op}: stride: expected 1 beside padding = "same", got {stride}')
    size = [
        _output_size(
            x.shape[d + 2],
            weight.shape[d + 2],
            stride[d],
            padding if isinstance(padding, str) else padding[d],
            dilation[d],
        )
        for d in (0, 1)
    ]
    if min(size) < 1:
        raise ValueError(
            f"{op}: x: expected at least the height and width that the kernel covers, got {tuple(x.shape)}"
        )
    bias = None if bias is None else _cut(bias, out_index, None)
    if not (kept and kept_filters):
        # The library refuses to convolve nothing. The sums of nothing tie the result to what it has gradients for.
        dtype = torch.get_autocast_dtype(x.device.type) if mixed else x.dtype
        y = x.new_zeros((x.shape[0], kept_filters, *size)) + x[:0].sum() + weight[:0].sum()
        return (y if bias is None else y + bias[:, None, None]).to(dtype)
    return F.conv2d(x, _cut(weight, out_index, in_index), bias, stride, padding, dilation)


class _Call(NamedTuple):
    """A plain call with small images, and how many filters it keeps."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out_index: Tensor | None
    in_index: Tensor | None
    stride: int
    padding: int
    dilation: int
    outputs: int

    def result_shape(self) -> list[int]:
        sides = zip(self.x.shape[2:], self.weight.shape[2:], strict=True)
        size = [_output_size(*pair, self.stride, self.padding, self.dilation) for pair in sides]
        return [self.x.shape[0], self.outputs, *size]


def _by_library(call: _Call) -> Tensor:
    x, weight, bias, out_index, in_index, stride, padding, dilation, _ = call
    if in_index is not None:
        (part,) = native().pack_plain([weight], [out_index], [in_index], torch.get_num_threads())
    else:
        part = weight if out_index is None else weight.index_select(0, out_index)
    if bias is not None and out_index is not None:
        bias = bias.index_select(0, out_index)
    return F.conv2d(x, part, bias, stride, padding, dilation)


def _by_kernel(call: _Call) -> Tensor:
    form = torch.channels_last if is_channels_last(call.x) else torch.contiguous_format
    out = torch.empty(call.result_shape(), dtype=call.x.dtype, memory_format=form)
    native().pruned_conv2d_cpu(*call[:-1], out, torch.get_num_threads())
    return out


def _way(call: _Call) -> str:
    """ "kernel" or "library", whichever is faster on this machine (``faster.py``)."""
    x, weight = call.x, call.weight
    sizes = ("pruned_conv2d", x.shape, x.stride(), weight.shape, *call[5:])
    if (known := known_exactly(sizes)) is None:
        batch, outputs, down, across = call.result_shape()
        key = (
            "pruned_conv2d",
            *map(size_class, (batch * down * across, outputs, x.shape[1], *weight.shape[:2])),
            *weight.shape[2:],
            call.in_index is not None,
            is_channels_last(x),
        )
        known = known_way(key)
        if known is None:
            ways = {"library": partial(_by_library, call), "kernel": partial(_by_kernel, call)}
            known = decide(key, ways, "library")
        remember_exactly(sizes, known)
    return known


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """The same for height and width, or one for each; at least ``least``."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    numbers = [check_int("pruned_conv2d", name, number) for number in values]
    if len(numbers) not in (1, 2) or min(numbers) < least:
        raise ValueError(f"pruned_conv2d: {name}: expected 1 or 2 numbers >= {least}, got {value}")
    return numbers[0], numbers[-1]


def _output_size(size: int, kernel: int, stride: int, padding: int | str, dilation: int) -> int:
    if padding == "same":
        return size
    padded = size if isinstance(padding, str) else size + 2 * padding
    return (padded - dilation * (kernel - 1) - 1) // stride + 1


def _cut(tensor: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> Tensor:
    """tensor[out][:, in], differentiable."""
    if out_index is None and in_index is None:
        return tensor
    by_torch = (
        functorch_is_active()
        or derivative_by(tensor) is not None
        or (in_index is None and tensor.is_contiguous())
    )
    if not by_torch:
        try:
            (part,) = pack_op([tensor], [out_index], [in_index])
        except ValueError as error:
            names = {"rows[0]": "out_index", "cols[0]": "in_index", "tensors[0]": "weight"}
            raise renamed(error, "pruned_conv2d", names) from error
        return part
    try:
        part = select(select(tensor, 0, out_index), 1, in_index)
    except (IndexError, RuntimeError):
        check_range("pruned_conv2d", "out_index", out_index, tensor.shape[0], noun="indices")
        if in_index is not None:
            check_range("pruned_conv2d", "in_index", in_index, tensor.shape[1], noun="indices")
        raise
    return part.contiguous(memory_format=torch.channels_last) if is_channels_last(tensor) else part
