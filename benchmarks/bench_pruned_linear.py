"""pruned_linear from full weights: deit_small's layers on a CPU, keep 0.5; ViT-S, B and L's in bfloat16 on a GPU.

Peers: index_select + F.linear on each call, which is what a mask that changes would cost, and F.linear on a weight cut
once, which is the ceiling of a library's user. Rows of x: one token to a batch of 32 images and more.

On a GPU also the dense layer, alone and with a mask, and in a few cases, since each is compiled anew, index_select +
F.linear by torch.compile. "kernel" is our kernel, "library" cut + library GEMM; the op takes what its rule says, and
the rule is checked here: it should be no slower than either. The peak is the library's product of two large matrices.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from harness import Bench, check_error
from timers import Run
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops import pruned_linear
from mvp_ext.ops.pruned_linear_plan import Plan, has_hopper, linear_by

EACH_CALL, ONCE = "index_select + linear", "cut once + linear"
HEAD = 64
DEIT_SMALL = (384, 6)
CPU_ROWS = {
    torch.float32: (1, 4, 16, 64, 197, 6304),
    torch.bfloat16: (1, 16, 64, 197, 6304),
    torch.float16: (1, 16, 197),
}
WIDTHS = {"ViT-S": DEIT_SMALL, "ViT-B": (768, 12), "ViT-L": (1024, 16)}
GPU_ROWS = (1, 16, 197, 1576, 6304, 16384)
# Half the units first, at every width and number of rows: what a budget cuts off is the rest.
KEEPS = (0.5, 0.25, 0.75)
COMPILED = ("ViT-B", 6304, 0.5)


class Layer(NamedTuple):
    """A layer of a ViT and what its kept rows and columns are chosen of: blocks of so many (None: all are kept)."""

    name: str
    inputs: int
    outputs: int
    out_blocks: int | None = None
    in_blocks: int | None = None
    block: int = 1


def layers(width: int, heads: int) -> list[Layer]:
    return [
        Layer("fc1", width, 4 * width, out_blocks=4 * width),
        Layer("fc2, input-major", 4 * width, width, in_blocks=4 * width),
        Layer("qkv", width, 3 * width, out_blocks=3 * heads, block=HEAD),
        Layer("proj", width, width, in_blocks=heads, block=HEAD),
    ]


def other_layouts(width: int, heads: int) -> list[Layer]:
    return [
        Layer("fc2, row-major", 4 * width, width, in_blocks=4 * width),
        Layer("proj, input-major", width, width, in_blocks=heads, block=HEAD),
    ]


def main() -> None:
    bench = Bench("pruned_linear")
    bench.measure_peak()
    (gpu_cases if bench.gpu else cpu_cases)(bench)
    bench.finish()


def cpu_cases(bench: Bench) -> None:
    for dtype, many_rows in CPU_ROWS.items():
        short = str(dtype).removeprefix("torch.")
        for layer in layers(*DEIT_SMALL) + other_layouts(*DEIT_SMALL):
            for rows in many_rows:
                floors = {}
                if dtype is torch.float32:
                    floors[EACH_CALL] = 1.3 if rows in (1, 16) else 1.0
                    if rows >= 16:
                        floors[ONCE] = 0.85
                add_case(bench, f"{layer.name}, M = {rows}, {short}", layer, rows, 0.5, dtype, floors)


def gpu_cases(bench: Bench) -> None:
    for keep in KEEPS:
        for model, (width, heads) in WIDTHS.items():
            # A dry run has few rows anyway.
            for rows in GPU_ROWS[:2] if bench.dry else GPU_ROWS:
                floors = {EACH_CALL: 1.0, "library": 0.97, "kernel": 0.97}
                if rows >= 6304:
                    floors[ONCE] = 0.9
                    if keep == 0.5:
                        floors["dense"] = 1.8
                compiled = bench.dry or (model, rows, keep) == COMPILED
                for layer in layers(width, heads):
                    name = f"{model} {layer.name}, M = {rows}, keep {keep}"
                    add_case(bench, name, layer, rows, keep, torch.bfloat16, floors, compiled=compiled)


def add_case(
    bench: Bench,
    name: str,
    layer: Layer,
    rows: int,
    keep: float,
    dtype: torch.dtype,
    floors: dict[str, float],
    *,
    compiled: bool = False,
) -> None:
    if not bench.wants(name):
        return
    if bench.dry:
        rows = min(rows, 3)
    device = bench.device
    weight = torch.randn(layer.outputs, layer.inputs, device=device).to(dtype) / layer.inputs**0.5
    if "input-major" in layer.name:
        weight = weight.t().contiguous().t()
    bias = torch.randn(layer.outputs, device=device).to(dtype)
    out_index, out_places = draw(layer.out_blocks, keep, layer.block, device)
    in_index, in_places = draw(layer.in_blocks, keep, layer.block, device)
    out_block, in_block = (1 if index is None else layer.block for index in (out_index, in_index))

    def cut() -> tuple[Tensor, Tensor]:
        small = weight if out_places is None else weight.index_select(0, out_places)
        small = small if in_places is None else small.index_select(1, in_places)
        return small, bias if out_places is None else bias.index_select(0, out_places)

    small, small_bias = cut()
    x = torch.randn(rows, small.shape[1], device=device).to(dtype)

    def ours() -> Tensor:
        return pruned_linear(x, weight, bias, out_index, in_index, out_block=out_block, in_block=in_block)

    def each_call(x: Tensor = x) -> Tensor:
        return F.linear(x, *cut())

    def check() -> None:
        exact = F.linear(x.double(), small.double(), small_bias.double())
        check_error(ours(), F.linear(x, small, small_bias), exact, slack=1e-3 if bench.gpu else 1e-5)

    peers: dict[str, Run | None] = {EACH_CALL: each_call, ONCE: lambda: F.linear(x, small, small_bias)}
    if bench.gpu:

        def by(way: Plan | Literal["kernel", "library"]) -> Tensor:
            with linear_by(way):
                return ours()

        full_x = torch.randn(rows, layer.inputs, device=device).to(dtype)
        kept = torch.zeros(layer.outputs, 1, device=device, dtype=dtype)
        kept[slice(None) if out_places is None else out_places] = 1
        peers |= {
            "kernel": lambda: by("kernel"),
            "wgmma kernel": (lambda: by(Plan(3, 1))) if has_hopper(device) else None,
            "library": lambda: by("library"),
            "dense": lambda: F.linear(full_x, weight, bias),
            "masked dense": lambda: F.linear(full_x, weight * kept, bias),
            f"{EACH_CALL}, torch.compile": bench.compiled(each_call, x) if compiled else None,
            "ours, CUDA graph": bench.graphed(ours),
        }
    flops = 2 * rows * small.numel() if bench.gpu else None
    bench.case(name, ours, peers, floors=floors, check=check, flops=flops)


def draw(
    blocks: int | None, keep: float, block: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of the kept blocks, and the positions that they cover."""
    if blocks is None:
        return None, None
    index = torch.randperm(blocks)[: round(blocks * keep)].sort().values.to(device, torch.int32)
    return index, (index[:, None] * block + torch.arange(block, device=device)).flatten()


if __name__ == "__main__":
    main()
