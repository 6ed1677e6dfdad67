"""The ops on CUDA tensors: outputs and workspaces are allocated here, kernels enqueued on torch's current stream.

Nothing waits for the device or copies from it, so all of this can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mvp_ext.ops._native import build_info, native

# Set by tests: the kernels are the emulator's, and CPU tensors take the place of CUDA tensors.
stand_in = False


def kernels() -> ModuleType:
    """The native module; RuntimeError with cause and remedy if it was built without CUDA kernels."""
    module = native()
    if not build_info()["cuda"]:
        raise RuntimeError(
            "mvp_ext: expected CPU tensors, got CUDA tensors, and this build has no CUDA kernels: no nvcc was found "
            "when it was installed. Put nvcc on the PATH and install again with MVP_USE_CUDA=ON, move the tensors "
            "with .cpu(), or use mvp_ext.ops.reference on the GPU."
        )
    return module


def runs(tensor: Tensor) -> bool:
    """Whether an op on this tensor runs its CUDA side."""
    return tensor.is_cuda or stand_in


def queue(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and torch's current stream there: the last two arguments of every kernel."""
    if not tensor.is_cuda:
        return 0, 0
    index = tensor.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def importance(a: Tensor, grad: Tensor | None, kind: str, dim: int, scores: Tensor) -> Tensor:
    if a.numel() == 0:
        return scores.fill_(float("nan") if kind == "activation" else 0.0)  # a mean, a sum of nothing
    if grad is not None and not _alike(a, grad):
        grad = torch.empty_like(a).copy_(grad)  # a copy costs less than reading two layouts at once
        if not _alike(a, grad):  # a has holes, or does not start where torch lets tensors start
            a = torch.empty_like(a).copy_(a)
    module = kernels()
    partial_sums = module.importance_workspace_cuda(a, dim, scores.shape[0])
    workspace = torch.empty(partial_sums, dtype=torch.float32, device=a.device)
    module.importance_cuda(a, grad, kind, dim, workspace, scores, *queue(a))
    return scores


def _alike(a: Tensor, b: Tensor) -> bool:
    """The same strides, and as far from a multiple of 16 bytes: so are their rows."""
    return a.stride() == b.stride() and (a.data_ptr() - b.data_ptr()) % 16 == 0


def meta_vote(
    masks: Tensor,
    weights: Tensor | None,
    prior: Tensor | None,
    layers: Sequence[int],
    kept: Sequence[int],
    temperature: float | None,
    seed: int,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    kernels().meta_vote_cuda(masks, weights, prior, layers, kept, temperature, seed, *outputs, *queue(masks))
    return outputs


def residual_add(
    residual: Tensor,
    y: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dim: int,
    form: torch.memory_format,
) -> Tensor:
    reject_float64("residual_add", "residual", residual)
    residual = aligned(residual.contiguous(memory_format=form), form)
    out = torch.empty_like(residual, memory_format=form)
    kernels().residual_add_cuda(
        residual,
        y.contiguous(memory_format=form),
        None if index is None else index.contiguous(),
        None if scale is None else scale.float().contiguous(),
        None if shift is None else shift.float().contiguous(),
        relu,
        dim,
        out,
        *queue(residual),
    )
    return out


def reject_float64(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype is torch.float64:
        raise TypeError(
            f"{op}: {name}: expected float32, float16 or bfloat16 on a GPU, got float64, which is computed on the CPU"
        )


def aligned(tensor: Tensor, form: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A tensor that starts at a multiple of 16 bytes, as torch allocates them; a slice may not."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=form)
