"""residual_add + ReLU on a GPU: residual streams of resnet50 and deit_small in bfloat16, half the channels kept."""

from __future__ import annotations

import torch
from cuda_bench import CudaBench, compiled, graphed

from mvp_ext.ops import residual_add

LAST = torch.channels_last


def add_case(
    bench: CudaBench,
    name: str,
    shape: tuple[int, ...],
    *,
    dim: int = 1,
    form: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.bfloat16,
    goals: bool = True,
) -> None:
    if not bench.wants(name):
        return
    shape = tuple(bench.size(n) for n in shape)
    channels = shape[dim]
    index = torch.randperm(channels)[: channels // 2].sort().values.to(bench.device)
    residual = torch.randn(shape, device=bench.device, dtype=dtype)
    y = residual.index_select(dim, index)
    if len(shape) == 4:
        residual, y = residual.contiguous(memory_format=form), y.contiguous(memory_format=form)

    def ours() -> torch.Tensor:
        return residual_add(residual, y, index, activation="relu", dim=dim)

    def eager(residual: torch.Tensor = residual, y: torch.Tensor = y) -> torch.Tensor:
        return residual.index_add(dim, index, y).relu()

    def check() -> None:
        exact = eager(residual.double(), y.double())
        assert (ours() - exact).abs().max() <= 2 * (eager() - exact).abs().max() + 1e-6

    by_compile = compiled(bench, eager)
    bench.case(
        name,
        ours,
        {
            "index_add, relu": eager,
            "torch.compile": lambda: by_compile(residual, y),
            "ours, CUDA graph": graphed(bench, ours),
        },
        goals={"index_add, relu": 2.5} if goals else {},
        check=check,
        moved=(2 * residual.numel() + y.numel()) * residual.element_size(),
        least_share=0.8 if goals else None,
    )


def main() -> None:
    bench = CudaBench("residual_add")
    for channels, side in ((256, 56), (512, 28), (1024, 14), (2048, 7)):
        shape = (256, channels, side, side)
        add_case(bench, f"NCHW {shape}", shape)
        add_case(bench, f"channels_last {shape}", shape, form=LAST)
    add_case(bench, "tokens (256, 197, 384)", (256, 197, 384), dim=-1)
    add_case(bench, "NCHW (256, 512, 28, 28), float32", (256, 512, 28, 28), dtype=torch.float32)
    add_case(bench, "batch 1: NCHW (1, 256, 56, 56)", (1, 256, 56, 56), goals=False)
    add_case(bench, "batch 1: channels_last (1, 2048, 7, 7)", (1, 2048, 7, 7), form=LAST, goals=False)
    bench.finish()


if __name__ == "__main__":
    main()
