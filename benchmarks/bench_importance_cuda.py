"""importance on a GPU, kind taylor: activations and gradients of resnet50 and deit_small at batch 256, in bfloat16."""

from __future__ import annotations

import torch
from cuda_bench import CudaBench, compiled, graphed
from torch import Tensor

from mvp_ext.ops import importance, reference

LAST = torch.channels_last


def add_case(
    bench: CudaBench,
    name: str,
    shape: tuple[int, ...],
    *,
    dim: int = 1,
    heads: int | None = None,
    form: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.bfloat16,
    goals: bool = True,
) -> None:
    if not bench.wants(name):
        return
    shape = tuple(bench.size(n) if d != dim else n for d, n in enumerate(shape))
    a, grad = (torch.randn(shape, device=bench.device, dtype=dtype) for _ in range(2))
    if len(shape) == 4:
        a, grad = (x.contiguous(memory_format=form) for x in (a, grad))

    def eager(a: Tensor = a, grad: Tensor = grad) -> Tensor:
        terms = a * grad
        if heads is not None:
            terms = terms.unflatten(dim, (heads, -1))
        return terms.sum([d for d in range(1, terms.ndim) if d != dim]).abs().sum(0)

    def ours() -> Tensor:
        return importance(a, grad, kind="taylor", dim=dim, heads=heads)

    def check() -> None:
        exact = reference.importance(a.double(), grad.double(), kind="taylor", dim=dim, heads=heads)
        torch.testing.assert_close(ours().double(), exact, rtol=1e-4, atol=1e-3)

    by_compile = compiled(bench, eager)
    bench.case(
        name,
        ours,
        {
            "eager": eager,
            "torch.compile": lambda: by_compile(a, grad),
            "ours, CUDA graph": graphed(bench, ours),
        },
        goals={"eager": 3.0, "torch.compile": 1.2} if goals else {},
        check=check,
        moved=2 * a.numel() * a.element_size(),
        least_share=0.85 if goals else None,
    )


def main() -> None:
    bench = CudaBench("importance")
    for channels, side in ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7)):
        shape = (256, channels, side, side)
        add_case(bench, f"NCHW {shape}", shape)
        add_case(bench, f"channels_last {shape}", shape, form=LAST)
    add_case(bench, "deit_small heads (256, 197, 384)", (256, 197, 384), dim=2, heads=6)
    add_case(bench, "deit_small MLP (256, 197, 1536)", (256, 197, 1536), dim=2)
    add_case(bench, "NCHW (256, 128, 28, 28), float32", (256, 128, 28, 28), dtype=torch.float32)
    add_case(bench, "batch 1: NCHW (1, 64, 56, 56)", (1, 64, 56, 56), goals=False)
    add_case(bench, "batch 32: NCHW (32, 512, 7, 7)", (32, 512, 7, 7), goals=False)
    bench.finish()


if __name__ == "__main__":
    main()
