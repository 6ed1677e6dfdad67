"""merge against its reference: which voters count for an element, in every dtype, layout and rank."""

# ruff: noqa: E501  (the tables of errors read best with a case a line)

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import on_gpu, skip_float64_on_gpu
from emulator import emulated
from isa import OLDER, run_on
from torch import Tensor

from mvp_ext.ops import merge, pack, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(0,), (1,), (33,), (70,), (0, 5), (5, 0), (31, 2), (300, 3), (32, 33), (20, 96), (16, 8, 3, 3), (9, 5, 2), (7, 13, 1, 1), (2, 3, 2, 1, 2, 3)]  # fmt: skip
Arguments = tuple[list[Tensor], list[list[Tensor]], list[list[Tensor | None]], list[list[Tensor | None]], Tensor, list[Tensor | None], list[Tensor | None]]  # fmt: skip


def kept(size: int, share: float, generator: torch.Generator, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randperm(size, generator=generator)[: round(size * share)].sort().values.to(dtype)


def model(
    tensors: list[Tensor],
    cut: str = "rc",
    voters: int = 5,
    share: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """A base, voters cut from noisy copies of it, weights with a zero, and what is wanted; ``cut``: rows, columns."""
    generator = torch.Generator().manual_seed(seed)

    def lists() -> tuple[list[Tensor | None], list[Tensor | None]]:
        rows = [kept(t.shape[0], share, generator) if "r" in cut else None for t in tensors]
        cols = [
            kept(t.shape[1], share, generator, torch.int32) if "c" in cut and t.ndim > 1 else None
            for t in tensors
        ]
        return rows, cols

    parts, voter_rows, voter_cols = [], [], []
    for _ in range(voters):
        rows, cols = lists()
        noisy = [
            (t + torch.randn(t.shape, generator=generator).to(t.dtype)).to(dtype or t.dtype) for t in tensors
        ]
        parts.append(pack(noisy, rows, cols))
        voter_rows.append(rows)
        voter_cols.append(cols)
    weights = torch.rand(voters, generator=generator) + 0.1
    if voters > 2:
        weights[1] = 0
    return tensors, parts, voter_rows, voter_cols, weights, *lists()


def tensors_of(dtype: torch.dtype, shapes: list[tuple[int, ...]] | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes or SHAPES]


def move(device: torch.device, value: Any) -> Any:
    """Tensors in nested lists, in their memory format."""
    if isinstance(value, list | tuple):
        return type(value)(move(device, item) for item in value)
    return value if value is None else value.to(device)


def assert_merged(device: torch.device, arguments: Arguments) -> None:
    """At most twice the error of the reference in the same dtype, both against float64; exact where the base is taken."""
    arguments = move(device, arguments)
    base, voters, voter_rows, voter_cols, weights, rows, cols = arguments
    got = merge(*arguments)
    plain = reference.merge(*arguments)
    exact = reference.merge(
        [t.double() for t in base],
        [[t.double() for t in v] for v in voters],
        voter_rows,
        voter_cols,
        weights,
        rows,
        cols,
    )
    for p, (g, r, e) in enumerate(zip(got, plain, exact, strict=True)):
        assert g.dtype == base[p].dtype
        assert g.shape == r.shape
        if g.numel():
            assert (g.double() - e).abs().max() <= 2 * (r.double() - e).abs().max() + 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", ["", "r", "c", "rc"])
def test_shapes(dtype: torch.dtype, cut: str, device: torch.device) -> None:
    skip_float64_on_gpu(dtype, device)
    assert_merged(device, model(tensors_of(dtype), cut))


@pytest.mark.parametrize(("voters", "share"), [(0, 0.5), (1, 0.5), (3, 0.0), (3, 1.0), (2, 0.05), (70, 0.1)])
def test_voters_and_shares(voters: int, share: float, device: torch.device) -> None:
    assert_merged(
        device, model(tensors_of(torch.float32, [(40, 30, 3, 3), (40,), (50, 64)]), "rc", voters, share)
    )


def test_only_voters_with_both_ends_count(device: torch.device) -> None:
    base = [torch.tensor([[1.0, 2.0], [3.0, 4.0]])]
    first, second = torch.tensor([[10.0, 20.0]]), torch.tensor([[100.0], [200.0]])
    rows, cols = [[torch.tensor([0])], [None]], [[None], [torch.tensor([1])]]
    arguments = (base, [[first], [second]], rows, cols, torch.tensor([1.0, 3.0]), [None], [None])
    # (0, 0): only the first; (0, 1): both; (1, 0): neither; (1, 1): only the second
    merged = merge(*move(device, arguments))[0]
    assert torch.equal(merged.cpu(), torch.tensor([[10.0, 80.0], [3.0, 200.0]]))


def test_zero_weights_mean_the_base_even_beside_nan(device: torch.device) -> None:
    arguments = move(device, model(tensors_of(torch.float32, [(12, 9, 3, 3), (12,)])))
    base, voters, voter_rows, voter_cols, _, rows, cols = arguments
    spoiled = [[torch.full_like(t, float("nan")) for t in v] for v in voters]
    merged = merge(base, spoiled, voter_rows, voter_cols, torch.zeros(5, device=device), rows, cols)
    for got, expected in zip(merged, pack(base, rows, cols), strict=True):
        assert torch.equal(got, expected)


def test_equal_voters_give_their_value_back(device: torch.device) -> None:
    base = move(device, tensors_of(torch.float32, [(24, 18, 3, 3), (24,)]))
    voters = [base] * 4
    none: list[Tensor | None] = [None, None]
    merged = merge(base, voters, [none] * 4, [none] * 4, torch.ones(4, device=device), none, none)
    for got, expected in zip(merged, base, strict=True):
        assert torch.equal(got, expected)
        assert got.data_ptr() != expected.data_ptr()


def test_mixed_dtypes_and_layouts(device: torch.device) -> None:
    base = tensors_of(torch.float32, [(24, 18, 3, 3), (20, 33), (40,)])
    for dtype in DTYPES:
        assert_merged(device, model(base, "rc", dtype=dtype))
        if dtype is not torch.float64 or not on_gpu(device):
            assert_merged(device, model([t.to(dtype) for t in base], "rc", dtype=torch.float32))
    last = [base[0].to(memory_format=torch.channels_last), base[1].t(), base[2][::2]]
    for cut in ("r", "c", "rc"):
        assert_merged(device, model(last, cut))
    arguments = model(base, "rc")
    arguments[1][2] = [
        t.to(memory_format=torch.channels_last) if t.ndim == 4 else t.t().contiguous().t()
        for t in arguments[1][2]
    ]
    assert_merged(device, arguments)
    assert merge(*move(device, model(last)))[0].is_contiguous(memory_format=torch.channels_last)


def test_any_order_of_indices(device: torch.device) -> None:
    base, voters, voter_rows, voter_cols, weights, rows, cols = model(
        tensors_of(torch.float32, [(24, 18, 2, 2), (40, 33), (50,)])
    )
    generator = torch.Generator().manual_seed(5)

    def shuffled(index: Tensor | None) -> Tensor | None:
        return None if index is None else index[torch.randperm(len(index), generator=generator)]

    assert_merged(device, (
        base, voters, [[shuffled(i) for i in v] for v in voter_rows], [[shuffled(i) for i in v] for v in voter_cols],
        weights, [shuffled(i) for i in rows], [shuffled(i) for i in cols],
    ))  # fmt: skip


def test_large_deterministic_and_without_gradient(device: torch.device) -> None:
    arguments = model(
        [torch.nn.Parameter(t) for t in tensors_of(torch.float32, [(128, 128, 3, 3), (128,), (70001,)])], "rc"
    )
    assert_merged(device, arguments)
    arguments = move(device, arguments)
    first = merge(*arguments)
    assert not any(t.requires_grad for t in first)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, merge(*arguments), strict=True))
    assert merge([], [], [], [], torch.zeros(0), [], []) == []


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_cuda_kernel_gives_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    """Also where 16 bytes are loaded at once, rows are many bands, and layouts are channels_last."""
    shapes = [
        (70, 33),
        (33, 24),
        (300, 64),
        (40, 16, 3, 3),
        (33, 24, 4, 4),
        (5, 3000),
        (700,),
        (3, 5),
        (2, 2, 2),
    ]
    base = tensors_of(dtype, shapes)
    base += [t.to(memory_format=torch.channels_last) for t in base[3:5]]
    for cut in ("", "r", "c", "rc"):
        arguments = model(base, cut, voters=3)
        expected = merge(*arguments)
        with emulated():
            got = merge(*arguments)
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g, e)
            assert g.stride() == e.stride()


@pytest.mark.sanitize
def test_tensors_that_start_anywhere() -> None:
    base = [torch.randn(2000)[start:][: 40 * 24].view(40, 24) for start in range(4)]
    for cut in ("r", "rc"):
        arguments = model(base, cut, voters=2)
        arguments[1][1] = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in arguments[1][1]]
        expected = merge(*arguments)
        with emulated():
            assert all(torch.equal(g, e) for g, e in zip(merge(*arguments), expected, strict=True))


@pytest.mark.parametrize(("tensors", "voters"), [(170, 1), (60, 20), (1, 405)])
def test_more_than_a_launch_takes(tensors: int, voters: int, device: torch.device) -> None:
    """Of tensors, of voters' tensors, of pairs of lists."""
    base, parts, voter_rows, voter_cols, weights, rows, cols = model(
        tensors_of(torch.float32, [(7, 5)]), "rc", voters=voters
    )
    parts, voter_rows, voter_cols = (
        [of * tensors for of in each] for each in (parts, voter_rows, voter_cols)
    )
    arguments = (base * tensors, parts, voter_rows, voter_cols, weights, rows * tensors, cols * tensors)
    assert_merged(device, arguments)


@pytest.mark.parametrize("schedule", range(1, 5))
def test_schedules(schedule: int) -> None:
    """In whatever order the threads of the CUDA kernels run."""
    arguments = model(tensors_of(torch.float32, [(40, 16, 3, 3), (40,), (70, 64), (3, 700)]), "rc", voters=3)
    expected = merge(*arguments)
    with emulated(schedule):
        assert all(torch.equal(g, e) for g, e in zip(merge(*arguments), expected, strict=True))


def test_what_a_gpu_does_not_take() -> None:
    arguments = {
        "base": [W], "voters": [[W[:2]]], "voter_rows": [[HALF]], "voter_cols": [[None]], "weights": ONE, "rows": [None], "cols": [None],
    }  # fmt: skip
    for changes, error, message in (
        ({"base": [W.double()]}, TypeError, "base.0.: expected float32, float16 or bfloat16 on a GPU"),
        ({"weights": -ONE}, RuntimeError, "merge: weights: a value that is negative or not finite"),
        ({"weights": ONE / 0}, RuntimeError, "merge: weights: a value that is negative or not finite"),
        (
            {"weights": ONE * float("nan")},
            RuntimeError,
            "merge: weights: a value that is negative or not finite",
        ),
        ({"voter_rows": [[HALF + 2]]}, RuntimeError, "voter_rows or voter_cols: a value out of range"),
        ({"voter_rows": [[HALF - 1]]}, RuntimeError, "voter_rows or voter_cols: a value out of range"),
        ({"voter_rows": [[HALF * 0]]}, RuntimeError, "voter_rows or voter_cols: a value that comes twice"),
        ({"rows": [HALF + 2]}, RuntimeError, "merge: rows or cols: a value out of range"),
        ({"cols": [HALF - 1]}, RuntimeError, "merge: rows or cols: a value out of range"),
    ):
        with emulated(), pytest.raises(error, match=message):
            merge(**{**arguments, **changes})


def flat(arguments: Arguments) -> tuple:
    """As the op takes them: all voters' tensors in one list."""
    base, *nested = arguments
    joined = [[item for voter in lists for item in voter] for lists in nested[:3]]
    return base, *joined, *nested[3:]


def test_opcheck_and_compile() -> None:
    arguments = model(tensors_of(torch.float32, [(6, 4, 3, 3), (6,)]), "rc", voters=2)
    torch.library.opcheck(torch.ops.mvp_ext.merge.default, flat(arguments))

    def run(base: Tensor) -> Tensor:
        return merge([base * 2, arguments[0][1]], *arguments[1:])[0] + 1

    base = arguments[0][0]
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(base), run(base))


W, HALF = torch.zeros(4, 5), torch.tensor([0, 2])
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": [W.int()]}, TypeError, r"merge: base\[0\]: expected dtype float32 or .*, got int32"),
        ({"weights": torch.ones(2)}, ValueError, r"merge: weights: expected shape \[N\] = \(1,\), got \(2,\)"),
        ({"weights": torch.tensor([-1.0])}, ValueError, "merge: weights: expected finite numbers >= 0, got -1"),
        ({"weights": torch.tensor([float("nan")])}, ValueError, "merge: weights: expected finite numbers >= 0, got -?nan"),
        ({"weights": 1.0}, TypeError, "merge: weights: expected a torch.Tensor, got float"),
        ({"voter_rows": []}, ValueError, "merge: voter_rows: expected 1 lists, one a voter, got 0"),
        ({"voter_cols": [[]]}, ValueError, r"merge: voter_cols\[0\]: expected 1 entries, one for each of voters\[0\], got 0"),
        ({"voters": [[]]}, ValueError, r"merge: voters\[0\]: expected 1 tensors, one for each of base, got 0"),
        ({"voters": [[W]]}, ValueError, r"merge: voters\[0\]\[0\]: expected shape \(2, 5\), got \(4, 5\)"),
        ({"voters": [[W[:2].long()]]}, TypeError, r"merge: voters\[0\]\[0\]: expected dtype float32"),
        ({"voter_rows": [[torch.tensor([0, 4])]]}, ValueError, r"merge: voter_rows\[0\]\[0\]: expected indices in \[0, 4\), got 4"),
        ({"voter_rows": [[torch.tensor([1, 1])]]}, ValueError, r"merge: voter_rows\[0\]\[0\]: expected no index twice, got 1 again"),
        ({"rows": [torch.tensor([-1])]}, ValueError, r"merge: rows\[0\]: expected indices in \[0, 4\), got -1"),
        ({"cols": [torch.tensor([1.0])]}, TypeError, r"merge: cols\[0\]: expected dtype int32 or int64, got float32"),
        ({"voters": [[W[:2].to("meta")]]}, ValueError, r"merge: voters\[0\]\[0\]: expected device cpu, got meta"),
    ],
)  # fmt: skip
def test_errors(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "base": [W], "voters": [[W[:2]]], "voter_rows": [[HALF]], "voter_cols": [[None]], "weights": ONE, "rows": [None], "cols": [None],
    }  # fmt: skip
    merge(**arguments)
    with pytest.raises(error, match=message):
        merge(**{**arguments, **changes})


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa: str) -> None:
    run_on(isa, __file__, "test_shapes or mixed_dtypes")
