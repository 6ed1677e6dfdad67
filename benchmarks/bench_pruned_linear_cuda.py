"""pruned_linear in bfloat16 on a GPU, on the layers of ViT-S, B and L.

Peers: the dense layer; the dense layer with a mask; index_select + F.linear on each call; F.linear on a weight cut once
(the ceiling: the library on the small problem); in a few cases, since each is compiled anew, index_select + F.linear by
torch.compile. "kernel" is our kernel, "library" cut + library GEMM; the op takes what its rule says, and the rule is
checked here: it should be no slower than either. The peak is the library's product of two large matrices.
"""

from __future__ import annotations

from typing import Literal

import torch
from cuda_bench import CudaBench, compiled, graphed
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops import pruned_linear
from mvp_ext.ops.cuda_linear import Plan, has_hopper, linear_by

WIDTHS = {"ViT-S": (384, 6), "ViT-B": (768, 12), "ViT-L": (1024, 16)}
ROWS = (1, 16, 197, 1576, 6304, 16384)
KEEPS = (0.25, 0.5, 0.75)
HEAD = 64
COMPILED = ("ViT-B", 6304, 0.5)


def main() -> None:
    bench = CudaBench("pruned_linear")
    bench.measure_peak()
    # Half the units first, at every width and number of rows: what a budget cuts off is the rest.
    for keep in sorted(KEEPS, key=lambda k: abs(k - 0.5)):
        for model, (width, heads) in WIDTHS.items():
            for rows in ROWS[:2] if bench.dry else ROWS:  # a dry run has few rows anyway
                add_case(bench, model, "fc1", rows, keep, width, 4 * width, out_units=4 * width)
                add_case(bench, model, "fc2, input-major", rows, keep, 4 * width, width, in_units=4 * width)
                add_case(bench, model, "qkv", rows, keep, width, 3 * width, out_units=3 * heads, block=HEAD)
                add_case(bench, model, "proj", rows, keep, width, width, in_units=heads, block=HEAD)
    bench.finish()


def add_case(
    bench: CudaBench,
    model: str,
    layer: str,
    rows: int,
    keep: float,
    inputs: int,
    outputs: int,
    *,
    out_units: int | None = None,
    in_units: int | None = None,
    block: int = 1,
) -> None:
    name = f"{model} {layer}, M = {rows}, keep {keep}"
    if not bench.wants(name):
        return
    if bench.dry:
        rows = min(rows, 3)
    dtype, device = torch.bfloat16, bench.device
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
    if "input-major" in layer:
        weight = weight.t().contiguous().t()
    bias = torch.randn(outputs, device=device, dtype=dtype)
    out_index, out_places = draw(out_units, keep, block, device)
    in_index, in_places = draw(in_units, keep, block, device)
    out_block, in_block = (block if index is not None else 1 for index in (out_index, in_index))

    def cut() -> tuple[Tensor, Tensor]:
        small = weight if out_places is None else weight.index_select(0, out_places)
        small = small if in_places is None else small.index_select(1, in_places)
        return small, bias if out_places is None else bias.index_select(0, out_places)

    small, small_bias = cut()
    x = torch.randn(rows, small.shape[1], device=device, dtype=dtype)
    full_x = torch.randn(rows, inputs, device=device, dtype=dtype)
    kept = torch.zeros(outputs, 1, device=device, dtype=dtype)
    kept[slice(None) if out_places is None else out_places] = 1

    def ours() -> Tensor:
        return pruned_linear(x, weight, bias, out_index, in_index, out_block=out_block, in_block=in_block)

    def by(way: Plan | Literal["kernel", "library"]) -> Tensor:
        with linear_by(way):
            return ours()

    def check() -> None:
        exact = F.linear(x.double(), small.double(), small_bias.double())
        library = (F.linear(x, small, small_bias).double() - exact).abs().max()
        assert (ours().double() - exact).abs().max() <= 2 * library + 1e-3

    by_compile = None
    if bench.dry or (model, rows, keep) == COMPILED:
        by_compile = compiled(bench, lambda x: F.linear(x, *cut()))

    goals = {"dense": 1.8} if keep == 0.5 and rows >= 6304 else {}
    if rows >= 6304:
        goals["cut once + linear"] = 0.9
    bench.case(
        name,
        ours,
        {
            "kernel": lambda: by("kernel"),
            "wgmma kernel": (lambda: by(Plan(3, 1))) if has_hopper(device) else None,
            "library": lambda: by("library"),
            "dense": lambda: F.linear(full_x, weight, bias),
            "masked dense": lambda: F.linear(full_x, weight * kept, bias),
            "index_select + linear": lambda: F.linear(x, *cut()),
            "index_select + linear, torch.compile": None if by_compile is None else lambda: by_compile(x),
            "cut once + linear": lambda: F.linear(x, small, small_bias),
            "ours, CUDA graph": graphed(bench, ours),
        },
        goals={**goals, "index_select + linear": 1.0, "library": 0.97, "kernel": 0.97},
        check=check,
        flops=2 * rows * small.numel(),
    )


def draw(
    units: int | None, keep: float, block: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of the kept blocks, and the positions that they cover."""
    if units is None:
        return None, None
    index = torch.randperm(units)[: round(units * keep)].sort().values.to(device)
    return index, (index[:, None] * block + torch.arange(block, device=device)).flatten()


if __name__ == "__main__":
    main()
