"""merge: N voters' compact models into the weights of a new sub-network.

Peers, both what one might write in torch:
- "in place": sums and totals at the wanted size; each voter adds its common rows and columns (their positions found
  beforehand, not timed) by ``index_add_``, or by an indexed assignment where both ends are cut.
- "full width": each voter is scattered to full width beside a mask; the mean is cut at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from harness import Bench
from models import Cut, cut_model
from torch import Tensor

from mvp_ext.ops import merge, pack, reference

IN_PLACE, FULL_WIDTH = "torch, in place", "torch, full width"
Positions = tuple[Tensor, Tensor] | None  # (in the result, in the voter); None: all


@dataclass
class Task:
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
    model: str, scope: str, keep: float, voters: int, *, only_cut: bool, device: str | torch.device = "cpu"
) -> Task:
    cuts = [cut_model(model, scope, keep, only_cut=only_cut, seed=seed) for seed in range(voters + 1)]
    weights = torch.rand(voters, generator=torch.Generator().manual_seed(0)) + 0.5
    cuts, weights = [c.to(torch.device(device)) for c in cuts], weights.to(device)
    return Task(
        cuts[0], cuts[1:], [pack(c.tensors, c.rows, c.cols) for c in cuts[1:]], weights, weights.tolist()
    )


def common(wanted: Tensor | None, kept: Tensor | None) -> Positions:
    if wanted is None and kept is None:
        return None
    assert wanted is not None
    assert kept is not None
    inside = torch.isin(wanted, kept)
    return inside.nonzero()[:, 0], torch.searchsorted(kept, wanted[inside])


def find_positions(task: Task) -> list[list[tuple[Positions, Positions]]]:
    return [
        [
            (common(task.target.rows[p], v.rows[p]), common(task.target.cols[p], v.cols[p]))
            for p in range(len(v.tensors))
        ]
        for v in task.voters
    ]


def moved_bytes(task: Task, positions: list[list[tuple[Positions, Positions]]]) -> int:
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


def in_place(task: Task, positions: list[list[tuple[Positions, Positions]]]) -> list[Tensor]:
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


def add_case(bench: Bench, name: str, task: Task, *, floor: float) -> None:
    positions = find_positions(task)
    arguments = task.arguments()

    def check() -> None:
        ours, expected = merge(*arguments), reference.merge(*arguments)
        for other in (expected, in_place(task, positions)):
            for a, b in zip(ours, other, strict=True):
                torch.testing.assert_close(a, b)

    bench.case(
        name,
        lambda: merge(*arguments),
        {IN_PLACE: lambda: in_place(task, positions), FULL_WIDTH: lambda: reference.merge(*arguments)},
        floors={IN_PLACE: floor, FULL_WIDTH: floor},
        check=check,
        moved=moved_bytes(task, positions),
        limit="copy",
    )


def main() -> None:
    bench = Bench("merge")
    for model, scope in (("resnet18", "inner"), ("resnet18", "all"), ("deit_small_patch16_224", "heads+mlp")):
        for keep in (0.5, 0.1):
            task = make_task(model, scope, keep, 5, only_cut=True)
            add_case(bench, f"{model} {scope} keep {keep}, N = 5, what is cut", task, floor=3)
    add_case(
        bench,
        "resnet18 inner keep 0.5, N = 5, all",
        make_task("resnet18", "inner", 0.5, 5, only_cut=False),
        floor=1,
    )
    add_case(
        bench,
        "resnet18 inner keep 0.5, N = 20",
        make_task("resnet18", "inner", 0.5, 20, only_cut=True),
        floor=3,
    )
    add_case(
        bench,
        "resnet18 inner keep 0.5, N = 1",
        make_task("resnet18", "inner", 0.5, 1, only_cut=True),
        floor=1,
    )
    add_case(
        bench,
        "test_resnet inner (tiny), N = 5",
        make_task("test_resnet", "inner", 0.5, 5, only_cut=True),
        floor=1,
    )
    bench.finish()


if __name__ == "__main__":
    main()
