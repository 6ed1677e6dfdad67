"""pruned_linear's CUDA kernel against its reference: every tiling, both layouts, splits, gradients, what goes wrong."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from backends import move
from emulator import emulated
from pruned_helpers import assert_as_exact_as_torch, draw_index, generator, to
from test_pruned_linear import draw, input_major
from torch import Tensor

from mvp_ext.ops import device as where
from mvp_ext.ops import pruned_attention, pruned_linear, pruned_linear_plan, reference
from mvp_ext.ops.pruned_linear import pruned_linear_gelu_op
from mvp_ext.ops.pruned_linear_plan import Plan, linear_by

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = ["row-major", "input-major"]
ON_GPU = pytest.mark.parametrize(
    "device", ["emulator", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)

# (rows of x, O, I, out_block, in_block): a row, a vector, tiles and a bit more, tails in every direction.
SIZES = [
    (1, 8, 8, 8, 8),
    (5, 40, 24, 8, 8),
    (16, 64, 288, 8, 16),
    (17, 80, 272, 16, 8),
    (70, 144, 200, 24, 40),
    (130, 272, 80, 8, 8),
]


HOPPER = Plan(3, 1)


def on_hopper(device: torch.device, splits: int = 1) -> tuple[Plan, ...]:
    """Hopper's plan, where its kernel runs: in the emulator, and on that GPU."""
    return (Plan(HOPPER.tiling, splits),) if pruned_linear_plan.has_hopper(device) else ()


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of the kernel's calls."""
    calls: list[tuple[Any, ...]] = []
    real = where.cuda_kernels()

    def kernel(*arguments: Any) -> None:
        calls.append(arguments)
        real.pruned_linear_cuda(*arguments)

    spy = mock.Mock(wraps=real)
    spy.pruned_linear_cuda = kernel
    with mock.patch.object(where, "emulator", spy):
        yield calls


def problem(
    size: tuple[int, ...], layout: str, dtype: torch.dtype, kept: tuple[bool, bool] = (True, True)
) -> tuple[list[Any], dict[str, int]]:
    """Arguments that the kernel can read. Blocks are given up where the layout allows single positions."""
    rows, outputs, inputs, out_block, in_block = size
    single_rows = layout == "row-major" or not kept[0]
    single_columns = layout == "input-major" and inputs % 16 == 0
    blocks = (
        1 if single_rows else out_block,
        1 if single_columns or not kept[1] else in_block,
    )
    arguments = to(dtype, draw(rows, outputs, inputs, *blocks, kept=kept))
    if layout == "input-major":
        arguments[1] = input_major(arguments[1])
    return arguments, {"out_block": blocks[0], "in_block": blocks[1]}


def check(arguments: list[Any], options: dict[str, Any], calls: int = 1) -> Tensor:
    with counted() as made:
        y = pruned_linear(*arguments, **options)
    assert len(made) == calls
    assert_as_exact_as_torch(y, "pruned_linear", reference.pruned_linear, arguments, options)
    return y


@ON_GPU
@pytest.mark.parametrize(
    "plan", [Plan(0, 1), Plan(0, 2), Plan(1, 1), Plan(1, 3), Plan(2, 1), Plan(2, 2), HOPPER], ids=str
)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_reference(layout: str, dtype: str, plan: Plan, device: torch.device) -> None:
    if plan == HOPPER and not on_hopper(device):
        pytest.skip("needs a GPU of compute capability 9.0 and a build for it")
    for size in SIZES if dtype == "bf16" else SIZES[1:4]:  # float16 is slower to emulate
        some = ((True, False), (False, True)) if size[0] < 50 else ()
        for kept in ((True, True), *some, (False, False)):
            arguments, blocks = problem(size, layout, HALVES[dtype], kept)
            arguments = list(move(device, *arguments))
            shape = size[0], size[1]
            residual = torch.randn(shape, generator=generator(1)).to(device, HALVES[dtype])
            without_bias = [*arguments[:2], None, *arguments[3:]]
            with linear_by(plan):
                check(arguments, {**blocks, "activation": "gelu"})
                check(without_bias, blocks)
                check(arguments, {**blocks, "residual": residual})


@ON_GPU
@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS)
def test_edges(layout: str, device: torch.device) -> None:
    """Tails and sizes that are no multiple of anything, few enough for the sanitizers."""
    for plan in (Plan(0, 1), Plan(0, 2), Plan(1, 1), Plan(2, 1), *on_hopper(device), *on_hopper(device, 2)):
        for size in (SIZES[1], SIZES[3]):
            arguments, blocks = problem(size, layout, torch.bfloat16)
            arguments = list(move(device, *arguments))
            residual = torch.randn(size[:2], generator=generator(1)).to(device, torch.bfloat16)
            with linear_by(plan):
                check(arguments, blocks)
                check(arguments, {**blocks, "residual": residual})
    # Outputs, kept and in all, that are no multiple of four or eight.
    x, w, b, _, _ = move(device, *to(torch.float16, draw(19, 83, 40, kept=(False, False))))
    rows = draw_index(83, 41).to(device)
    residual = torch.randn(19, 83, generator=generator(1)).to(device, torch.float16)
    for plan in (Plan(0, 1), Plan(1, 1)):
        with linear_by(plan):
            for index in (rows, rows[:1], rows[:38], None):
                check([x, w, b, index], {})
                check([x, w, b, index], {"residual": residual})


@ON_GPU
def test_the_plan_of_many_inputs(device: torch.device) -> None:
    """Where there are few tiles, blocks share the inputs; the rule says so by itself."""
    x, w, b, rows, _ = move(device, *to(torch.bfloat16, draw(3, 72, 4096 + 24, kept=(True, False))))
    with counted() as calls:
        y = pruned_linear(x, w, b, rows)
    assert_as_exact_as_torch(y, "pruned_linear", reference.pruned_linear, [x, w, b, rows], {})
    partial = calls[0][-3]
    assert partial is not None
    assert partial.shape[0] > 1
    assert partial.shape[1:] == (3, 36)


# (rows, O, I, out_index, in_index, out_block, in_block), and whether W comes in boxes of 64 × 64.
BOXED = {
    "heads": ((130, 320, 256, [4, 0, 3], [1, 3], 64, 64), True),
    "heads of 128": ((70, 384, 256, [2, 0], [1], 128, 128), True),
    "all rows, some heads": ((130, 200, 192, None, [2, 0], 1, 64), True),
    "some heads, all columns": ((1, 256, 104, [3, 1, 0], None, 64, 1), True),
    "all": ((40, 72, 72, None, None, 1, 1), True),
    "heads of 32": ((40, 128, 128, [3, 1, 0], [0, 2], 32, 32), False),
}


@ON_GPU
@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BOXED)
def test_hopper_reads_blocks_in_boxes(case: str, layout: str, device: torch.device) -> None:
    (rows, outputs, inputs, out_units, in_units, out_block, in_block), in_boxes = BOXED[case]
    if not on_hopper(device):
        pytest.skip("needs a GPU of compute capability 9.0 and a build for it")
    x, w, b, _, _ = to(torch.bfloat16, draw(rows, outputs, inputs, kept=(False, False)))
    indices = [None if units is None else torch.tensor(units) for units in (out_units, in_units)]
    x = x if in_units is None else x[:, : len(in_units) * in_block]
    w = input_major(w) if layout == "input-major" else w
    call = list(move(device, x, w, b, *indices))
    options: dict[str, Any] = {"out_block": out_block, "in_block": in_block}
    residual = torch.randn(rows, outputs, generator=generator(1)).to(device, torch.bfloat16)
    for schedule in range(4) if device.type == "cpu" else (0,):
        for splits in (1, 2):
            context = emulated(schedule) if device.type == "cpu" else contextlib.nullcontext()
            with linear_by(Plan(3, splits)), context as module:
                if module is not None:
                    module.boxes_copied()
                check(call, {**options, "activation": "gelu"})
                if module is not None:
                    stages, tiles = -(-x.shape[1] // 64), -(-rows // 128)
                    kept = outputs if out_units is None else len(out_units) * out_block
                    assert module.boxes_copied() == stages * tiles * -(-kept // 128) * (3 if in_boxes else 1)
                check(call, {**options, "residual": residual})


@ON_GPU
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [8, 64])
def test_hopper_goes_round_its_stages(block: int, layout: str, device: torch.device) -> None:
    """More inputs than its stages hold at a time, several times over: gathered, and in boxes."""
    if not on_hopper(device):
        pytest.skip("needs a GPU of compute capability 9.0 and a build for it")
    arguments = to(torch.bfloat16, draw(9, 128, 1280, block, block))
    if layout == "input-major":
        arguments[1] = input_major(arguments[1])
    arguments = list(move(device, *arguments))
    assert arguments[0].shape[1] > 9 * 64
    for schedule in range(6) if device.type == "cpu" else (0,):
        with linear_by(HOPPER), emulated(schedule) if device.type == "cpu" else contextlib.nullcontext():
            check(arguments, {"out_block": block, "in_block": block})


@ON_GPU
@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_in_any_order_and_repeated(layout: str, device: torch.device) -> None:
    x, w, b, _, _ = to(torch.float16, draw(20, 64, 128, kept=(False, False)))
    units = torch.tensor([5, 0, 7, 5, 2])
    single = torch.tensor([61, 3, 3, 0, 17, 40, 22, 9, 33])
    if layout == "row-major":
        call, blocks = [x[:, :80], w, b, single, torch.tensor([6, 1, 7, 1, 0])], {"in_block": 16}
    else:
        inputs = torch.randint(0, 128, (48,), generator=generator())
        call, blocks = [x[:, :48], input_major(w), b, units, inputs], {"out_block": 8}
    call = list(move(device, *call))
    order = call[3].unique().flip(0)
    residual = torch.randn(20, 64, generator=generator(1)).to(device, torch.float16)
    for plan in (Plan(0, 1), Plan(1, 1)):
        with linear_by(plan):
            for dtype in (torch.int32, torch.int64):
                some = [*call[:3], call[3].to(dtype), call[4].to(dtype)]
                check(some, blocks)
                check([*some[:3], order.to(dtype), some[4]], {**blocks, "residual": residual})


@ON_GPU
def test_views(device: torch.device) -> None:
    """Strided x, bias, indices and residual; a weight that is part of a larger one."""
    x, w, b, rows, cols = to(torch.bfloat16, draw(20, 48, 64, 1, 8))
    wide_x = torch.zeros(20, 48, dtype=torch.bfloat16)
    wide_x[:, 8:40] = x
    spread_x = torch.zeros(40, 65, dtype=torch.bfloat16)
    spread_x[::2, 1::2] = x
    wide_w = torch.zeros(50, 80, dtype=torch.bfloat16)
    wide_w[1:49, 8:72] = w
    wide_w = wide_w.to(device)[1:49, 8:72]
    wide_b = torch.stack([b, b], 1).to(device)[:, 0]
    indices = [torch.stack([i, i], 1).to(device)[:, 0] for i in (rows, cols)]
    residual = torch.randn(48, 40, generator=generator()).to(device, torch.bfloat16).t()[::2]
    for some_x in (
        wide_x.to(device)[:, 8:40],
        wide_x.to(device)[:, 3:35].clone(),
        spread_x.to(device)[::2, 1::2],
        x[:1].to(device).expand(20, 32),
    ):
        arguments = [some_x, wide_w, wide_b, *indices]
        check(arguments, {"in_block": 8})
        for plan in on_hopper(device):
            with linear_by(plan):
                check(arguments, {"in_block": 8})
        check(arguments, {"in_block": 8, "residual": residual})
    unaligned = wide_x.to(device)[:, 3:35]
    check([unaligned, wide_w, wide_b, *indices], {"in_block": 8})
    check([unaligned.reshape(5, 2, 2, 32), wide_w, wide_b, *indices], {"in_block": 8})
    check([unaligned[3], wide_w, wide_b, *indices], {"in_block": 8, "residual": residual[3]})


@ON_GPU
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_kept_is_not_read(layout: str, device: torch.device) -> None:
    arguments, blocks = problem((20, 64, 64, 8, 8), layout, torch.bfloat16)
    x, w, b, rows, cols = arguments
    kept = torch.zeros(64, 64, dtype=torch.bool)
    at = [
        (i.long()[:, None] * n + torch.arange(n)).flatten()
        for i, n in zip((rows, cols), blocks.values(), strict=True)
    ]
    kept[at[0][:, None], at[1]] = True
    spoiled = torch.full_like(w, float("nan"))
    spoiled[kept] = w[kept]
    spoiled = input_major(spoiled) if layout == "input-major" else spoiled
    for plan in (Plan(0, 1), Plan(1, 1), Plan(2, 1), *on_hopper(device)):
        with linear_by(plan):
            y = pruned_linear(*move(device, x, w, b, rows, cols), **blocks)
            assert torch.equal(pruned_linear(*move(device, x, spoiled, b, rows, cols), **blocks), y)


@ON_GPU
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding(dtype: str, device: torch.device) -> None:
    """Identity weights: every value passes as it is, subnormals, infinities and overflow included."""
    inf, nan = float("inf"), float("nan")
    values = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        6e-8,
        1e-7,
        6e-5,
        65504.0,
        3e38,
        inf,
        -inf,
        nan,
        1.0009765625,
        0.333,
        7e4,
        -5e-8,
    ]
    x = torch.zeros(16, 8)
    x[:, 3] = torch.tensor(values)
    x = x.to(device, HALVES[dtype])
    w = torch.zeros(24, 8, device=device, dtype=HALVES[dtype])
    w[:, 3] = 1
    for weight in (w, input_major(w)):
        y = pruned_linear(x, weight)
        assert torch.equal(y.nan_to_num(7.0), x[:, 3:4].expand(16, 24).nan_to_num(7.0))
    big = torch.full((1, 16), 60000.0, device=device, dtype=HALVES[dtype])
    ones = torch.ones(8, 16, device=device, dtype=HALVES[dtype])
    assert torch.equal(pruned_linear(big, ones), (big.double() * 16).to(HALVES[dtype])[:, :8])


@ON_GPU
def test_sizes_of_nothing(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int32, device=device)
    w, b = torch.randn(16, 8, device=device).half(), torch.randn(16, device=device).half()
    for rows in (0, 1, 20):
        x = torch.randn(rows, 8, device=device).half()
        assert pruned_linear(x, w, b, none).shape == (rows, 0)
        for weight in (w, input_major(w)):
            assert torch.equal(pruned_linear(x[:, :0], weight, b, None, none), b.expand(rows, 16))
            assert torch.equal(pruned_linear(x[:, :0], weight, None, None, none), b.new_zeros(rows, 16))
        residual = torch.randn(rows, 16, device=device).half()
        y = pruned_linear(x, w, b, none, residual=residual)
        assert torch.equal(y, residual)
        assert y is not residual
        for dtype in (torch.float16, torch.float32):  # by the kernel, and by the library
            call = to(dtype, [x, w, b, none + 0])
            assert torch.equal(pruned_linear(*call, residual=residual.to(dtype)), residual.to(dtype))


@ON_GPU
def test_repeats(device: torch.device) -> None:
    """Bit by bit the same; and a residual is left as it was."""
    residual = torch.randn(70, 144, generator=generator(1)).to(device, torch.bfloat16)
    before = residual.clone()
    for layout in LAYOUTS:
        arguments, blocks = problem(SIZES[4], layout, torch.bfloat16)
        arguments = list(move(device, *arguments))
        for plan in (Plan(0, 2), Plan(1, 1), Plan(2, 1), *on_hopper(device)):
            with linear_by(plan):
                wanted = pruned_linear(*arguments, **blocks, residual=residual)
                for _ in range(2 if device.type == "cpu" else 10):
                    assert torch.equal(pruned_linear(*arguments, **blocks, residual=residual), wanted)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("schedule", range(1, 5))
def test_schedules(schedule: int) -> None:
    """In whatever order the threads and blocks of the kernel run."""
    residual = torch.randn(17, 80, generator=generator(1)).bfloat16()
    for layout in LAYOUTS:
        arguments, blocks = problem(SIZES[3], layout, torch.bfloat16)
        for plan in (Plan(0, 1), Plan(0, 2), Plan(1, 2), Plan(2, 1), HOPPER):
            for options in ({"activation": "gelu"}, {"residual": residual}):
                results = []
                for order in (0, schedule):
                    with linear_by(plan), emulated(order):
                        results.append(pruned_linear(*arguments, **blocks, **options))
                assert torch.equal(*results)


# What the kernel cannot read: (x, weight, out_index, in_index, blocks)
W = torch.randn(48, 64, generator=generator())
X = torch.randn(9, 64, generator=generator())
LIBRARY = {
    "single columns of a row-major weight": (X[:, :8], W, None, draw_index(64, 8), {}),
    "single rows of an input-major weight": (X, input_major(W), draw_index(48, 21), None, {}),
    "blocks of 4 columns": (X[:, :16], W, draw_index(48, 8), draw_index(16, 4), {"in_block": 4}),
    "a number of inputs that is no multiple of 8": (X[:, :12], input_major(W), None, draw_index(64, 12), {}),
    "an odd stride": (X[:, :56], torch.randn(48, 57, generator=generator())[:, :56], draw_index(48, 21), None, {}),
    "an unaligned weight": (X[:, :56], W[:, 1:57], draw_index(48, 21), None, {}),
    "strides in both directions": (X[:, :32], W[:, ::2], draw_index(48, 21), None, {}),
}  # fmt: skip


@ON_GPU
@pytest.mark.parametrize("case", LIBRARY)
def test_what_the_library_does(case: str, device: torch.device) -> None:
    x, w, rows, cols, blocks = LIBRARY[case]
    bias = torch.randn(48, generator=generator(2))
    residual = torch.randn(9, 48, generator=generator(3))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weight = torch.empty_strided(w.shape, w.stride(), dtype=dtype)
        if case == "an unaligned weight":
            weight = torch.zeros(48, 64, dtype=dtype)[:, 1:57]
        weight.copy_(w)
        whole = weight.untyped_storage().nbytes() // weight.itemsize
        flat = weight.as_strided((whole,), (1,), 0).to(device)  # .to() of the view would make it dense
        weight = flat.as_strided(w.shape, w.stride(), weight.storage_offset())
        call = [*move(device, x.to(dtype), weight, bias.to(dtype)), *move(device, rows, cols)]
        check(call, {**blocks, "activation": "gelu"}, calls=0)
        check(call, {**blocks, "residual": residual.to(device, dtype)}, calls=0)


@ON_GPU
def test_forced_library(device: torch.device) -> None:
    arguments, blocks = problem(SIZES[3], "row-major", torch.bfloat16)
    arguments = list(move(device, *arguments))
    with linear_by("library"):
        check(arguments, blocks, calls=0)
        with linear_by("kernel"):
            check(arguments, blocks)
        check(arguments, blocks, calls=0)
    check(arguments, blocks)


@ON_GPU
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout: str, with_residual: bool, device: torch.device) -> None:
    check_gradients(layout, device, with_residual=with_residual, activation=not with_residual)


@ON_GPU
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_on_hopper(layout: str, device: torch.device) -> None:
    if not on_hopper(device):
        pytest.skip("needs a GPU of compute capability 9.0 and a build for it")
    with linear_by(HOPPER):
        check_gradients(layout, device)


@ON_GPU
def test_hopper_in_a_new_thread(device: torch.device) -> None:
    """One that has used CUDA for nothing else, as autograd's at its first backward, has no context yet."""
    if not on_hopper(device):
        pytest.skip("needs a GPU of compute capability 9.0 and a build for it")
    arguments, blocks = problem(SIZES[1], "row-major", torch.bfloat16)
    arguments = list(move(device, *arguments))
    results: list[Tensor] = []
    with linear_by(HOPPER):
        wanted = pruned_linear(*arguments, **blocks)
        thread = threading.Thread(target=lambda: results.append(pruned_linear(*arguments, **blocks)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], wanted)


def check_gradients(
    layout: str, device: torch.device, *, with_residual: bool = False, activation: bool = False
) -> None:
    """Forward and the gradient of x by the kernel. Single rows (columns) forward become single columns (rows) backward,
    which it can read because the weight is then transposed."""
    arguments, blocks = problem((20, 64, 80, 8, 8), layout, torch.bfloat16)
    x, w, b, rows, cols = move(device, *arguments)
    residual = torch.randn(20, 64, generator=generator(4)).to(device, torch.bfloat16)
    grads: dict[str, list[Tensor]] = {}
    with counted() as calls:
        for name, op, dtype in (
            ("ours", pruned_linear, torch.bfloat16),
            ("plain", reference.pruned_linear, torch.bfloat16),
            ("exact", reference.pruned_linear, torch.float64),
        ):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b, residual)]
            options: dict[str, Any] = {"activation": "gelu"} if activation else {}
            if with_residual:
                options["residual"] = leaves[3]
            y = op(*leaves[:3], rows, cols, **blocks, **options)
            y.backward(torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(dtype))
            grads[name] = [t.grad for t in leaves[: 4 if with_residual else 3]]
    assert len(calls) == 2
    assert (calls[0][-5] is not None) == activation  # the kernel leaves behind what GELU was applied to
    for ours, plain, exact in zip(*grads.values(), strict=True):
        allowed = 2 * (plain.double() - exact).abs().max() + 0.01 * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed


@ON_GPU
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_gelu_was_applied_to(layout: str, device: torch.device) -> None:
    """The kernel leaves it behind for the gradient: as it would be without GELU, whole vectors or not."""
    for plan in (Plan(0, 1), Plan(0, 2), Plan(1, 1), Plan(2, 1), *on_hopper(device)):
        for size in (SIZES[1], SIZES[3], (7, 48, 64, 8, 8)):
            arguments, blocks = problem(size, layout, torch.bfloat16)
            if layout == "row-major":
                arguments[3] = arguments[3][:-1]  # a number of outputs that is no multiple of four
            call = list(move(device, *arguments))
            with linear_by(plan), counted() as calls:
                plain = pruned_linear(*call, **blocks)
                curved = pruned_linear(*call, **blocks, activation="gelu")
                out, before = pruned_linear_gelu_op(*call, *blocks.values())
                assert len(calls) == 3
            assert torch.equal(before, plain)
            assert torch.equal(out, curved)


@ON_GPU
@pytest.mark.parametrize("dtype", HALVES)
def test_attention(dtype: str, device: torch.device) -> None:
    x = torch.randn(2, 19, 48, generator=generator())
    weights = [
        torch.randn(s, generator=generator(i)) / 7 for i, s in enumerate(((144, 48), (144,), (48, 48), (48,)))
    ]
    arguments = list(move(device, *to(HALVES[dtype], [x, *weights]), draw_index(3, 2)))
    with counted() as calls:
        y = pruned_attention(*arguments, num_heads=3)
    assert len(calls) == 2
    assert_as_exact_as_torch(y, "pruned_attention", reference.pruned_attention, arguments, {"num_heads": 3})


def test_errors_on_the_device() -> None:
    x, w, b = torch.zeros(3, 8).half(), torch.zeros(16, 32).half(), torch.zeros(16).half()
    for units, dtype in (([0, 16], torch.int32), ([-1], torch.int64), ([2**32], torch.int64)):
        index = torch.tensor(units, dtype=dtype)
        with emulated(), pytest.raises(RuntimeError, match="pruned_linear: out_index: a value out of range"):
            pruned_linear(x, w[:, :8], b, index)
        with emulated(), pytest.raises(RuntimeError, match="pruned_linear: out_index: a value out of range"):
            pruned_linear(x, w[:, :8], b, index, residual=torch.zeros(3, 16).half())
    for block, single in ((4, 32), (-1, -1)):
        with emulated(), pytest.raises(RuntimeError, match="pruned_linear: in_index: a value out of range"):
            pruned_linear(x, w, b, None, torch.tensor([block]), in_block=8)
        with emulated(), pytest.raises(RuntimeError, match="pruned_linear: in_index: a value out of range"):
            pruned_linear(x, input_major(w), b, None, torch.tensor([0, 1, 2, 3, 4, 5, 6, single]))
    twice = torch.tensor([3, 3])
    with emulated(), pytest.raises(RuntimeError, match="out_index: a value that comes twice"):
        pruned_linear(x, w[:, :8], b, twice, residual=torch.zeros(3, 16).half())


def test_the_rule() -> None:
    """More rows are the library's, sooner or later; more weight per row is ours. And every block of a plan has work."""
    ways = [pruned_linear_plan._kernel_or_library(rows, 4096, 4096) for rows in (1, 16, 128, 10**4, 10**6)]
    assert ways == sorted(ways)  # "kernel" < "library"
    assert ways[0] == "kernel"
    assert ways[-1] == "library"
    for rows in (0, 1, 16, 17, 64, 65, 200, 5000):
        for outputs in (1, 64, 384, 4096):
            for inputs in (8, 384, 768, 4096, 16384):
                tiling, splits = pruned_linear_plan._kernel_plan(rows, outputs, inputs, 132)
                stages = -(-inputs // pruned_linear_plan.TILINGS[tiling][2])
                share = -(-stages // splits)
                assert 1 <= splits <= 16
                assert (splits - 1) * share < stages
