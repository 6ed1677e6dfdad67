"""residual_add + ReLU on residual streams, half the channels kept.

On a CPU: resnet18's (224², batch 32 and 1) and deit_small's. On a GPU: resnet50's and deit_small's at batch 256 in
bfloat16. The peer is what one writes in torch: ``residual.index_add(dim, index, y).relu()``; with a batch norm's
affine, that on ``y * scale + shift``.
"""

from __future__ import annotations

import torch
from harness import Bench, check_error
from torch import Tensor

from mvp_ext.ops import residual_add

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def main() -> None:
    bench = Bench("residual_add")
    (gpu_cases if bench.gpu else cpu_cases)(bench)
    bench.finish()


def cpu_cases(bench: Bench) -> None:
    for batch in (32, 1):
        for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
            shape = (batch, channels, side, side)
            for layout, floor in (("NCHW", 1.4), ("channels_last", 4.0)):
                floors = {"floor": floor, "limit_floor": 0.75} if batch == 32 else {}
                add_case(bench, f"{layout} {shape}", shape, layout=layout, **floors)
    add_case(bench, "deit_small (32, 197, 384)", (32, 197, 384), dim=-1)
    add_case(bench, "deit_small (1, 197, 384)", (1, 197, 384), dim=-1)
    shape = (32, 128, 28, 28)
    for layout in LAYOUTS:
        add_case(bench, f"{layout} {shape}, affine", shape, layout=layout, affine=True)
    for dtype in (torch.bfloat16, torch.float16):
        for layout in LAYOUTS:
            name = str(dtype).removeprefix("torch.")
            add_case(bench, f"{layout} {shape}, {name}", shape, layout=layout, dtype=dtype)
    add_case(bench, "small: NCHW (1, 8, 4, 4)", (1, 8, 4, 4))
    add_case(bench, "small: channels_last (1, 8, 4, 4)", (1, 8, 4, 4), layout="channels_last")
    add_case(bench, "odd: channels_last (8, 37, 15, 15)", (8, 37, 15, 15), layout="channels_last")


def gpu_cases(bench: Bench) -> None:
    bf16, promised, none = torch.bfloat16, {"floor": 2.5, "limit_floor": 0.8}, {"floor": None}
    for channels, side in ((256, 56), (512, 28), (1024, 14), (2048, 7)):
        for layout in LAYOUTS:
            shape = (256, channels, side, side)
            add_case(bench, f"{layout} {shape}", shape, layout=layout, dtype=bf16, **promised)
    add_case(bench, "tokens (256, 197, 384)", (256, 197, 384), dim=-1, dtype=bf16, **promised)
    add_case(bench, "NCHW (256, 512, 28, 28), float32", (256, 512, 28, 28), **promised)
    add_case(bench, "batch 1: NCHW (1, 256, 56, 56)", (1, 256, 56, 56), dtype=bf16, **none)
    add_case(
        bench, "batch 1: channels_last (1, 2048, 7, 7)", (1, 2048, 7, 7), layout="channels_last", dtype=bf16, **none
    )  # fmt: skip


def add_case(
    bench: Bench,
    name: str,
    shape: tuple[int, ...],
    *,
    dim: int = 1,
    layout: str = "NCHW",
    dtype: torch.dtype = torch.float32,
    affine: bool = False,
    floor: float | None = 1.0,
    limit_floor: float | None = None,
) -> None:
    if not bench.wants(name):
        return
    shape = tuple(bench.size(n) for n in shape)
    channels = shape[dim]
    index = torch.randperm(channels)[: channels // 2].sort().values.to(bench.device)
    residual = torch.randn(shape, device=bench.device).to(dtype)
    y = residual.index_select(dim, index)
    if len(shape) == 4:
        residual, y = (x.contiguous(memory_format=LAYOUTS[layout]) for x in (residual, y))
    scale, shift = (torch.randn(len(index), device=bench.device) if affine else None for _ in range(2))

    def ours() -> Tensor:
        return residual_add(residual, y, index, scale=scale, shift=shift, activation="relu", dim=dim)

    view = [-1 if d == dim % len(shape) else 1 for d in range(len(shape))]
    s, t = (scale.view(view), shift.view(view)) if affine else (None, None)

    def eager(residual: Tensor, y: Tensor) -> Tensor:
        return residual.index_add(dim, index, y * s + t if affine else y).relu()

    def check() -> None:
        check_error(ours(), eager(residual, y), eager(residual.double(), y.double()), slack=1e-6)

    peer = "y * scale + shift, index_add, relu" if affine else "index_add, relu"
    bench.case(
        name,
        ours,
        {
            peer: lambda: eager(residual, y),
            "torch.compile": bench.compiled(eager, residual, y),
            "ours, CUDA graph": bench.graphed(ours),
        },
        floors={} if floor is None else {peer: floor},
        check=check,
        moved=(2 * residual.numel() + y.numel()) * residual.element_size(),
        limit_floor=limit_floor,
    )


if __name__ == "__main__":
    main()
