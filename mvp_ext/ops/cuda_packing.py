"""pack, unpack and merge on CUDA tensors; as ``cuda.py``. Tensors are dense, as ``registry_packing`` makes them."""

from __future__ import annotations

from torch import Tensor

from mvp_ext.ops import cuda

Indices = list[Tensor | None]


def pack(tensors: list[Tensor], rows: Indices, cols: Indices, packed: list[Tensor]) -> None:
    cuda.kernels().pack_cuda(tensors, rows, cols, packed, *cuda.queue(tensors[0]))


def unpack(packed: list[Tensor], rows: Indices, cols: Indices, out: list[Tensor]) -> None:
    cuda.kernels().unpack_cuda(packed, rows, cols, out, *cuda.queue(out[0]))
