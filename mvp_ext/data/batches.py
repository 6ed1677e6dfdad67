"""From uint8 images to what a model takes: augmentation, resizing, normalisation, seeded batches.

Images stay uint8 and at their stored size until a batch is made: cropping and flipping bytes is cheap, and
the float copy of one batch is all the float memory there is. Random numbers are always drawn on the CPU, so a
seed means the same batches whichever device holds the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def augment(
    images: Tensor, generator: torch.Generator, *, pad: int | None = None, flip: bool = True
) -> Tensor:
    """Shift each image at random (a random crop after reflection padding) and mirror about half of them.

    Args:
        images: uint8 (any dtype works) [B, H, W, C].
        generator: a CPU generator; it is advanced by the same amount whatever ``pad`` and ``flip`` are.
        pad: largest shift in pixels, 0 ≤ pad < min(H, W). Default: an eighth of the height (4 of 32).
        flip: whether to mirror left and right with probability ½.

    Returns:
        [B, H, W, C], same dtype and device, a new tensor.

    Raises:
        ValueError: ``pad`` is out of its range.
    """
    count, height, width, channels = images.shape
    pad = height // 8 if pad is None else pad
    if not 0 <= pad < min(height, width):
        raise ValueError(f"augment: pad must be in [0, {min(height, width)}) for {height}×{width}, got {pad}")
    draws = torch.rand(3, count, generator=generator)
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


def resize(images: Tensor, size: int) -> Tensor:
    """Resize to squares: bilinear, with antialiasing where it shrinks, rounded to bytes as image libraries do.

    Args:
        images: uint8 [B, H, W, C].
        size: side of the result in pixels.

    Returns:
        uint8 [B, size, size, C], contiguous; ``images`` itself where the size is right already.
    """
    if tuple(images.shape[1:3]) == (size, size):
        return images.contiguous()
    # A view of NHWC memory: to torch, this is channels_last.
    pixels = images.permute(0, 3, 1, 2)
    shrinks = size < min(pixels.shape[2:])
    # On the CPU torch interpolates bytes by integer arithmetic, ten times as fast as floats; elsewhere it cannot.
    source = pixels if images.device.type == "cpu" else pixels.float()
    resized = functional.interpolate(source, (size, size), mode="bilinear", antialias=shrinks)
    if resized.is_floating_point():
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized.permute(0, 2, 3, 1).contiguous()


def to_batch(
    images: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels_last: bool = True,
) -> Tensor:
    """uint8 images → normalised float batch: (resize(images) / 255 − mean) / std.

    Args:
        images: uint8 [B, H, W, 3], on any device.
        size: side of the square the model takes.
        mean: per channel, of images in 0..1.
        std: likewise.
        channels_last: memory format of the result (the layout that convolutions are fastest in).

    Returns:
        float32 [B, 3, size, size] on the images' device.

    Raises:
        ValueError: ``images`` are not uint8 [B, H, W, 3], ``size`` < 1, or ``mean`` and ``std`` are not three numbers
            (``std`` above 0).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"to_batch: images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"to_batch: expected size ≥ 1, 3 means, 3 std > 0, got {size}, {mean}, {std}")
    factors = [[1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]
    # Rows of pixels, not pixels, are broadcast over: an inner dimension of 3 would be several times slower.
    scale, shift = torch.tensor(factors, device=images.device).repeat(1, size)
    rows = resize(images, size).view(-1, size * 3).float().mul_(scale).add_(shift)
    batch = rows.view(-1, size, size, 3).permute(0, 3, 1, 2)
    return batch if channels_last else batch.contiguous()


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
