"""Fresh memory for the many outputs of one call."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Layout = tuple[Sequence[int], Sequence[int]]  # shape, strides

# From about here on malloc gives what was freed back to the kernel, and every page of the next outputs is a fault.
HUGE_BYTES = 24 << 20
SMALL_BYTES = 64 << 10  # of a tensor: malloc has such memory at hand
LINE_BYTES = 64
SPARES = 2  # a pruning loop packs the next model while the last one still lives

_spare: list[mmap.mmap] = []


def empty_tensors(like: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Uninitialised tensors with the dtypes and the device of ``like``.

    Many large ones on the CPU lie in one mapping of huge pages, which the kernel hands out (and zeroes) several times
    as fast as ordinary ones. Each has a storage of its own. When the last one goes, the mapping is kept for a later
    call, its pages marked so that the kernel takes them back when it needs memory.
    """
    sizes = [math.prod(shape) * t.itemsize for t, (shape, _) in zip(like, layouts, strict=True)]
    total = sum(-size // LINE_BYTES * -LINE_BYTES for size in sizes if size >= SMALL_BYTES)
    if total < HUGE_BYTES or like[0].device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return [t.new_empty_strided(*layout) for t, layout in zip(like, layouts, strict=True)]
    memory = _mapping(total)
    tensors, offset = [], 0
    for t, (shape, strides), size in zip(like, layouts, sizes, strict=True):
        if size < SMALL_BYTES:
            tensors.append(t.new_empty_strided(shape, strides))
            continue
        flat = torch.frombuffer(memory, dtype=t.dtype, count=size // t.itemsize, offset=offset)
        tensors.append(flat.as_strided(shape, strides))
        offset += -size // LINE_BYTES * -LINE_BYTES
    return tensors


def _mapping(size: int) -> np.ndarray:
    """At least ``size`` bytes of huge pages, u8; they are given back when nothing refers to the array any more."""
    for memory in sorted(_spare, key=len):
        if size <= len(memory) <= 2 * size:
            try:
                _spare.remove(memory)
            except ValueError:  # another thread was faster
                continue
            break
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    weakref.finalize(array, _give_back, memory).atexit = False
    return array


def _give_back(memory: mmap.mmap) -> None:
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_FREE)
    _spare.append(memory)
    del _spare[:-SPARES]
