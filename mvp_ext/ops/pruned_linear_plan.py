"""Which way a call of pruned_linear goes: by the kernel (and how), or by the library on a weight that is cut first."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mvp_ext.ops._native import build_info
from mvp_ext.ops.device import is_emulated
from mvp_ext.ops.faster import Key, decide, known_exactly, known_way, remember_exactly, size_class

# Rows of x, outputs and inputs of a tile: Small, Medium and Large of csrc/cuda/pruned_linear.cu, and Hopper's.
TILINGS = ((16, 32, 128), (64, 64, 64), (128, 128, 32), (128, 128, 64))
HOPPER = 3
# Elements of 16 bits in a 16-byte vector.
VECTOR = 8


class Plan(NamedTuple):
    """How the kernel goes about a call: the tiling's number, and among how many blocks a tile's inputs are divided."""

    tiling: int
    splits: int


_forced: Plan | Literal["kernel", "library"] | None = None


@contextlib.contextmanager
def linear_by(way: Plan | Literal["kernel", "library"]) -> Iterator[None]:
    """For benchmarks and tests: in here every call that the kernel can do goes this way, whatever the rules say."""
    global _forced
    before, _forced = _forced, way
    try:
        yield
    finally:
        _forced = before


# (x, weight, bias, out_index, in_index, out_block, in_block, residual)
Way = Callable[..., Tensor]


def cpu_way(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
    kernel: Way,
    library: Way,
) -> str:
    """ "kernel", or "library" on a weight that is cut first: whichever is faster on this machine (``faster.py``)."""
    if x.dtype is torch.float64:
        # The kernel adds in float32.
        return "library"
    if _forced is not None:
        return "kernel" if isinstance(_forced, Plan) else _forced
    sizes = (
        *("pruned_linear", x.dtype, x.shape, weight.shape, weight.stride(), out_block, in_block),
        None if out_index is None else out_index.shape[0],
        None if in_index is None else in_index.shape[0],
        residual is None,
    )
    if (known := known_exactly(sizes)) is None:
        key = _class_of(x, weight, out_index, in_index, out_block, in_block, residual)
        known = known_way(key)
        if known is None:
            arguments = (x, weight, bias, out_index, in_index, out_block, in_block, residual)
            ways = {"kernel": partial(kernel, *arguments), "library": partial(library, *arguments)}
            rule = _rule(x.dtype, x.numel() // (x.shape[-1] or 1))
            # The rule's way is taken where the other is not clearly faster.
            known = decide(key, {rule: ways.pop(rule), **ways}, rule)
        remember_exactly(sizes, known)
    return known


def _class_of(
    x: Tensor,
    weight: Tensor,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
    residual: Tensor | None,
) -> Key:
    """The class of calls for which one measurement decides."""
    row_major = weight.stride(1) == 1
    # Two by two kept inputs lie side by side, as the machine's dot product of bfloat16 wants them.
    pairs = row_major and (in_index is None or in_block % 2 == 0) and weight.stride(0) % 2 == 0
    return (
        "pruned_linear",
        str(x.dtype),
        size_class(x.numel() // (x.shape[-1] or 1)),
        size_class(output_count(weight, out_index, out_block)),
        size_class(x.shape[-1]),
        size_class(weight.shape[0]),
        size_class(weight.shape[1]),
        row_major,
        pairs,
        0 if out_index is None else size_class(out_block),
        0 if in_index is None else size_class(in_block),
        residual is not None,
    )


def _rule(dtype: torch.dtype, rows: int) -> str:
    """Few rows are bound by reading the weight, which the kernel does once. Up to so many it keeps up with the library
    where it was measured; with more, the time is the product's alone, which the library knows best.
    """
    return "kernel" if rows <= (256 if dtype is torch.float32 else 64) else "library"


def cuda_plan(
    x: Tensor,
    weight: Tensor,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
) -> Plan | None:
    """The CUDA kernel's plan; None: cutting the weight and the library's GEMM do this call."""
    if not _readable(x, weight, out_index, in_index, out_block, in_block):
        return None
    if isinstance(_forced, Plan):
        if _forced.tiling == HOPPER and not has_hopper(x.device):
            raise RuntimeError(
                "pruned_linear: Plan(3, 1) needs a GPU of compute capability 9.0, a build with MVP_CUDA_ARCHS for it, "
                "and not MVP_HOPPER=0"
            )
        return _forced
    rows, outputs = math.prod(x.shape[:-1]), output_count(weight, out_index, out_block)
    if (_forced or _kernel_or_library(rows, outputs, x.shape[-1])) == "library":
        return None
    return _kernel_plan(rows, outputs, x.shape[-1], _multiprocessors(x.device))


def output_count(weight: Tensor, out_index: Tensor | None, out_block: int) -> int:
    return weight.shape[0] if out_index is None else out_index.shape[0] * out_block


def _readable(
    x: Tensor,
    weight: Tensor,
    out_index: Tensor | None,
    in_index: Tensor | None,
    out_block: int,
    in_block: int,
) -> bool:
    """Whether the kernel can read what is kept in 16-byte vectors, on tensor cores' types."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if x.shape[-1] % VECTOR or x.shape[-1] == 0 or weight.data_ptr() % 16:
        return False
    by_output, by_input = weight.stride()
    if by_input == 1:
        return by_output % VECTOR == 0 and (in_index is None or in_block % VECTOR == 0)
    return (
        by_output == 1
        and by_input % VECTOR == weight.shape[0] % VECTOR == 0
        and (out_index is None or out_block % VECTOR == 0)
    )


# What the rule takes for an H100's numbers.
_BYTES_A_SECOND = 3.3e12
_FLOPS_A_SECOND = 8e14  # of the library's wgmma kernels, dense
_SHARE_OF_LIBRARY = 0.6  # that mma.sync, which our kernel uses, reaches on Hopper
_LAUNCH_SECONDS = 2e-6


def _kernel_or_library(rows: int, outputs: int, inputs: int) -> Literal["kernel", "library"]:
    """Which of the two takes less time for x [rows, inputs] and ``outputs`` kept outputs.

    NOT YET MEASURED on a GPU: a model, whose constants (or form) a measurement is to replace. The library's way packs
    first: reads and writes what is kept of the weight, 4 · outputs · inputs bytes, in one launch or, where blocks are
    kept, two with the bias. Ours saves that, which is most of the time at few and middling rows, and loses where the
    GEMM's own time counts: there the library's kernels reach more of Hopper's tensor cores.
    """
    packing = 2 * _LAUNCH_SECONDS + 4 * outputs * inputs / _BYTES_A_SECOND
    product = 2 * rows * outputs * inputs / _FLOPS_A_SECOND
    return "library" if product * (1 / _SHARE_OF_LIBRARY - 1) > packing else "kernel"


_MIN_STAGES = 8  # of a block, where blocks share a tile's inputs: less would be all start and end
_MAX_SPLITS = 16


def has_hopper(device: torch.device) -> bool:
    """Whether the kernel by wgmma can run. No rule chooses it before it has been run on a GPU: see docs/cuda.md.

    MVP_HOPPER=0 in the environment says no: a kernel that hangs or faults takes everything else in its process with it.
    """
    if device.type != "cuda":
        return is_emulated()
    if os.environ.get("MVP_HOPPER") == "0":
        return False
    return bool(build_info()["hopper"]) and torch.cuda.get_device_capability(device) == (9, 0)


def _kernel_plan(rows: int, outputs: int, inputs: int, multiprocessors: int) -> Plan:
    """The largest tiling that has a tile for each multiprocessor. Not yet measured, either."""

    def tiles(tiling: int) -> int:
        return math.ceil(rows / TILINGS[tiling][0]) * math.ceil(outputs / TILINGS[tiling][1])

    if rows <= TILINGS[0][0]:
        tiling = 0
    else:
        tiling = 2 if rows > TILINGS[1][0] and tiles(2) >= multiprocessors else 1
    stages = math.ceil(inputs / TILINGS[tiling][2])
    splits = min(multiprocessors // max(tiles(tiling), 1), stages // _MIN_STAGES, _MAX_SPLITS)
    return Plan(tiling, even_splits(stages, splits))


def even_splits(stages: int, splits: int) -> int:
    """As many splits as have stages when each but the last has the same number of them."""
    return math.ceil(stages / math.ceil(stages / splits)) if splits > 1 else 1


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the emulator's
    return torch.cuda.get_device_properties(device).multi_processor_count
