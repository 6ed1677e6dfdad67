"""importance against its reference in float64, for every layout, type and awkward size."""

import pytest
import torch
from backends import move, on_gpu, skip_float64_on_gpu
from emulator import emulated
from isa import OLDER, run_on

from mvp_ext.ops import importance, reference

NAN, INF = float("nan"), float("inf")
KINDS = ("taylor", "taylor2", "activation")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def eager(a, grad, kind, dim, heads):
    """The same-dtype expression that a user would write."""
    terms = (a.abs() if kind == "activation" else a * grad).movedim(dim, 1)
    terms = terms.reshape(len(a), heads or terms.shape[1], -1)
    if kind == "activation":
        return terms.mean((0, 2))
    example = terms.sum(2)
    return (example.abs() if kind == "taylor" else example.square()).sum(0)


def assert_close(a, grad, dim=1, heads=None, kinds=KINDS):
    """At most twice the error of the same-dtype torch expression, both against float64."""
    for kind in kinds:
        ours = importance(a, grad, kind=kind, dim=dim, heads=heads)
        exact = reference.importance(a.double(), grad.double(), kind=kind, dim=dim, heads=heads)
        assert ours.dtype == (torch.float64 if a.dtype == torch.float64 else torch.float32)
        assert ours.shape == exact.shape
        if exact.numel() == 0 or a.numel() == 0:
            assert torch.equal(ours.double().nan_to_num(nan=-1.0), exact.nan_to_num(nan=-1.0)), kind
            continue
        if a.dtype == torch.float64:  # the reference is no better than the kernel
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14 * float(exact.max()))
            continue
        theirs = (eager(a, grad, kind, dim, heads).double() - exact).abs().max()
        resolution = torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= 2 * theirs + 2 * resolution, (kind, a.dtype)


def draw(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1), (2, 3, 1, 1), (3, 17, 7, 7), (9, 70, 7, 7), (2, 40, 14, 14), (17, 67, 2, 1),
        (2, 31, 3, 1), (2, 32, 1, 5), (2, 33, 8, 8), (1, 5, 37, 41),
        (4, 64, 56, 56), (2, 16, 112, 112), (1, 2, 300, 300),
    ],
)  # fmt: skip
def test_images(shape, dtype, device):
    skip_float64_on_gpu(dtype, device)
    a, grad = move(device, *draw(shape, dtype))
    assert_close(a, grad)
    assert_close(a.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 6), (3, 197, 384), (2, 65, 66), (2, 31, 6), (1, 4099, 12), (5, 1, 1536)]
)
def test_tokens(shape, dtype, device):
    skip_float64_on_gpu(dtype, device)
    a, grad = move(device, *draw(shape, dtype))
    assert_close(a, grad, dim=-1)
    assert_close(a, grad, dim=2, heads=6 if shape[2] % 6 == 0 else None)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (3, 4), (40, 64)])
def test_empty_and_flat(shape, device):
    assert_close(*move(device, *draw(shape)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype, device):
    """Slices with an offset, steps, unit dimensions anywhere, broadcasts, two different layouts."""
    skip_float64_on_gpu(dtype, device)
    a, grad = move(device, *draw((4, 20, 18, 22), dtype))
    assert_close(a[1:, 3:16, ::2, 1:], grad[1:, 3:16, ::2, 1:])
    assert_close(a[..., ::3], grad[..., ::3])
    assert_close(a, grad, dim=2)
    assert_close(a, grad, dim=3, heads=11)
    assert_close(a.transpose(1, 2), grad.transpose(1, 2))
    assert_close(a, grad.to(memory_format=torch.channels_last))
    assert_close(a.to(memory_format=torch.channels_last), grad)
    assert_close(a[:1].expand(4, -1, -1, -1), grad)
    wide, wide_grad = move(device, *draw((2, 3, 8, 4, 5), dtype))
    for dim in (1, 2, 3, 4):
        assert_close(wide, wide_grad, dim=dim)


# Of the CUDA kernels: rows that end anywhere in a vector and around the share of a lane, a group, a warp; one long row;
# few and many examples; channels that are whole vectors and not, more and fewer than a block's.
EDGES = [
    (3, 5, 2), (2, 3, 57), (2, 3, 64), (1, 2, 65), (2, 2, 121), (2, 3, 249), (33, 2, 250), (1, 2, 16385), (70, 3, 4),
    (35, 8, 3), (2, 600, 3), (1, 64, 700), (2, 520, 9),
]  # fmt: skip


def draw_whole(shape, dtype=torch.float32):
    """Small whole numbers: their sums are exact in any order, and an element too many or too few is seen."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(-4, 5, shape, generator=generator).to(dtype) for _ in range(2))


def assert_exact(a, grad, dim=1, heads=None):
    for kind in KINDS:
        ours = importance(a, grad, kind=kind, dim=dim, heads=heads)
        assert torch.equal(
            ours, reference.importance(a.double(), grad.double(), kind=kind, dim=dim, heads=heads).float()
        )


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sanitize)],
    ids=str,
)
def test_edges(dtype, device):
    for shape in EDGES:
        for offset in (0, 3):  # from a multiple of 16 bytes
            flat = [torch.cat([x.new_zeros(offset), x.flatten()])[offset:] for x in draw_whole(shape, dtype)]
            a, grad = (x.to(device).view(shape) for x in flat)
            assert_exact(a, grad)
            batch, columns, rows = shape
            a, grad = (x.view(batch, rows, columns).transpose(1, 2) for x in (a, grad))
            assert_exact(a, grad, heads=columns // 2 if columns % 2 == 0 else None)


@pytest.mark.sanitize
def test_slices(device):
    """Rows and columns that are parts of longer ones; a and grad that lie in memory in different ways."""
    a, grad = move(device, *draw_whole((3, 16, 9, 21)))
    assert_exact(a[1:, :, :, 3:16], grad[1:, :, :, 3:16])
    assert_exact(a[:, 3:7], grad[:, 3:7])
    last = [x.to(memory_format=torch.channels_last) for x in (a, grad)]
    for cut in (slice(0, 8), slice(4, 9)):
        assert_exact(last[0][:, cut], last[1][:, cut])
    flat, flat_grad = a.flatten(), grad.flatten()
    assert_exact(flat[1:9070].view(3, 1, 3023), flat_grad[:9069].view(3, 1, 3023))
    assert_exact(
        flat[1:].as_strided((2, 3, 40), (400, 100, 1)), flat_grad.as_strided((2, 3, 40), (400, 100, 1))
    )
    assert_exact(a[:1].expand(4, -1, -1, -1), grad[:1].expand(4, -1, -1, -1))
    # Heads that are blocks of rows, and that are wider than what a block of threads has beside each other.
    assert_exact(a, grad, heads=4)
    wide = move(device, *draw_whole((2, 3, 520)))
    for heads in (1, 5, 26):
        assert_exact(*wide, dim=2, heads=heads)


@pytest.mark.parametrize("schedule", range(1, 5))
def test_schedules(schedule):
    """In whatever order the threads of the CUDA kernels run, the same bits come out."""
    for shape, dim, heads in (
        ((2, 5, 7, 7), 1, None),
        ((2, 3, 40, 41), 1, None),
        ((33, 20, 24), 2, 3),
        ((2, 6, 5, 4), 2, None),
    ):
        a, grad = draw(shape)
        results = []
        for order in (0, schedule):
            with emulated(order):
                results.append(importance(a, grad, kind="taylor", dim=dim, heads=heads))
        assert torch.equal(*results)
        torch.testing.assert_close(results[0], importance(a, grad, kind="taylor", dim=dim, heads=heads))


def test_what_a_gpu_does_not_take():
    a, grad = draw((2, 3, 4), torch.float64)
    with emulated(), pytest.raises(TypeError, match="a: expected float32, float16 or bfloat16 on a GPU"):
        importance(a, grad, kind="taylor")


def test_by_hand(device):
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[-1.0, 1.0], [1.0, 1.0]]])  # [B = 2, C = 2, P = 2]
    grad = torch.tensor([[[1.0, -1.0], [1.0, 0.0]], [[1.0, -1.0], [-5.0, 1.0]]])
    a, grad = move(device, a, grad)
    # The abs of each example, not of their sum.
    assert importance(a, grad, kind="taylor").tolist() == [1 + 2, 3 + 4]
    assert importance(a, grad, kind="taylor2").tolist() == [1 + 4, 9 + 16]
    assert importance(a, kind="activation").tolist() == [1.25, 2.25]
    assert importance(a, grad, kind="taylor", heads=1).tolist() == [2 + 6]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_special_values_stay_in_their_unit(value, layout, device):
    a, grad = move(device, *draw((2, 33, 5, 7)))
    a[1, 32, 4, 6] = value
    a, grad = a.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    for kind in KINDS:
        finite = importance(a, grad, kind=kind).isfinite()
        assert finite.tolist() == [True] * 32 + [False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_stay_in_their_row(dtype):
    """Rows of channels without gaps share registers, and what follows the last one is not read."""
    a, grad = (torch.cat([x, torch.full((2, 70), NAN, dtype=dtype)]) for x in draw((20, 70), dtype))
    for length in (1, 3, 7):
        channels = 70 // length
        view = lambda x: x[:20, : channels * length].unflatten(1, (channels, length))  # noqa: E731, B023
        for marked in (0, channels // 2, channels - 1):
            x = a.clone()
            view(x)[3, marked] = NAN
            for kind in KINDS:
                finite = importance(view(x), view(grad), kind=kind).isfinite()
                assert finite.tolist() == [c != marked for c in range(channels)], (length, kind)
        assert_close(view(a), view(grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_repeats_and_threads_agree(dtype, layout, device):
    shape = (5, 33, 61, 67) if device.type == "cuda" or not on_gpu(device) else (3, 33, 11, 13)
    a, grad = (x.to(device).contiguous(memory_format=layout) for x in draw(shape, dtype))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [importance(a, grad, kind="taylor") for _ in range(10)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_no_gradient_and_no_alias():
    a, grad = draw((2, 3, 4))
    a.requires_grad_()
    assert not importance(a, grad, kind="taylor").requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": [1.0]}, TypeError, "a: expected a torch.Tensor, got list"),
        ({"a": torch.ones(2, 6, 3, dtype=torch.int32)}, TypeError, "a: expected dtype float32 .*, got int32"),
        (
            {"kind": "magnitude"},
            ValueError,
            "kind: expected one of taylor, taylor2, activation, got 'magnitude'",
        ),
        ({"grad": None}, ValueError, "grad: expected the gradient at a, which taylor needs, got None"),
        (
            {"grad": torch.ones(2, 3, 6)},
            ValueError,
            r"grad: expected shape like a = \(2, 6, 3\), got \(2, 3, 6\)",
        ),
        ({"grad": torch.ones(2, 6, 3).half()}, TypeError, "grad: expected dtype float32, got float16"),
        ({"grad": torch.ones(2, 6, 3, device="meta")}, ValueError, "grad: expected device cpu, got meta"),
        ({"dim": 0}, ValueError, "dim: expected a dimension of a after the batch, got 0"),
        ({"dim": 3}, ValueError, "dim: expected a dimension of a after the batch, got 3"),
        ({"dim": -3}, ValueError, "dim: expected a dimension of a after the batch, got -3"),
        ({"a": torch.ones(3), "grad": torch.ones(3)}, ValueError, "dim: expected a dimension"),
        ({"heads": 4}, ValueError, r"heads: expected a divisor of a.shape\[1\] = 6, got 4"),
        ({"heads": 0}, ValueError, "heads: expected a divisor"),
    ],
)
def test_errors(change, error, message):
    arguments = {"a": torch.ones(2, 6, 3), "grad": torch.ones(2, 6, 3), "kind": "taylor", **change}
    with pytest.raises(error, match=message):
        importance(**arguments)


def test_opcheck():
    a, grad = draw((2, 6, 5, 5))
    torch.library.opcheck(torch.ops.mvp_ext.importance.default, (a, grad, "taylor", 1, 3))
    torch.library.opcheck(torch.ops.mvp_ext.importance.default, (a.double(), None, "activation", 3, 5))


def test_compile():
    a, grad = draw((2, 6, 5))
    step = lambda a, grad: importance(a * 2, grad, kind="taylor", dim=-1) + 1  # noqa: E731
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(a, grad), step(a, grad))


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa):
    run_on(isa, __file__, "test_images or test_tokens or test_views or special_values or by_hand")
