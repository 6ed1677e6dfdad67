"""pack on a GPU: all parameters, buffers and AdamW states of a model in one launch, against index_select per tensor.

torch.compile is a peer for single weights only: hundreds of index_selects take it longer than all benchmarks may.
"""

from __future__ import annotations

import torch
from bench_pack import assert_equal, select
from cuda_bench import CudaBench, compiled, graphed
from models import Cut, cut_model

from mvp_ext.ops import pack, unpack


def add_case(bench: CudaBench, name: str, cut: Cut, *, goals: bool = True) -> None:
    def ours() -> object:
        return pack(cut.tensors, cut.rows, cut.cols)

    by_compile = compiled(bench, select) if len(cut.tensors) == 1 else None
    bench.case(
        name,
        ours,
        {
            "index_select per tensor": lambda: select(cut),
            "torch.compile": None if by_compile is None else lambda: by_compile(cut),
            "ours, CUDA graph": graphed(bench, ours),
        },
        goals={"index_select per tensor": 10.0} if goals else {},
        check=lambda: assert_equal(pack(cut.tensors, cut.rows, cut.cols), select(cut)),
        moved=2 * cut.packed_bytes,
        least_share=0.6 if goals else None,
    )
    parts = select(cut)
    bench.case(
        f"unpack: {name}",
        lambda: unpack(parts, cut.tensors, cut.rows, cut.cols),
        {},
        moved=2 * cut.packed_bytes,
    )


def main() -> None:
    bench = CudaBench("pack")
    models = [
        ("deit_small_patch16_224", "test_vit", "heads+mlp", True),
        ("deit_small_patch16_224", "test_vit", "heads", True),
        ("resnet18", "test_resnet", "inner", False),
        ("resnet50", "test_resnet", "inner", False),
    ]
    for model, small, scope, goals in models:
        name = f"{model} {scope} keep 0.5, with AdamW state"
        if bench.wants(name):
            cut = cut_model(small if bench.dry else model, scope, 0.5, optimizer_states=2)
            add_case(bench, name, cut.to(bench.device), goals=goals)
    n = bench.size(8192)
    weight = torch.randn(n, n, device=bench.device)
    half = torch.arange(0, n, 2, device=bench.device)
    add_case(bench, "one weight, rows", Cut([weight], [half], [None]), goals=False)
    add_case(bench, "one weight, columns", Cut([weight], [None], [half]), goals=False)
    bench.finish()


if __name__ == "__main__":
    main()
