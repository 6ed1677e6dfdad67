"""Schemas, fakes and device implementations of every op (those on whole models: ``registry_packing.py``).

An op here trusts its arguments: checks are in ``checks.py``, made by the public functions of ``functional.py``. Outputs
are allocated here, kernels only fill them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops import cuda, cuda_linear
from mvp_ext.ops._native import build_info, native
from mvp_ext.ops.blocks import positions
from mvp_ext.ops.define import define, nobody_listens
from mvp_ext.ops.registry_packing import is_channels_last, pack


def _importance_fake(a: Tensor, grad: Tensor | None, kind: str, dim: int, units: int) -> Tensor:
    return a.new_empty(units, dtype=torch.float64 if a.dtype is torch.float64 else torch.float32)


def _importance(a: Tensor, grad: Tensor | None, kind: str, dim: int, units: int) -> Tensor:
    on_gpu = cuda.runs(a)
    if on_gpu:
        cuda.reject_float64("importance", "a", a)
    scores = _importance_fake(a, grad, kind, dim, units)
    if on_gpu:
        return cuda.importance(a, grad, kind, dim, scores)
    if grad is not None and grad.stride() != a.stride():
        grad = torch.empty_like(a).copy_(grad)  # a copy costs less than reading two layouts at once
    native().importance_cpu(a, grad, kind, dim, scores, torch.get_num_threads())
    return scores


importance_op = define(
    "importance(Tensor a, Tensor? grad, str kind, int dim, int units) -> Tensor",
    fake=_importance_fake,
    run=_importance,
)


def importance(a: Tensor, grad: Tensor | None, kind: str, dim: int, units: int) -> Tensor:
    plain = type(a) is Tensor and (a.is_cpu or a.is_cuda)
    if plain and not torch.compiler.is_compiling() and nobody_listens():
        return _importance(a, grad, kind, dim, units)
    return importance_op(a, grad, kind, dim, units)


def _meta_vote_outputs(
    masks: Tensor, weights: Tensor | None, kept: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    lead = () if weights is None or weights.ndim == 1 else (weights.shape[0],)
    units = masks.shape[1]
    return (
        masks.new_empty(*lead, units),
        masks.new_empty(*lead, sum(kept), dtype=torch.int32),
        masks.new_empty(*lead, units, dtype=torch.float32),
    )


def _meta_vote_fake(
    masks: Tensor,
    weights: Tensor | None,
    prior: Tensor | None,
    layers: Sequence[int],
    kept: Sequence[int],
    temperature: float | None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _meta_vote_outputs(masks, weights, kept)


def _meta_vote(
    masks: Tensor,
    weights: Tensor | None,
    prior: Tensor | None,
    layers: Sequence[int],
    kept: Sequence[int],
    temperature: float | None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _meta_vote_outputs(masks, weights, kept)
    if cuda.runs(masks):
        return cuda.meta_vote(masks, weights, prior, layers, kept, temperature, seed, outputs)
    native().meta_vote_cpu(
        masks, weights, prior, layers, kept, temperature, seed, *outputs, torch.get_num_threads()
    )
    return outputs


meta_vote_op = define(
    "meta_vote(Tensor masks, Tensor? weights, Tensor? prior, int[] layers, int[] kept, float? temperature, int seed)"
    " -> (Tensor mask, Tensor index, Tensor votes)",
    fake=_meta_vote_fake,
    run=_meta_vote,
)


def meta_vote(
    masks: Tensor,
    weights: Tensor | None,
    prior: Tensor | None,
    layers: Sequence[int],
    kept: Sequence[int],
    temperature: float | None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op; its kernel directly where no one can tell the difference: for a small vote the way through the dispatcher
    takes as long as the vote."""
    plain = type(masks) is Tensor and (masks.is_cpu or masks.is_cuda)
    if plain and not torch.compiler.is_compiling() and nobody_listens():
        return _meta_vote(masks, weights, prior, layers, kept, temperature, seed)
    return meta_vote_op(masks, weights, prior, layers, kept, temperature, seed)


def _pruned_linear_output(
    x: Tensor, weight: Tensor, out_index: Tensor | None, out_block: int, residual: Tensor | None
) -> Tensor:
    if residual is not None:
        return residual.new_empty(residual.shape)
    outputs = weight.shape[0] if out_index is None else out_index.shape[0] * out_block
    return x.new_empty((*x.shape[:-1], outputs))


def _pruned_linear_fake(
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
    return _pruned_linear_output(x, weight, out_index, out_block, residual)


_NEVER = 1 << 62


@functools.cache
def _library_rows(dtype: torch.dtype, pairs: bool) -> int:
    """From this many rows of x on, cutting the weight and the library's GEMM beat the kernel. Measured.

    ``pairs``: the kernel could take kept inputs two by two.
    """
    if dtype is torch.float64:
        return 0  # the kernel adds in float32
    info = build_info()
    if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # Like the library, the kernel has the machine's dot product of bf16 pairs, but only for pairs that lie side
        # by side in the weight; elsewhere it widens to float32.
        return _NEVER if pairs and info["cpu_bf16_pairs"] else 17
    return 5 if dtype is torch.float32 and info["cpu_isa"] == "baseline" else _NEVER


def _kept_rows(tensor: Tensor, rows: Tensor, block: int) -> Tensor:
    if block == 1:
        return tensor.index_select(0, rows)
    return tensor.unflatten(0, (-1, block)).index_select(0, rows).flatten(0, 1)


def _kept_part(
    weight: Tensor, rows: Tensor | None, cols: Tensor | None, row_block: int, col_block: int
) -> Tensor:
    """weight[rows][:, cols], by whichever way is fastest for its layout."""
    if not weight.is_contiguous() and weight.t().is_contiguous():
        return _kept_part(weight.t(), cols, rows, col_block, row_block).t()
    if rows is not None:
        weight = _kept_rows(weight, rows, row_block)
    if cols is not None and col_block > 1:
        return weight.reshape(weight.shape[0], -1, col_block).index_select(1, cols).flatten(1)
    return weight if cols is None else pack([weight], [None], [cols])[0]


def _kept_in_one_launch(
    weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """weight[rows][:, cols] and bias[rows], for a GPU, where a launch often takes longer than the copy."""
    turned = not weight.is_contiguous()
    part = (weight.t(), cols, rows) if turned else (weight, rows, cols)
    parts = [part] if bias is None or rows is None else [part, (bias, rows, None)]
    kept, *kept_bias = pack(*map(list, zip(*parts, strict=True)))
    return kept.t() if turned else kept, kept_bias[0] if kept_bias else bias


def _pruned_linear_library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
) -> Tensor:
    try:
        single = out_block == in_block == 1 and not (out_index is in_index is None)
        if cuda.runs(weight) and single and (weight.is_contiguous() or weight.t().is_contiguous()):
            weight, bias = _kept_in_one_launch(weight, bias, out_index, in_index)
        else:
            if bias is not None and out_index is not None:
                bias = _kept_rows(bias, out_index, out_block)
            weight = _kept_part(weight, out_index, in_index, out_block, in_block)
    except (
        IndexError,
        RuntimeError,
        ValueError,
    ):  # torch's messages name no argument; checking first costs more
        _check_range("out_index", out_index, weight.shape[0] // out_block)
        _check_range("in_index", in_index, weight.shape[1] // in_block)
        raise
    y = F.linear(x, weight, bias)
    if residual is None:
        return y
    if out_index is None:
        return residual + y
    kept = positions(out_index, out_block)
    if (
        cuda.runs(x) and x.dtype is not torch.float64
    ):  # in one pass; index_add makes two, the second with atomics
        flat = residual.flatten(0, -2) if residual.ndim > 1 else residual[None]
        flat = cuda.residual_add(
            flat, y.reshape(flat.shape[0], y.shape[-1]), kept, None, None, False, 1, torch.contiguous_format
        )
        return flat.view(residual.shape)
    return residual.index_add(-1, kept, y)


def _check_range(name: str, index: Tensor | None, size: int) -> None:
    for unit in [] if index is None else index.tolist():
        if not 0 <= unit < size:
            raise ValueError(f"pruned_linear: {name}: expected values in [0, {size}), got {unit}")


def _pruned_linear(
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
    if cuda.runs(x):
        plan = cuda_linear.plan(x, weight, out_index, in_index, out_block, in_block)
        if plan is not None:
            return cuda_linear.pruned_linear(*arguments, gelu, plan)[0]
        y = _pruned_linear_library(*arguments)
    else:
        y = _pruned_linear_cpu(*arguments)
    return F.gelu(y) if gelu else y


def _pruned_linear_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
) -> Tensor:
    pairs = (
        weight.stride(1) == 1
        and (in_index is None or in_block % 2 == 0)
        and weight.shape[1] % 2 == 0 == weight.stride(0) % 2
    )
    if x.numel() // (x.shape[-1] or 1) >= _library_rows(x.dtype, pairs):
        return _pruned_linear_library(x, weight, bias, out_index, in_index, out_block, in_block, residual)
    if 1 not in weight.stride():
        weight = weight.contiguous()
    if residual is None or out_index is None:
        out = _pruned_linear_output(x, weight, out_index, out_block, residual)
        residual = None if residual is None else residual.contiguous()
    else:
        out = residual = residual.clone(memory_format=torch.contiguous_format)
    native().pruned_linear_cpu(
        x.contiguous(),
        weight,
        bias,
        out_index,
        in_index,
        out_block,
        in_block,
        residual,
        out,
        torch.get_num_threads(),
    )
    return out


pruned_linear_op = define(
    "pruned_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? out_index, Tensor? in_index, int out_block,"
    " int in_block, Tensor? residual, bool gelu=False) -> Tensor",
    fake=_pruned_linear_fake,
    run=_pruned_linear,
)


def pruned_linear(
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
    """The op; its kernel directly where no one can tell the difference, as for ``meta_vote``."""
    call = pruned_linear_op
    if (
        not torch.compiler.is_compiling()
        and nobody_listens()
        and type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
    ):
        call = _pruned_linear
    return call(x, weight, bias, out_index, in_index, out_block, in_block, residual, gelu)


# pruned_linear's arguments but for the residual, in this order.
def _pruned_linear_gelu_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight, _, out_index, _, out_block, _ = arguments
    y = _pruned_linear_output(x, weight, out_index, out_block, None)
    return torch.empty_like(y), y


def _pruned_linear_gelu(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight, _, *kept = arguments
    whole: tuple[Any, ...] = (*arguments, None)
    if cuda.runs(x):
        plan = cuda_linear.plan(x, weight, *kept)
        if plan is not None:
            call: tuple[Any, ...] = (*whole, True, plan)
            out, y = cuda_linear.pruned_linear(*call, before=True)
            assert y is not None
            return out, y
    y = _pruned_linear(*whole)
    return F.gelu(y), y


pruned_linear_gelu_op = define(
    "pruned_linear_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor? out_index, Tensor? in_index, int out_block,"
    " int in_block) -> (Tensor, Tensor)",
    fake=_pruned_linear_gelu_fake,
    run=_pruned_linear_gelu,
)


def pruned_linear_gelu(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """gelu(y) and y; the kernel directly where no one can tell the difference."""
    plain = type(x) is Tensor and (x.is_cpu or x.is_cuda)
    if plain and not torch.compiler.is_compiling() and nobody_listens():
        return _pruned_linear_gelu(x, *arguments)
    out, y = pruned_linear_gelu_op(x, *arguments)
    return out, y


def _residual_form(residual: Tensor, dim: int) -> torch.memory_format:
    return torch.channels_last if dim == 1 and is_channels_last(residual) else torch.contiguous_format


def _residual_add_fake(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dim: int,
) -> Tensor:
    return torch.empty_like(residual, memory_format=_residual_form(residual, dim))


def _residual_add(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dim: int,
) -> Tensor:
    if cuda.runs(residual):
        form = _residual_form(residual, dim)
        return cuda.residual_add(residual, y, index, scale, shift, relu, dim, form)
    if (
        residual.is_contiguous()
    ):  # the common case, and every call counts: a small block is done in a microsecond
        y = y.contiguous()
    else:
        form = _residual_form(residual, dim)
        residual, y = residual.contiguous(memory_format=form), y.contiguous(memory_format=form)
    out = torch.empty_like(residual)
    if scale is not None or shift is not None:
        accumulator = torch.float64 if residual.dtype is torch.float64 else torch.float32
        scale = None if scale is None else scale.to(accumulator)
        shift = None if shift is None else shift.to(accumulator)
    native().residual_add_cpu(residual, y, index, scale, shift, relu, dim, out, torch.get_num_threads())
    return out


residual_add_op = define(
    "residual_add(Tensor residual, Tensor y, Tensor? index, Tensor? scale, Tensor? shift, bool relu, int dim)"
    " -> Tensor",
    fake=_residual_add_fake,
    run=_residual_add,
)


def residual_add(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dim: int,
) -> Tensor:
    """The op; its kernel directly where no one can tell the difference, as for ``meta_vote``."""
    if not torch.compiler.is_compiling() and nobody_listens() and type(residual) is type(y) is Tensor:
        return _residual_add(residual, y, index, scale, shift, relu, dim)
    return residual_add_op(residual, y, index, scale, shift, relu, dim)
