"""A linear layer's kept rows and columns, computed from its FULL weight.

What is kept is told by index tensors (of blocks of consecutive rows or columns), so a mask can change from call to call
without anybody cutting weights. Gradients of weight and bias come full-size, 0 where not kept.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops._native import native
from mvp_ext.ops.blocks import positions, scatter_back, select
from mvp_ext.ops.checks import (
    FLOATS,
    autocast_is_on,
    check_bias,
    check_index,
    check_int,
    check_range,
    check_shape,
    check_tensor,
)
from mvp_ext.ops.define import define, derivative_by, dispatch_is_observed, is_only_computed
from mvp_ext.ops.device import cuda_kernels, device_and_stream, on_cuda
from mvp_ext.ops.pack import pack_op
from mvp_ext.ops.pruned_linear_plan import (
    HOPPER,
    TILINGS,
    VECTOR,
    Plan,
    cpu_way,
    cuda_plan,
    even_splits,
    output_count,
)
from mvp_ext.ops.residual_add import residual_add, residual_add_op


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
    """A linear layer's kept rows and columns, from its full weight: `x · W[out][:, in]ᵀ + b[out]`.

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

    Under autocast x, weight and bias are cast as for a linear layer. Sums are in float32 (float64 for float64). On a
    CPU our kernel and torch's library (on a weight that is cut first) are tried on the first call of a class of sizes,
    and the faster one is used from then on in every process (``MVP_FASTER``: docs/kernels.md); by the kernel sums are
    the same for every number of threads. An index that comes twice counts twice. On a GPU an index out of range is an
    error of the device, and so is a value that comes twice in the out_index of a call with a residual.

    On a GPU a kernel for tensor cores reads float16 and bfloat16 from the full weight where vectors of 16 bytes can be
    gathered: K a multiple of 8, and either a row-major weight whose kept columns come in blocks of a multiple of 8, or
    an input-major one whose kept rows do. Otherwise, and for so many rows that cutting the weight costs nothing beside
    its product, the part is cut and the library multiplies (in float32 by torch's setting for TF32).
    """
    op = "pruned_linear"
    if residual is None and activation is None:
        y = _plain(x, weight, bias, out_index, in_index, out_block, in_block)
        if y is not None:
            return y
    check_tensor(op, "x", x, dtypes=FLOATS)
    if activation not in (None, "gelu"):
        raise ValueError(f'{op}: activation: expected None or "gelu", got {activation!r}')
    if activation is not None and residual is not None:
        raise ValueError(f"{op}: activation: expected None beside a residual, got {activation!r}")
    mixed = autocast_is_on(x) and x.dtype is not torch.float64
    dtypes = FLOATS if mixed else (x.dtype,)
    check_tensor(op, "weight", weight, ndim=2, dtypes=dtypes, device=x.device)
    rows, columns = weight.shape
    check_bias(op, bias, weight, dtypes=dtypes)
    if type(out_block) is not int or type(in_block) is not int:
        out_block, in_block = check_int(op, "out_block", out_block), check_int(op, "in_block", in_block)
    check_index(op, "out_index", out_index, out_block, rows, x.device)
    inputs = check_index(op, "in_index", in_index, in_block, columns, x.device)
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"{op}: x: expected shape [..., K] with K = {inputs}, got {tuple(x.shape)}")
    if residual is not None:
        check_tensor(op, "residual", residual, dtypes=dtypes, device=x.device)
        check_shape(op, "residual", residual, (*x.shape[:-1], rows), "[..., O]")
    if mixed:
        return _autocast_linear(
            x, weight, bias, out_index, in_index, out_block, in_block, residual, activation
        )
    arguments = (x, weight, bias, out_index, in_index, out_block, in_block, residual)
    way = derivative_by(x, weight, bias, residual)
    if way == "formula":
        return _formula(*arguments, activation == "gelu")
    if way == "function":
        return (
            _PrunedLinear.apply(*arguments)
            if activation is None
            else _PrunedLinearGelu.apply(*arguments[:-1])[0]
        )
    return pruned_linear_op(*arguments, activation == "gelu")


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
) -> Tensor | None:
    """The result of a call that needs nothing but the numbers, on the CPU; None of any other, and of a wrong one.

    A small product takes less time than all checks: here one native call makes them, and explains nothing.
    """
    if type(out_block) is not int or type(in_block) is not int or dispatch_is_observed():
        return None
    arguments = (x, weight, bias, out_index, in_index, out_block, in_block)
    outputs = native().plain_linear(*arguments)
    if outputs < 0 or not is_only_computed(x, weight, bias):
        return None
    if cpu_way(*arguments, None, _run_cpu_kernel, _run_library) == "library":
        return _run_library(*arguments, None)
    out = x.new_empty((*x.shape[:-1], outputs))
    native().pruned_linear_cpu(*arguments, None, out, torch.get_num_threads())
    return out


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
        if on_cuda(residual) and residual.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return residual_add(residual, y, kept, dim=-1)  # one pass; its CPU side wants no repeats
        return residual.index_add(-1, kept, y)


def _formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
    gelu: bool,
) -> Tensor:
    """The op in torch's own ops, for every transform that torch has."""
    rows, columns = weight.shape
    try:
        weight = select(select(weight, 0, out_index, out_block), 1, in_index, in_block)
        bias = None if bias is None else select(bias, 0, out_index, out_block)
    except (IndexError, RuntimeError):
        check_range("pruned_linear", "out_index", out_index, rows // out_block)
        check_range("pruned_linear", "in_index", in_index, columns // in_block)
        raise
    y = F.linear(x, weight, bias)
    if residual is None:
        return F.gelu(y) if gelu else y
    return residual + y if out_index is None else residual.index_add(-1, positions(out_index, out_block), y)


class _PrunedLinear(torch.autograd.Function):
    """∂x by the same op on the transposed weight; ∂W and ∂b scattered back into zeros of full size."""

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
        return pruned_linear_op(x, weight, bias, out_index, in_index, out_block, in_block, residual)

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
        out, y = pruned_linear_gelu_op(*arguments)
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
        grad_weight = scatter_back(part, weight.shape, out_index, in_index, out_block, in_block)
    if ctx.needs_input_grad[2]:
        grad_bias = scatter_back(flat.sum(0), (weight.shape[0],), out_index, None, out_block)
    return grad_x, grad_weight, grad_bias


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
    gelu: bool = False,
) -> Tensor:
    if residual is not None:
        return residual.new_empty(residual.shape)
    return x.new_empty((*x.shape[:-1], output_count(weight, out_index, out_block)))


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
    gelu: bool = False,
) -> Tensor:
    arguments = (x, weight, bias, out_index, in_index, out_block, in_block, residual)
    if on_cuda(x):
        plan = cuda_plan(x, weight, out_index, in_index, out_block, in_block)
        if plan is not None:
            return _run_cuda(*arguments, gelu, plan)[0]
        y = _run_library(*arguments)
    else:
        y = _run_cpu(*arguments)
    return F.gelu(y) if gelu else y


def _run_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
) -> Tensor:
    arguments = (x, weight, bias, out_index, in_index, out_block, in_block, residual)
    way = cpu_way(*arguments, _run_cpu_kernel, _run_library)
    return (_run_cpu_kernel if way == "kernel" else _run_library)(*arguments)


def _run_cpu_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
) -> Tensor:
    if 1 not in weight.stride():
        weight = weight.contiguous()
    if residual is None or out_index is None:
        out = _fake(x, weight, bias, out_index, in_index, out_block, in_block, residual)
        residual = None if residual is None else residual.contiguous()
    else:
        out = residual = residual.clone(memory_format=torch.contiguous_format)
    kept = (out_index, in_index, out_block, in_block)
    native().pruned_linear_cpu(x.contiguous(), weight, bias, *kept, residual, out, torch.get_num_threads())
    return out


def _run_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
    gelu: bool,
    plan: Plan,
    *,
    before: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The result, and with ``before`` what GELU was applied to."""
    outputs = output_count(weight, out_index, out_block)
    if residual is not None:
        residual = residual.contiguous()
        if outputs == 0:
            return residual.clone(), None
    out = _fake(x, weight, bias, out_index, in_index, out_block, in_block, residual)
    y = torch.empty_like(out) if before else None
    rows, inputs = math.prod(x.shape[:-1]), x.shape[-1]
    x = x.reshape(rows, inputs)
    # Rows that overlap cannot be read in boxes.
    overlapping = plan.tiling == HOPPER and rows > 1 and x.stride(0) < inputs
    if x.stride(1) != 1 or x.stride(0) % VECTOR or x.data_ptr() % 16 or overlapping:
        x = x.clone(memory_format=torch.contiguous_format)
    # Blocks that get no inputs would leave their part of the workspace unwritten.
    splits = even_splits(math.ceil(inputs / TILINGS[plan.tiling][2]), plan.splits)
    cuda_kernels().pruned_linear_cuda(
        x,
        weight,
        None if bias is None else bias.contiguous(),
        None if out_index is None else out_index.contiguous(),
        None if in_index is None else in_index.contiguous(),
        out_block,
        in_block,
        residual,
        gelu,
        out,
        y,
        plan.tiling,
        None if splits == 1 else x.new_empty((splits, rows, outputs), dtype=torch.float32),
        *device_and_stream(x),
    )
    return out, y


def _run_library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
) -> Tensor:
    """The kept part is cut, and the library multiplies."""
    try:
        single = out_block == in_block == 1 and not (out_index is in_index is None)
        if on_cuda(weight) and single and (weight.is_contiguous() or weight.t().is_contiguous()):
            weight, bias = _kept_in_one_launch(weight, bias, out_index, in_index)
        else:
            if bias is not None and out_index is not None:
                bias = _kept_rows(bias, out_index, out_block)
            weight = _kept_part(weight, out_index, in_index, out_block, in_block)
    except (IndexError, RuntimeError, ValueError):
        # torch's messages name no argument; checking first costs more.
        check_range("pruned_linear", "out_index", out_index, weight.shape[0] // out_block)
        check_range("pruned_linear", "in_index", in_index, weight.shape[1] // in_block)
        raise
    y = F.linear(x, weight, bias)
    if residual is None:
        return y
    residual = residual.contiguous()  # and so is the result, as it is from a kernel
    if out_index is None:
        return residual + y
    kept = positions(out_index, out_block)
    # On a GPU in one pass; index_add makes two, the second with atomics.
    if on_cuda(x) and x.dtype is not torch.float64:
        flat = residual.flatten(0, -2) if residual.ndim > 1 else residual[None]
        out: Tensor = residual_add_op(flat, y.reshape(flat.shape[0], y.shape[-1]), kept, None, None, False, 1)
        return out.view(residual.shape)
    return residual.index_add(-1, kept, y)


def _kept_part(
    weight: Tensor, rows: Tensor | None, cols: Tensor | None, row_block: int, col_block: int
) -> Tensor:
    """weight[rows][:, cols], by whichever way is fastest for its layout."""
    if not weight.is_contiguous() and weight.t().is_contiguous():
        return _kept_part(weight.t(), cols, rows, col_block, row_block).t()
    if rows is not None:
        weight = _kept_rows(weight, rows, row_block)
    if cols is not None and col_block > 1:
        blocks = weight.shape[1] // col_block  # not −1: no row may be kept
        return weight.reshape(weight.shape[0], blocks, col_block).index_select(1, cols).flatten(1)
    return weight if cols is None else pack_op([weight], [None], [cols])[0]


def _kept_rows(tensor: Tensor, rows: Tensor, block: int) -> Tensor:
    if block == 1:
        return tensor.index_select(0, rows)
    # A block as one long row, which is what is fastest to copy. Sizes are told: there may be none.
    rest, size = tensor.shape[1:], math.prod(tensor.shape[1:]) * block
    blocks = tensor.reshape(tensor.shape[0] // block, size).index_select(0, rows)
    return blocks.view(rows.shape[0] * block, *rest)


def _kept_in_one_launch(
    weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """weight[rows][:, cols] and bias[rows], for a GPU, where a launch often takes longer than the copy."""
    turned = not weight.is_contiguous()
    part = (weight.t(), cols, rows) if turned else (weight, rows, cols)
    parts = [part] if bias is None or rows is None else [part, (bias, rows, None)]
    kept, *kept_bias = pack_op(*map(list, zip(*parts, strict=True)))
    return kept.t() if turned else kept, kept_bias[0] if kept_bias else bias


pruned_linear_op = define(
    "pruned_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? out_index, Tensor? in_index, int out_block,"
    " int in_block, Tensor? residual, bool gelu=False) -> Tensor",
    fake=_fake,
    run=_run,
)


# The arguments of the next two are pruned_linear's but for the residual, in this order.
def _gelu_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    whole: tuple[Any, ...] = (*arguments, None)
    y = _fake(*whole)
    return torch.empty_like(y), y


def _gelu_run(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight, _, *kept = arguments
    whole: tuple[Any, ...] = (*arguments, None)
    if on_cuda(x):
        plan = cuda_plan(x, weight, *kept)
        if plan is not None:
            call: tuple[Any, ...] = (*whole, True, plan)
            out, y = _run_cuda(*call, before=True)
            assert y is not None
            return out, y
    y = _run(*whole)
    return F.gelu(y), y


pruned_linear_gelu_op = define(
    "pruned_linear_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor? out_index, Tensor? in_index, int out_block,"
    " int in_block) -> (Tensor, Tensor)",
    fake=_gelu_fake,
    run=_gelu_run,
)
