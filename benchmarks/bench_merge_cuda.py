"""merge on a GPU: N compact voters into a new sub-network, against the torch expressions of bench_merge.py.

torch.compile is no peer: it would compile a model's tensors times voters, for longer than all benchmarks may take.
"""

from __future__ import annotations

import torch
from bench_merge import FULL_WIDTH, IN_PLACE, find_positions, in_place, make_task, moved_bytes
from cuda_bench import CudaBench, graphed

from mvp_ext.ops import merge, reference


def add_case(bench: CudaBench, model: str, small: str, scope: str, keep: float, voters: int) -> None:
    name = f"{model} {scope} keep {keep}, N = {voters}"
    if not bench.wants(name):
        return
    task = make_task(
        small if bench.dry else model, scope, keep, bench.size(voters), only_cut=True, device=bench.device
    )
    positions, arguments = find_positions(task), task.arguments()

    def ours() -> object:
        return merge(*arguments)

    def check() -> None:
        for a, b in zip(merge(*arguments), in_place(task, positions), strict=True):
            torch.testing.assert_close(a, b)

    bench.case(
        name,
        ours,
        {
            IN_PLACE: lambda: in_place(task, positions),
            FULL_WIDTH: lambda: reference.merge(*arguments),
            "ours, CUDA graph": graphed(bench, ours),
        },
        goals={IN_PLACE: 2.5},
        check=check,
        moved=moved_bytes(task, positions),
        least_share=0.8,
    )


def main() -> None:
    bench = CudaBench("merge")
    for keep in (0.5, 0.1):
        add_case(bench, "resnet50", "test_resnet", "inner", keep, 5)
        add_case(bench, "deit_small_patch16_224", "test_vit", "heads+mlp", keep, 5)
    add_case(bench, "resnet18", "test_resnet", "inner", 0.5, 20)
    bench.finish()


if __name__ == "__main__":
    main()
