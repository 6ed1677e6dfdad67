"""merge: N voters' compact models into the weights of a new sub-network.

Peers, both what one might write in torch:
- "in place": sums and totals at the wanted size; each voter adds its common rows and columns (their positions found
  beforehand, not timed) by ``index_add_``, or by an indexed assignment where both ends are cut.
- "full width": each voter is scattered to full width beside a mask; the mean is cut at the end.

torch.compile is no peer: it would compile a model's tensors times voters, for longer than all benchmarks may take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from harness import Bench
from models import Cut, cut_model, small_model
from torch import Tensor

from mvp_ext.ops import merge, pack, reference

IN_PLACE, FULL_WIDTH = "torch, in place", "torch, full width"
Positions = tuple[Tensor, Tensor] | None  # (in the result, in the voter); None: all


@dataclass
class MergeCase:
    target: Cut
    voters: list[Cut]
    compact: list[list[Tensor]]
    weights: Tensor
    weight_values: list[float]

    def arguments(self) -> tuple:
        voter_rows, voter_cols = [v.rows for v in self.voters], [v.cols for v in self.voters]
        target = self.target
        return target.tensors, self.compact, voter_rows, voter_cols, self.weights, target.rows, target.cols


def make_task(
    model: str, scope: str, keep: float, voters: int, *, only_cut: bool, device: torch.device
) -> MergeCase:
    cuts = [cut_model(model, scope, keep, only_cut=only_cut, seed=seed) for seed in range(voters + 1)]
    weights = torch.rand(voters, generator=torch.Generator().manual_seed(0)) + 0.5
    cuts, weights = [c.to(device) for c in cuts], weights.to(device)
    return MergeCase(
        cuts[0], cuts[1:], [pack(c.tensors, c.rows, c.cols) for c in cuts[1:]], weights, weights.tolist()
    )


def common(wanted: Tensor | None, kept: Tensor | None) -> Positions:
    if wanted is None and kept is None:
        return None
    assert wanted is not None
    assert kept is not None
    inside = torch.isin(wanted, kept)
    return inside.nonzero()[:, 0], torch.searchsorted(kept, wanted[inside])


def find_positions(task: MergeCase) -> list[list[tuple[Positions, Positions]]]:
    return [
        [
            (common(task.target.rows[p], v.rows[p]), common(task.target.cols[p], v.cols[p]))
            for p in range(len(v.tensors))
        ]
        for v in task.voters
    ]


def moved_bytes(task: MergeCase, positions: list[list[tuple[Positions, Positions]]]) -> int:
    """What merge must read and write: of each voter what it has in common with the result, the base where no voter has
    anything, and the result. The voters' other rows and columns are read by nobody."""
    moved = 0
    for p, base in enumerate(task.target.tensors):
        rows, columns = (
            torch.arange(size, device=base.device) if index is None else index
            for size, index in zip((*base.shape, 1), (task.target.rows[p], task.target.cols[p]), strict=False)
        )
        voters = torch.zeros(len(rows), len(columns), dtype=torch.int32, device=base.device)
        for where in positions:
            in_rows, in_columns = (
                torch.arange(voters.shape[d], device=base.device) if found is None else found[0]
                for d, found in enumerate(where[p])
            )
            voters[in_rows[:, None], in_columns] += 1
        words = 2 * voters.numel() - int(voters.count_nonzero()) + int(voters.sum())
        moved += words * math.prod(base.shape[2:]) * base.element_size()
    return moved


def in_place(task: MergeCase, positions: list[list[tuple[Positions, Positions]]]) -> list[Tensor]:
    merged = []
    for p, base in enumerate(task.target.tensors):
        rows, cols = task.target.rows[p], task.target.cols[p]
        base = base if rows is None else base.index_select(0, rows)
        base = base if cols is None else base.index_select(1, cols)
        total, weighted = base.new_zeros(base.shape[:2]), torch.zeros_like(base)
        for weight, compact, where in zip(task.weight_values, task.compact, positions, strict=True):
            r, c = where[p]
            part = compact[p]
            if r is None and c is None:
                weighted.add_(part, alpha=weight)
                total += weight
            elif c is None:
                weighted.index_add_(0, r[0], part.index_select(0, r[1]), alpha=weight)
                total[r[0]] += weight
            elif r is None:
                weighted.index_add_(1, c[0], part.index_select(1, c[1]), alpha=weight)
                total[:, c[0]] += weight
            else:
                weighted[r[0][:, None], c[0]] += weight * part.index_select(0, r[1]).index_select(1, c[1])
                total[r[0][:, None], c[0]] += weight
        total = total.reshape(*total.shape, *[1] * (base.ndim - total.ndim))
        merged.append(torch.where(total > 0, weighted / total, base))
    return merged


def add_case(
    bench: Bench,
    name: str,
    model: str,
    scope: str,
    keep: float,
    voters: int,
    *,
    floors: dict[str, float],
    limit_floor: float | None = None,
    only_cut: bool = True,
) -> None:
    if not bench.wants(name):
        return
    if bench.dry:
        model = small_model(model)
    task = make_task(model, scope, keep, bench.size(voters), only_cut=only_cut, device=bench.device)
    positions, arguments = find_positions(task), task.arguments()

    def ours() -> list[Tensor]:
        return merge(*arguments)

    def check() -> None:
        for other in (reference.merge(*arguments), in_place(task, positions)):
            for a, b in zip(ours(), other, strict=True):
                torch.testing.assert_close(a, b)

    bench.case(
        name,
        ours,
        {
            IN_PLACE: lambda: in_place(task, positions),
            FULL_WIDTH: lambda: reference.merge(*arguments),
            "ours, CUDA graph": bench.graphed(ours),
        },
        floors=floors,
        check=check,
        moved=moved_bytes(task, positions),
        limit_floor=limit_floor,
    )


def main() -> None:
    bench = Bench("merge")
    (gpu_cases if bench.gpu else cpu_cases)(bench)
    bench.finish()


def cpu_cases(bench: Bench) -> None:
    large, small = (dict.fromkeys((IN_PLACE, FULL_WIDTH), floor) for floor in (3, 1))
    for model, scope in (("resnet18", "inner"), ("resnet18", "all"), ("deit_small_patch16_224", "heads+mlp")):
        for keep in (0.5, 0.1):
            name = f"{model} {scope} keep {keep}, N = 5, what is cut"
            add_case(bench, name, model, scope, keep, 5, floors=large)
    resnet18 = ("resnet18", "inner", 0.5)
    add_case(bench, "resnet18 inner keep 0.5, N = 5, all", *resnet18, 5, floors=small, only_cut=False)
    add_case(bench, "resnet18 inner keep 0.5, N = 20", *resnet18, 20, floors=large)
    add_case(bench, "resnet18 inner keep 0.5, N = 1", *resnet18, 1, floors=small)
    add_case(bench, "test_resnet inner (tiny), N = 5", "test_resnet", "inner", 0.5, 5, floors=small)


def gpu_cases(bench: Bench) -> None:
    models = [
        (model, scope, keep, 5)
        for keep in (0.5, 0.1)
        for model, scope in (("resnet50", "inner"), ("deit_small_patch16_224", "heads+mlp"))
    ]
    for model, scope, keep, voters in [*models, ("resnet18", "inner", 0.5, 20)]:
        name = f"{model} {scope} keep {keep}, N = {voters}"
        add_case(bench, name, model, scope, keep, voters, floors={IN_PLACE: 2.5}, limit_floor=0.8)


if __name__ == "__main__":
    main()
