"""The ops that compute with the kept part of a FULL weight: public functions and their gradients.

What is kept is told by index tensors (int32 or int64, of blocks of consecutive rows or columns), so a mask can change
from call to call without anybody cutting weights. Gradients of weights and biases come full-size, 0 where not kept.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops import cuda, registry, registry_packing
from mvp_ext.ops.blocks import positions, put_back
from mvp_ext.ops.checks import FLOATS, check_shape, check_tensor
from mvp_ext.ops.residual import residual_add

_INDICES = (torch.int32, torch.int64)


def _check_index(
    op: str, name: str, index: Tensor | None, block: int, size: int, device: torch.device
) -> int:
    """How many of ``size`` positions ``index`` keeps. Its values are checked where they are read."""
    if index is None:
        return size
    check_tensor(op, name, index, ndim=1, dtypes=_INDICES, device=device)
    if block < 1 or size % block:
        raise ValueError(f"{op}: block of {name}: expected a divisor of {size}, got {block}")
    return index.shape[0] * block


def _check_vector(op: str, name: str, value: Tensor | None, size: int, like: Tensor) -> None:
    if value is not None:
        check_tensor(op, name, value, ndim=1, dtypes=(like.dtype,), device=like.device)
        if value.shape[0] != size:
            check_shape(op, name, value, (size,), "[O]")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def pruned_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_index: Tensor | None = None,
    in_index: Tensor | None = None,
    *,
    out_block: int = 1,
    in_block: int = 1,
    residual: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
) -> Tensor:
    """A linear layer's kept rows and columns, from its full weight: x · W[out][:, in]ᵀ + b[out].

    Args:
        x: float [..., K], the kept inputs only.
        weight: [O, I], dtype and device of x. Row-major, or a transposed view (input-major, which is the layout to
            choose where columns are kept).
        bias: [O].
        out_index: int32 or int64, numbers of the kept blocks of ``out_block`` rows, in [0, O / out_block); the result
            has N = len · out_block columns, in its order. None: all. Ascending is fastest.
        in_index: the same for columns, K = len · in_block.
        residual: [..., O]. The result is then a new [..., O]: residual, with y added at the kept columns.
        activation: "gelu": of the result, exact (by erf), as F.gelu's default. Not beside a residual.

    Returns:
        [..., N], or [..., O] with a residual. Differentiable in x, weight, bias and residual (twice).

    Raises:
        TypeError, ValueError: kinds, dtypes, shapes, devices, an index out of range, an activation and a residual.

    Under autocast x, weight and bias are cast as for a linear layer. Sums are in float32 (float64 for float64), the
    same from run to run and for every number of threads. An index that comes twice counts twice. On a GPU an index out
    of range is an error of the device, and so is a value that comes twice in the out_index of a call with a residual.

    On a GPU a kernel for tensor cores reads float16 and bfloat16 from the full weight where vectors of 16 bytes can be
    gathered: K a multiple of 8, and either a row-major weight whose kept columns come in blocks of a multiple of 8, or
    an input-major one whose kept rows do. Otherwise, and for so many rows that cutting the weight costs nothing beside
    its product, the part is cut and the library multiplies (in float32 by torch's setting for TF32).
    """
    op = "pruned_linear"
    check_tensor(op, "x", x, dtypes=FLOATS)
    if activation not in (None, "gelu"):
        raise ValueError(f'{op}: activation: expected None or "gelu", got {activation!r}')
    if activation is not None and residual is not None:
        raise ValueError(f"{op}: activation: expected None beside a residual, got {activation!r}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return _autocast_linear(
            x, weight, bias, out_index, in_index, out_block, in_block, residual, activation
        )
    check_tensor(op, "weight", weight, ndim=2, dtypes=(x.dtype,), device=x.device)
    rows, columns = weight.shape
    _check_vector(op, "bias", bias, rows, weight)
    _check_index(op, "out_index", out_index, out_block, rows, x.device)
    inputs = _check_index(op, "in_index", in_index, in_block, columns, x.device)
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"{op}: x: expected shape [..., K] with K = {inputs}, got {tuple(x.shape)}")
    if residual is not None:
        check_tensor(op, "residual", residual, dtypes=(x.dtype,), device=x.device)
        check_shape(op, "residual", residual, (*x.shape[:-1], rows), "[..., O]")
    arguments = (x, weight, bias, out_index, in_index, out_block, in_block, residual)
    if _needs_grad(x, weight, bias, residual):
        return (
            _PrunedLinear.apply(*arguments)
            if activation is None
            else _PrunedLinearGelu.apply(*arguments[:-1])[0]
        )
    return registry.pruned_linear(*arguments, activation == "gelu")


class _PrunedLinear(torch.autograd.Function):
    """∂x by the same op on the transposed weight; ∂W and ∂b put back into zeros of full size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_index: Tensor | None,
        in_index: Tensor | None,
        out_block: int,
        in_block: int,
        residual: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, out_index, in_index)
        ctx.blocks = out_block, in_block
        ctx.to_residual = residual is not None
        return registry.pruned_linear(x, weight, bias, out_index, in_index, out_block, in_block, residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out_index, in_index = ctx.saved_tensors
        grad_y = grad
        if ctx.to_residual and out_index is not None:
            grad_y = grad.index_select(-1, positions(out_index, ctx.blocks[0]))
        grads = _linear_gradients(ctx, grad_y, x, weight, out_index, in_index)
        return *grads, None, None, None, None, grad if ctx.to_residual else None


class _PrunedLinearGelu(torch.autograd.Function):
    """gelu(y) and y, which the gradient needs: an output, so that the gradient can be differentiated, too."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, y = registry.pruned_linear_gelu(*arguments)
        x, weight, _, out_index, in_index, *ctx.blocks = arguments
        ctx.save_for_backward(x, weight, out_index, in_index, y)
        ctx.set_materialize_grads(False)
        return out, y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, out_index, in_index, y = ctx.saved_tensors
        if grad is not None:
            through = torch.ops.aten.gelu_backward(grad, y)
            grad_y = through if grad_y is None else grad_y + through
        if grad_y is None:
            return (None,) * 7
        return *_linear_gradients(ctx, grad_y, x, weight, out_index, in_index), None, None, None, None


def _linear_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, out_index: Tensor | None, in_index: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias, from y's."""
    out_block, in_block = ctx.blocks
    grad_x = grad_weight = grad_bias = None
    flat = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])  # not −1: nothing may be kept
    if ctx.needs_input_grad[0]:
        grad_x = pruned_linear(
            grad, weight.t(), None, in_index, out_index, out_block=in_block, in_block=out_block
        )
    if ctx.needs_input_grad[1]:
        part = flat.t() @ x.reshape(len(flat), x.shape[-1])
        grad_weight = put_back(part, weight.shape, out_index, in_index, out_block, in_block)
    if ctx.needs_input_grad[2]:
        grad_bias = put_back(flat.sum(0), (weight.shape[0],), out_index, None, out_block)
    return grad_x, grad_weight, grad_bias


def _autocast_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
    activation: Literal["gelu"] | None,
) -> Tensor:
    """As F.linear does under autocast; the residual keeps its dtype, as in ``residual + linear(x)``."""
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        fused = residual is not None and residual.dtype is dtype
        y = pruned_linear(
            x,
            weight,
            bias,
            out_index,
            in_index,
            out_block=out_block,
            in_block=in_block,
            residual=residual if fused else None,
            activation=activation,
        )
        if residual is None or fused:
            return y
        if out_index is None:
            return residual + y
        kept, y = positions(out_index, out_block), y.to(residual.dtype)
        if cuda.runs(residual) and residual.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return residual_add(residual, y, kept, dim=-1)  # one pass; its CPU side wants no repeats
        return residual.index_add(-1, kept, y)


def pruned_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    head_index: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """Multi-head self-attention of the kept heads only, from the full weights (timm's layout).

    y = concat_h softmax(q_h k_hᵀ · scale) v_h · W_proj[:, kept]ᵀ + b_proj, q, k, v = x · W_qkv[kept]ᵀ + b_qkv[kept]

    Args:
        x: float [B, n, C].
        qkv_weight: [3 · H · D, C]: rows of q, then k, then v, head by head. qkv_bias: [3 · H · D] or None.
        proj_weight: [C, H · D]; a transposed view (input-major) is faster. proj_bias: [C] or None.
        head_index: int32 or int64, kept heads in [0, H). None kept: the result is proj_bias.
        num_heads: H of the full weights.
        scale: of the scores. Default D ** -0.5, D the head dim, whatever is kept.

    Returns:
        [B, n, C]. Differentiable in x and all weights and biases.

    Raises:
        TypeError, ValueError: kinds, dtypes, shapes, devices, a head out of range.

    Linear layers by ``pruned_linear``, attention by scaled_dot_product_attention.
    """
    op = "pruned_attention"
    check_tensor(op, "x", x, ndim=3, dtypes=FLOATS)
    check_tensor(op, "qkv_weight", qkv_weight, ndim=2)
    check_tensor(op, "proj_weight", proj_weight, ndim=2)
    check_tensor(op, "head_index", head_index, ndim=1, dtypes=_INDICES, device=x.device)
    width = qkv_weight.shape[0] // 3
    if num_heads < 1 or qkv_weight.shape[0] % (3 * num_heads):
        raise ValueError(
            f"{op}: num_heads: expected a divisor of {qkv_weight.shape[0] / 3:g} (qkv_weight.shape[0] / 3),"
            f" got {num_heads}"
        )
    check_shape(op, "proj_weight", proj_weight, (None, width), "[C, H · D]")
    head_dim = width // num_heads
    batch, tokens, _ = x.shape
    parts = torch.cat([head_index, head_index + num_heads, head_index + 2 * num_heads])
    kept = head_index.shape[0]
    qkv = pruned_linear(x, qkv_weight, qkv_bias, parts, out_block=head_dim)
    q, k, v = qkv.view(batch, tokens, 3, kept, head_dim).permute(2, 0, 3, 1, 4).unbind(0)  # [B, kept, n, D]
    y = F.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5 if scale is None else scale)
    y = y.transpose(1, 2).flatten(2)  # [B, n, kept · D]
    return pruned_linear(y, proj_weight, proj_bias, None, head_index, in_block=head_dim)


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
    """A convolution's kept filters and input channels, from its full weight: conv2d(x, W[out][:, in], b[out]).

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
    mixed = torch.is_autocast_enabled(x.device.type)  # then conv2d itself casts
    check_tensor(op, "weight", weight, ndim=4, dtypes=FLOATS if mixed else (x.dtype,), device=x.device)
    filters, channels = weight.shape[:2]
    _check_vector(op, "bias", bias, filters, weight)
    kept_filters = _check_index(op, "out_index", out_index, 1, filters, x.device)
    kept = _check_index(op, "in_index", in_index, 1, channels, x.device)
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
    if _needs_grad(tensor):
        return _Cut.apply(tensor, out_index, in_index)
    return registry_packing.pack([tensor], [out_index], [in_index])[0]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> Tensor:
        ctx.save_for_backward(out_index, in_index)
        ctx.shape = tensor.shape
        return registry_packing.pack([tensor], [out_index], [in_index])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return put_back(grad, ctx.shape, *ctx.saved_tensors), None, None
