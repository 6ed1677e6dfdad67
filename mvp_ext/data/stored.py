"""Images that stay in files: what a batch needs is read when the batch is made."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvp_ext.data.errors import DataError


class Part(NamedTuple):
    """Some images in a row. One of a file is sent to another process as the file's path: no pixel is.

    Attributes:
        pixels: uint8 [n, H, W, 3].
        mapping: the file that they lie in; None: they are in memory.
        path: of that file.
    """

    pixels: np.ndarray
    mapping: mmap.mmap | None = None
    path: str = ""

    @classmethod
    def mapped(cls, file: BinaryIO, shape: tuple[int, ...]) -> Part:
        """Pixels of this shape that are the end of an open file."""
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.prod(shape))
        pixels = np.frombuffer(mapping, np.uint8, count, len(mapping) - count)
        return cls(pixels.reshape(shape), mapping, os.path.abspath(file.name))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mapping is None:
            return Part, (self.pixels,)
        return _opened, (self.path, self.pixels.shape, len(self.mapping))

    def announce(self, places: np.ndarray) -> None:
        """Have the system read the images at these places all at once, and not each when it is touched: a disk is many
        times as fast."""
        if self.mapping is None:
            return
        start, size = len(self.mapping) - self.pixels.nbytes, self.pixels.nbytes // len(self.pixels)
        for place in places.tolist():
            begin = start + place * size
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self.mapping.madvise(mmap.MADV_WILLNEED, page, begin + size - page)


def _opened(path: str, shape: tuple[int, ...], size: int) -> Part:
    """What another process has open. The file's name says what is in it: one of that name and size is the same."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == size:
                return Part.mapped(file, shape)
            problem = "it has another size"
    except OSError as error:
        problem = error.strerror or str(error)
    raise DataError(
        f"{path}: expected the decoded images to be in this file on {os.uname().nodename}, too ({problem}): give a "
        "folder that all machines share with cache=DIR (--cache DIR), or keep them in memory with False (--cache off)"
    )


class StoredImages:
    """Images like a tensor uint8 [n, H, W, 3], of which only what is asked for is in memory, and only then.

    ``len``, ``shape``, ``dtype``, ``device``, ``split``, ``to`` and indexing are as a tensor's. Every tensor that comes
    out is new and the caller's own; ``only`` and ``to`` read nothing.

    Args:
        parts: one behind the other, all of one height and width.
        rows: int64 [n], which of their images these are; None: all.
        device: where the tensors that come out are.
    """

    dtype, ndim = torch.uint8, 4

    def __init__(
        self, parts: Sequence[Part], rows: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._parts, self.device = tuple(parts), torch.device(device)
        self._ends = np.cumsum([len(part.pixels) for part in parts])
        self._rows = torch.arange(int(self._ends[-1])) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self._parts[0].pixels.shape[1:]))

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """uint8 […, H, W, 3] of an index of any dimensions, or a bool [n]; IndexError where there is no such image."""
        wanted = self._rows[index.cpu() if isinstance(index, Tensor) else index]
        rows = wanted.flatten().numpy()
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for part, end in zip(self._parts, self._ends, strict=True):
            places = rows - (end - len(part.pixels))
            here = (places >= 0) & (places < len(part.pixels))
            part.announce(places[here])
            if here.all():
                # "clip" writes straight into ``out``; nothing is out of range.
                np.take(part.pixels, places, axis=0, out=found, mode="clip")
            elif here.any():
                found[here] = part.pixels[places[here]]
            if part.mapping is not None:
                # The pages stay in the system's cache, but are no longer this process's.
                part.mapping.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(found).view(*wanted.shape, *self.shape[1:]).to(self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        """uint8 [up to ``size``, H, W, 3] after each other, each read when its turn comes."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def only(self, chosen: Tensor) -> StoredImages:
        """Those of an index int64 [m], or a bool [n], in this order."""
        return StoredImages(self._parts, self._rows[chosen.cpu()], self.device)

    def to(self, device: torch.device | str) -> StoredImages:
        """The same, whose tensors come out on ``device``."""
        return StoredImages(self._parts, self._rows, device)


# What a data set or a task holds.
Images = Tensor | StoredImages
