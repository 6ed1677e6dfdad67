"""Which images a training step sees, and how they are augmented.

Images stay uint8 and at their stored size until a batch is made (``model.preprocessing``): cropping and flipping bytes
is cheap, and the float copy of one batch is all the float memory there is. Random numbers are always drawn on the CPU,
so a seed means the same batches whichever device holds the images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    pad: int | None = None,
    flip: bool = True,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Shift each image at random (a random crop after reflection padding) and mirror about half of them.

    Args:
        images: uint8 (any dtype works) [B, H, W, C].
        generator: a CPU generator; it is advanced by the same amount whatever ``pad`` and ``flip`` are.
        pad: largest shift in pixels, 0 ≤ pad < min(H, W). Default: an eighth of the height (4 of 32).
        flip: whether to mirror left and right with probability ½.
        part: (i, n): ``images`` are the i-th of n equal parts of a batch, and come out as they would with the others.

    Returns:
        [B, H, W, C], same dtype and device, a new tensor.

    Raises:
        ValueError: ``pad`` is out of its range.
    """
    count, height, width, channels = images.shape
    pad = height // 8 if pad is None else pad
    if not 0 <= pad < min(height, width):
        raise ValueError(f"augment: pad must be in [0, {min(height, width)}) for {height}×{width}, got {pad}")
    number, parts = part
    draws = torch.rand(3, parts * count, generator=generator)[:, number * count : (number + 1) * count]
    shift = (draws[:2] * (2 * pad + 1)).long() - pad
    rows = _reflect(torch.arange(height) + shift[0, :, None], height)  # [B, H]
    columns = torch.arange(width).expand(count, width)
    if flip:
        columns = torch.where(draws[2, :, None] < 0.5, columns.flip(1), columns)
    columns = _reflect(columns + shift[1, :, None], width)  # [B, W]
    # One gather by flat pixel number: several times faster on the CPU than three broadcast index tensors.
    pixels = (torch.arange(count)[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    flat = images.reshape(count * height * width, channels)
    return flat.index_select(0, pixels.flatten().to(images.device)).view(images.shape)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices of [-size + 1, 2·size − 2] into [0, size), the edge pixel not repeated."""
    last = size - 1
    return last - (last - index.abs()).abs()


def shuffled_indices(count: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` tensors of int64 [batch_size] indices: shuffled epochs end to end, every batch full."""
    if count < 1 or batch_size < 1:
        raise ValueError(
            f"shuffled_indices: count and batch_size must be at least 1, got {count}, {batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]
