"""Schemas, fakes and device implementations of every op, in one place.

``torch.library.Library`` is used directly (``custom_op`` costs about three times as much a call). An op here trusts its
arguments: checks are in ``checks.py``, made by the public functions of ``functional.py``. Outputs are allocated here,
kernels only fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mvp_ext.ops._native import native

_library = torch.library.Library("mvp_ext", "DEF")


def _define(
    schema: str, *, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any] | None = None
) -> Any:
    """Register one op; returns its callable overload. Without ``cuda`` a CUDA tensor gets an error, no fallback."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda or _without_cuda(name), "CUDA")
    torch.library.register_fake(f"mvp_ext::{name}", fake, lib=_library)
    return getattr(torch.ops.mvp_ext, name).default


def nobody_listens() -> bool:
    """No mode, transform or profiler would see a call of an op: its kernel may be called directly."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.autograd._profiler_enabled()
    )


def _without_cuda(name: str) -> Callable[..., Any]:
    def raise_(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{name}: expected CPU tensors, got CUDA tensors, and this build of mvp_ext has no CUDA kernel for it. "
            "Move the tensors with .cpu(), or use mvp_ext.ops.reference on the GPU."
        )

    return raise_


def _meta_vote_outputs(
    masks: Tensor, weights: Tensor | None, kept: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    lead = () if weights is None or weights.ndim == 1 else (weights.shape[0],)
    units, device = masks.shape[1], masks.device
    return (
        torch.empty(*lead, units, dtype=torch.bool, device=device),
        torch.empty(*lead, sum(kept), dtype=torch.int32, device=device),
        torch.empty(*lead, units, dtype=torch.float32, device=device),
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


def _meta_vote_cpu(
    masks: Tensor,
    weights: Tensor | None,
    prior: Tensor | None,
    layers: Sequence[int],
    kept: Sequence[int],
    temperature: float | None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _meta_vote_outputs(masks, weights, kept)
    native().meta_vote_cpu(
        masks, weights, prior, layers, kept, temperature, seed, *outputs, torch.get_num_threads()
    )
    return outputs


meta_vote_op = _define(
    "meta_vote(Tensor masks, Tensor? weights, Tensor? prior, int[] layers, int[] kept, float? temperature, int seed)"
    " -> (Tensor mask, Tensor index, Tensor votes)",
    fake=_meta_vote_fake,
    cpu=_meta_vote_cpu,
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
    if not torch.compiler.is_compiling() and nobody_listens() and type(masks) is Tensor and masks.is_cpu:
        return _meta_vote_cpu(masks, weights, prior, layers, kept, temperature, seed)
    return meta_vote_op(masks, weights, prior, layers, kept, temperature, seed)
