"""pack and unpack: a whole model with its AdamW state (parameters, both moments, normalisation statistics).

Peers: ``index_select`` once or twice a tensor (``clone`` where nothing is cut), which is what one writes; back:
``index_copy_``, or an assignment where both ends are cut. The limit is the speed of ``copy_`` over the packed bytes,
into memory that is there already; fresh memory comes from the system page by page, for the peers too. Promised is that
nothing takes longer than with the peer; tiny models and small single tensors miss it, by checks and allocations.
On a GPU a model is one launch; torch.compile is a peer for single weights only: hundreds of index_selects take it
longer than all benchmarks may.
"""

from __future__ import annotations

import torch
from harness import Bench
from models import Cut, cut_model, small_model
from torch import Tensor

from mvp_ext.ops import pack, unpack

SELECT, ASSIGN = "index_select per tensor", "index_copy_ per tensor"


def select(cut: Cut) -> list[Tensor]:
    packed = []
    for tensor, rows, cols in zip(cut.tensors, cut.rows, cut.cols, strict=True):
        part = tensor if rows is None else tensor.index_select(0, rows)
        part = part if cols is None else part.index_select(1, cols)
        packed.append(part.clone() if part is tensor else part)
    return packed


def assign(cut: Cut, packed: list[Tensor]) -> None:
    for part, out, rows, cols in zip(packed, cut.tensors, cut.rows, cut.cols, strict=True):
        if rows is not None and cols is not None:
            out[rows[:, None], cols] = part
        elif rows is not None:
            out.index_copy_(0, rows, part)
        elif cols is not None:
            out.index_copy_(1, cols, part)
        else:
            out.copy_(part)


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def add_case(
    bench: Bench, name: str, cut: Cut, *, floor: float | None = 1.0, limit_floor: float | None = None
) -> None:
    def ours() -> list[Tensor]:
        return pack(cut.tensors, cut.rows, cut.cols)

    bench.case(
        name,
        ours,
        {
            SELECT: lambda: select(cut),
            "torch.compile": bench.compiled(select, cut) if len(cut.tensors) == 1 else None,
            "ours, CUDA graph": bench.graphed(ours),
        },
        floors={} if floor is None else {SELECT: floor},
        check=lambda: assert_equal(ours(), select(cut)),
        moved=2 * cut.packed_bytes,
        limit_floor=limit_floor,
    )


def add_way_back(bench: Bench, name: str, cut: Cut, *, floor: float | None = 1.0) -> None:
    packed = [torch.ones_like(t) for t in select(cut)]

    def ours() -> None:
        unpack(packed, cut.tensors, cut.rows, cut.cols)

    def check() -> None:
        ours()
        got = [t.clone() for t in cut.tensors]
        assign(cut, packed)
        assert_equal(got, cut.tensors)

    bench.case(
        f"unpack: {name}",
        ours,
        {ASSIGN: lambda: assign(cut, packed)},
        floors={} if floor is None else {ASSIGN: floor},
        check=check,
        moved=2 * cut.packed_bytes,
    )


def make_cut(bench: Bench, model: str, scope: str, keep: float, *, only_cut: bool = False) -> Cut:
    """With AdamW's two states, or only what is cut."""
    model = small_model(model) if bench.dry else model
    cut = cut_model(model, scope, keep, optimizer_states=0 if only_cut else 2, only_cut=only_cut)
    return cut.to(bench.device)


def main() -> None:
    bench = Bench("pack")
    (gpu_cases if bench.gpu else cpu_cases)(bench)
    bench.finish()


def cpu_cases(bench: Bench) -> None:
    models = [
        ("resnet18", "inner", 0.5),
        ("resnet18", "inner", 0.25),
        ("deit_small_patch16_224", "heads+mlp", 0.5),
        ("deit_small_patch16_224", "heads", 0.5),
    ]
    for model, scope, keep in models:
        name = f"{model} {scope} keep {keep}"
        if bench.wants(f"{name}, with AdamW state", f"unpack: {name}, with AdamW state"):
            full = make_cut(bench, model, scope, keep)
            add_case(bench, f"{name}, with AdamW state", full)
            add_way_back(bench, f"{name}, with AdamW state", full)
        if bench.wants(f"{name}, only what is cut"):
            add_case(bench, f"{name}, only what is cut", make_cut(bench, model, scope, keep, only_cut=True))
    add_case(bench, "test_resnet inner keep 0.5 (tiny)", cut_model("test_resnet", "inner", 0.5))
    add_case(bench, "test_vit heads+mlp keep 0.5 (tiny)", cut_model("test_vit", "heads+mlp", 0.5))
    n = bench.size(1024)
    weight, index = torch.randn(n, n), torch.arange(0, n, 2)
    shuffled = index[torch.randperm(len(index))]
    add_case(bench, "one weight, rows", Cut([weight], [index], [None]))
    add_case(bench, "one weight, columns", Cut([weight], [None], [index]))
    add_case(bench, "one weight, columns, bf16", Cut([weight.bfloat16()], [None], [index]))
    add_case(bench, "one weight, random order of columns", Cut([weight], [None], [shuffled]))
    add_case(bench, "one bias of 64", Cut([torch.randn(64)], [torch.arange(0, 64, 2)], [None]))


def gpu_cases(bench: Bench) -> None:
    models = [
        ("deit_small_patch16_224", "heads+mlp", True),
        ("deit_small_patch16_224", "heads", True),
        ("resnet18", "inner", False),
        ("resnet50", "inner", False),
    ]
    for model, scope, promised in models:
        name = f"{model} {scope} keep 0.5, with AdamW state"
        if bench.wants(name, f"unpack: {name}"):
            cut = make_cut(bench, model, scope, 0.5)
            floors = (10.0, 0.6) if promised else (None, None)
            add_case(bench, name, cut, floor=floors[0], limit_floor=floors[1])
            add_way_back(bench, name, cut, floor=None)
    n = bench.size(8192)
    weight = torch.randn(n, n, device=bench.device)
    half = torch.arange(0, n, 2, device=bench.device)
    for name, cut in (
        ("one weight, rows", Cut([weight], [half], [None])),
        ("one weight, columns", Cut([weight], [None], [half])),
    ):
        add_case(bench, name, cut, floor=None)
        add_way_back(bench, name, cut, floor=None)


if __name__ == "__main__":
    main()
