"""Kernels where this build has them for a device, plain torch (loudly) where not: for callers that must run anyway."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch

from mvp_ext.ops import reference
from mvp_ext.ops._native import build_info


def ops_for(device: torch.device) -> ModuleType:
    """``mvp_ext.ops``, or ``mvp_ext.ops.reference`` (the same functions in torch) for a device without kernels.

    An op itself never falls back: on a CUDA tensor of a build without CUDA kernels it raises. Pruning a model there is
    still possible, slower; the first use says so.
    """
    if device.type == "cpu" or (device.type == "cuda" and build_info()["cuda"]):
        import mvp_ext.ops

        return mvp_ext.ops
    if device.type == "cuda":
        _warn_once()
    return reference


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "this build of mvp_ext has no CUDA kernels (no nvcc was found when it was installed): scores, packing and "
        "merging on the GPU go through plain torch",
        stacklevel=3,
    )
