"""residual_add + ReLU on the residual streams of resnet18 (224², batch 32 and 1) and deit_small, half the channels.

The peer is what one writes in torch: ``residual.index_add(dim, index, y).relu()``; with a batch norm's affine, that on
``y * scale + shift``.
"""

from __future__ import annotations

import torch
from harness import Bench

from mvp_ext.ops import residual_add

LAST = torch.channels_last


def add_case(
    bench: Bench,
    name: str,
    shape: tuple[int, ...],
    *,
    dim: int = 1,
    form: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
    affine: bool = False,
    floor: float = 1.0,
    limit_floor: float | None = None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    channels = shape[dim]
    index = torch.randperm(channels, generator=generator)[: channels // 2].sort().values
    residual = torch.randn(shape, generator=generator).to(dtype)
    y = residual.index_select(dim, index)
    if len(shape) == 4:
        residual, y = residual.contiguous(memory_format=form), y.contiguous(memory_format=form)
    scale = shift = None
    if affine:
        scale, shift = (
            torch.randn(len(index), generator=generator),
            torch.randn(len(index), generator=generator),
        )

    def ours() -> torch.Tensor:
        return residual_add(residual, y, index, scale=scale, shift=shift, activation="relu", dim=dim)

    view = [-1 if d == dim % len(shape) else 1 for d in range(len(shape))]
    s, t = (scale.view(view), shift.view(view)) if affine else (None, None)

    def eager() -> torch.Tensor:
        term = y * s + t if affine else y
        return residual.index_add(dim, index, term).relu()

    def check() -> None:
        torch.testing.assert_close(ours(), eager())

    peer = "y * scale + shift, index_add, relu" if affine else "index_add, relu"
    moved = (2 * residual.numel() + y.numel()) * residual.element_size()
    bench.case(
        name, ours, {peer: eager}, floors={peer: floor}, check=check, moved=moved, limit="copy", limit_floor=limit_floor
    )  # fmt: skip


def main() -> None:
    bench = Bench("residual_add")
    for batch in (32, 1):
        for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
            shape = (batch, channels, side, side)
            limit = 0.75 if batch == 32 else None
            add_case(bench, f"NCHW {shape}", shape, floor=1.4 if batch == 32 else 1.0, limit_floor=limit)
            add_case(
                bench, f"channels_last {shape}", shape, form=LAST, floor=4 if batch == 32 else 1.0, limit_floor=limit
            )  # fmt: skip
    add_case(bench, "deit_small (32, 197, 384)", (32, 197, 384), dim=-1)
    add_case(bench, "deit_small (1, 197, 384)", (1, 197, 384), dim=-1)
    add_case(bench, "NCHW (32, 128, 28, 28), affine", (32, 128, 28, 28), affine=True)
    add_case(bench, "channels_last (32, 128, 28, 28), affine", (32, 128, 28, 28), form=LAST, affine=True)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        add_case(bench, f"NCHW (32, 128, 28, 28), {name}", (32, 128, 28, 28), dtype=dtype)
        add_case(bench, f"channels_last (32, 128, 28, 28), {name}", (32, 128, 28, 28), form=LAST, dtype=dtype)
    add_case(bench, "small: NCHW (1, 8, 4, 4)", (1, 8, 4, 4))
    add_case(bench, "small: channels_last (1, 8, 4, 4)", (1, 8, 4, 4), form=LAST)
    add_case(bench, "odd: channels_last (8, 37, 15, 15)", (8, 37, 15, 15), form=LAST)
    bench.finish()


if __name__ == "__main__":
    main()
