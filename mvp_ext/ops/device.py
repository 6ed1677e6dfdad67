"""Where an op runs: CUDA's kernels and streams, and what stands in where this build has no kernels for a device."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from mvp_ext.ops._native import build_info, native

# Set by tests: the module whose CUDA kernels run in place of the native module's, on CPU tensors too.
emulator: ModuleType | None = None


def on_cuda(tensor: Tensor) -> bool:
    """Whether an op on this tensor runs its CUDA side."""
    return tensor.is_cuda or emulator is not None


def is_emulated() -> bool:
    return emulator is not None


def cuda_kernels() -> ModuleType:
    """The module with the CUDA kernels; RuntimeError with cause and remedy if this build has none."""
    if emulator is not None:
        return emulator
    module = native()
    if not build_info()["cuda"]:
        raise RuntimeError(
            "mvp_ext: expected CPU tensors, got CUDA tensors, and this build has no CUDA kernels: no nvcc was found "
            "when it was installed. Put nvcc on the PATH and install again with MVP_USE_CUDA=ON, move the tensors "
            "with .cpu(), or use mvp_ext.ops.reference on the GPU."
        )
    return module


# Private to torch; the public way takes ten times as long.
_raw_stream = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)


def device_and_stream(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and torch's current stream there: the last two arguments of every CUDA kernel.

    Kernels are only enqueued there. Nothing waits for the device or copies from it, so all ops can be captured in a
    CUDA graph.
    """
    if not tensor.is_cuda:
        return 0, 0
    index = tensor.device.index
    return index, _raw_stream(index)


def reject_float64(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype is torch.float64:
        raise TypeError(
            f"{op}: {name}: expected float32, float16 or bfloat16 on a GPU, got float64, which is computed on the CPU"
        )


def backend_for(device: torch.device) -> ModuleType:
    """``mvp_ext.ops``, or ``mvp_ext.ops.reference`` (the same functions in torch) for a device without kernels.

    For callers that must run anyway. An op itself never falls back: on a CUDA tensor of a build without CUDA kernels it
    raises. Pruning a model there is still possible, slower; the first use says so.
    """
    if device.type == "cpu" or (device.type == "cuda" and build_info()["cuda"]):
        return importlib.import_module("mvp_ext.ops")
    if device.type == "cuda":
        _warn_once()
    return importlib.import_module("mvp_ext.ops.reference")


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "this build of mvp_ext has no CUDA kernels (no nvcc was found when it was installed): scores, packing and "
        "merging on the GPU go through plain torch",
        stacklevel=3,
    )
