"""For tests of ops that run on several backends (the fixture ``device``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mvp_ext.ops.device import is_emulated

needs_exchange = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="this torch has fields, but no views of tensors",
)


def on_gpu(device: torch.device) -> bool:
    """The CUDA side of an op runs, be it on a GPU or in the emulator."""
    return device.type == "cuda" or is_emulated()


def skip_float64_on_gpu(dtype: torch.dtype, device: torch.device) -> None:
    if dtype is torch.float64 and on_gpu(device):
        pytest.skip("float64 is computed on the CPU only")


def sanitized(dtypes: Sequence[torch.dtype], chosen: Sequence[torch.dtype]) -> list[Any]:
    """For ``parametrize``: under the sanitizers, which are slow and see no values, those of ``chosen`` alone."""
    marked = {dtype: pytest.param(dtype, marks=pytest.mark.sanitize) for dtype in chosen}
    return [marked.get(dtype, dtype) for dtype in dtypes]


def move(device: torch.device, *values: Any) -> tuple[Any, ...]:
    """Tensors to the device, in their memory format; other values as they are."""
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in values)
