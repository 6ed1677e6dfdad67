"""pruned_linear against its reference: every path of the kernel, layouts, dtypes, gradients, errors."""

import itertools

import pytest
import torch
from backends import move, on_gpu
from isa import OLDER, run_on
from pruned_helpers import BY_NAME, FLOATS, assert_as_exact_as_torch, draw_index, generator, to

from mvp_ext.ops import pruned_linear, reference
from mvp_ext.ops.blocks import positions

NAN, INF, CPU = float("nan"), float("inf"), torch.device("cpu")

# (rows of x, O, I, out_block, in_block): around a vector and a panel, primes, blocks, rows around every tile's height.
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 31, 33, 1, 1),
    (2, 32, 32, 1, 1),
    (3, 33, 31, 1, 1),
    (7, 67, 97, 1, 1),
    (8, 96, 160, 1, 16),
    (40, 70, 162, 1, 6),
    (4, 128, 48, 64, 1),
    (14, 64, 64, 16, 32),
    (15, 130, 129, 1, 3),
    (17, 101, 257, 1, 1),
    (29, 192, 192, 64, 64),
    (53, 5, 7, 1, 1),
    (3, 6, 5, 2, 1),
    (1100, 37, 41, 1, 1),
]


def draw(rows, outputs, inputs, out_block=1, in_block=1, kept=(True, True), seed=0, keep=0.5):
    """x, weight, bias, out_index, in_index of one problem."""
    g = generator(seed)
    count = [max(1, round(n // b * keep)) for n, b in ((outputs, out_block), (inputs, in_block))]
    out_index = draw_index(outputs // out_block, count[0], seed) if kept[0] else None
    in_index = draw_index(inputs // in_block, count[1], seed + 1, torch.int64) if kept[1] else None
    x = torch.randn(rows, count[1] * in_block if kept[1] else inputs, generator=g)
    return (
        x,
        torch.randn(outputs, inputs, generator=g),
        torch.randn(outputs, generator=g),
        out_index,
        in_index,
    )


def input_major(weight):
    return weight.t().contiguous().t()


def check(arguments, options, device=CPU):
    arguments = move(device, *arguments)
    options = {name: value.to(device) if name == "residual" else value for name, value in options.items()}
    assert_as_exact_as_torch(
        pruned_linear(*arguments, **options), "pruned_linear", reference.pruned_linear, arguments, options
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=BY_NAME)
@pytest.mark.parametrize("layout", ["row-major", "input-major"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(size, layout, dtype, device):
    rows, outputs, _, out_block, in_block = size
    for kept in ((True, True), (True, False), (False, True), (False, False)):
        arguments = to(dtype, draw(*size, kept=kept))
        if layout == "input-major":
            arguments[1] = input_major(arguments[1])
        blocks = {"out_block": out_block if kept[0] else 1, "in_block": in_block if kept[1] else 1}
        check(arguments, blocks, device)
        check(arguments, {**blocks, "activation": "gelu"}, device)
        residual = torch.randn(rows, outputs, generator=generator(1)).to(dtype)
        check([*arguments[:2], None, *arguments[3:]], {**blocks, "residual": residual}, device)


@pytest.mark.parametrize("layout", ["row-major", "input-major"])
def test_every_tile_height(layout):
    for rows in range(1, 34):
        arguments = list(draw(rows, 110, 100, kept=(layout == "row-major", True)))
        if layout == "input-major":
            arguments[1] = input_major(arguments[1])
        check(arguments, {})


@pytest.mark.parametrize("layout", ["row-major", "input-major"])
def test_every_tile_of_pairs(layout):
    """Of bfloat16: rows, pairs of inputs and outputs around the tiles' sizes, and what is left over beside them."""
    for rows, inputs, outputs in itertools.product(
        (5, 16, 17, 31, 33, 70, 200), (2, 30, 32, 66, 130, 520), (7, 16, 33, 70)
    ):
        arguments = to(torch.bfloat16, draw(rows, 2 * outputs, inputs, kept=(layout == "row-major", False)))
        if layout == "input-major":
            arguments[1] = input_major(arguments[1])
        check(arguments, {})


@pytest.mark.parametrize("inputs", [64, 128, 129, 512, 1024])
@pytest.mark.parametrize("rows", [9, 64, 65, 130])
def test_slices_of_inputs_and_rows_that_lie_a_power_of_two_apart(rows, inputs):
    for kept in ((True, False), (False, True)):
        arguments = list(draw(rows, 98, inputs if kept[0] else 2 * inputs, kept=kept))
        check(arguments, {})
        arguments[1] = input_major(arguments[1])
        check(arguments, {})


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_keep_ratios(rows, keep):
    for weight in (lambda w: w, input_major):
        x, w, *rest = draw(rows, 90, 230, keep=keep)
        check([x, weight(w), *rest], {})


@pytest.mark.parametrize("rows", [1, 20])
def test_indices_in_any_order_and_repeated(rows):
    for weight in (lambda w: w, input_major):
        x, w, b, _, _ = draw(rows, 50, 40, kept=(False, False))
        outs, ins = torch.tensor([7, 3, 49, 3, 0, 12]), torch.randint(0, 40, (40,), generator=generator())
        check([x, weight(w), b, outs, ins], {})
        check([x, weight(w), b, outs, ins], {"residual": torch.randn(rows, 50)})
        check([x, weight(w), b, torch.arange(10, 47), ins], {})
        # As wide as a run from 2 to 41, and as long, but not one.
        check([x, weight(w), b, torch.tensor([*range(2, 20), 19, *range(21, 42)]), ins], {})


@pytest.mark.parametrize("rows", [1, 20])
def test_views(rows):
    x, w, b, out_index, in_index = draw(rows, 48, 56)
    wide_x = torch.zeros(2 * rows, 2 * x.shape[1] + 1)
    wide_x[::2, 1::2] = x
    wide_w = torch.zeros(100, 120)
    wide_w[2:98:2, 5:61] = w
    wide_b = torch.zeros(97)
    wide_b[1::2] = b
    indices = [torch.stack([i, i], 1)[:, 0] for i in (out_index, in_index)]
    every = torch.zeros(96, 112)
    every[::2, ::2] = w
    for weight in (wide_w[2:98:2, 5:61], input_major(wide_w)[2:98:2, 5:61], every[::2, ::2]):
        check([wide_x[::2, 1::2], weight, wide_b[1::2], *indices], {})
    wide_r = torch.randn(48, 2 * rows).t()[::2]
    check([x, w, b, *indices], {"residual": wide_r})
    check([x, w, b, None, in_index], {"residual": wide_r})


def test_the_short_way_through_a_plain_call_changes_nothing():
    x, w, b, out_index, in_index = draw(9, 48, 56)
    wanted = pruned_linear(x, w, b, out_index, in_index)
    parameter, bias = torch.nn.Parameter(w), torch.nn.Parameter(b)
    with torch.no_grad():
        assert torch.equal(pruned_linear(x, parameter, bias, out_index, in_index), wanted)
    tied = pruned_linear(x, parameter, bias, out_index, in_index)
    assert tied.requires_grad
    assert torch.equal(tied, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert pruned_linear(x, w, b, out_index, in_index).dtype is torch.bfloat16
    # A sign that is a bit which only torch knows.
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    assert torch.equal(pruned_linear(negative, w, b, out_index, in_index), wanted)
    freed = torch.cat([x, x])[9:]
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="x: expected a tensor with memory"):
        pruned_linear(freed, w, b, out_index, in_index)


def test_leading_dimensions():
    x, w, b, out_index, in_index = draw(30, 20, 24)
    y = pruned_linear(x, w, b, out_index, in_index)
    for shape in ((2, 15), (5, 2, 3), (1, 30, 1)):
        assert torch.equal(pruned_linear(x.view(*shape, -1), w, b, out_index, in_index), y.view(*shape, -1))
    one = pruned_linear(x[0], w, b, out_index, in_index)
    assert one.shape == (10,)
    assert torch.allclose(one, y[0], atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=BY_NAME)
def test_sizes_of_nothing(dtype):
    none = torch.zeros(0, dtype=torch.int32)
    w, b = torch.randn(6, 4).to(dtype), torch.randn(6).to(dtype)
    for rows in (0, 1, 20):
        x = torch.randn(rows, 4).to(dtype)
        assert pruned_linear(x, w, b, none).shape == (rows, 0)
        for weight in (w, input_major(w)):
            assert torch.equal(pruned_linear(x[:, :0], weight, b, None, none), b.expand(rows, 6))
            assert torch.equal(
                pruned_linear(x[:, :0], weight, None, None, none), torch.zeros(rows, 6).to(dtype)
            )
        residual = torch.randn(rows, 6).to(dtype)
        y = pruned_linear(x, w, b, none, residual=residual)
        assert torch.equal(y, residual)
        assert y is not residual
    assert pruned_linear(torch.zeros(3, 0), torch.zeros(0, 0)).shape == (3, 0)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_kept_is_not_read(rows, value):
    """A removed weight may hold anything; a kept one shows."""
    for weight in (lambda w: w, input_major):
        x, w, b, out_index, in_index = draw(rows, 40, 70)
        kept = torch.zeros(40, 70, dtype=torch.bool)
        kept[out_index.long()[:, None], in_index.long()] = True
        y = pruned_linear(x, weight(w), b, out_index, in_index)
        assert torch.equal(pruned_linear(x, weight(w.masked_fill(~kept, value)), b, out_index, in_index), y)
        w[out_index[3], in_index[5]] = value
        spoiled = ~pruned_linear(x, weight(w), b, out_index, in_index).isfinite()
        assert spoiled[:, 3].all()
        assert spoiled.sum() == rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_rounding_of_half_types(dtype):
    """Identity weights: every value passes as it is, subnormals, infinities and overflow included."""
    values = [0.0, -0.0, 1.0, -1.0, 6e-8, 1e-7, 6e-5, 65504.0, 3e38, INF, -INF, NAN, 1.0009765625, 0.333]
    x = torch.tensor([values, values[::-1]]).to(dtype)
    for i in range(len(values)):
        y = pruned_linear(x[:, i : i + 1], torch.ones(16, 16).to(dtype)[:, :1])
        assert torch.equal(y.nan_to_num(7.0), x[:, i : i + 1].expand(2, 16).nan_to_num(7.0))
    big = torch.full((1, 16), 60000.0).to(dtype)
    assert torch.equal(pruned_linear(big, torch.ones(16, 16).to(dtype)), (big.double() * 16).to(dtype))


def test_repeats_and_threads_agree():
    before = torch.get_num_threads()
    for rows in (1, 20, 600):
        arguments = draw(rows, 150, 300)
        wanted = pruned_linear(*arguments)
        try:
            for repeat in range(10):
                torch.set_num_threads(1 + repeat % 3)
                assert torch.equal(pruned_linear(*arguments), wanted)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("kept", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("options", ["plain", "residual", "gelu"])
def test_gradcheck(kept, options):
    x, w, b, out_index, in_index = draw(3, 6, 8, 2, 4, kept)
    floats = [t.double().requires_grad_() for t in (x, w, b, torch.randn(3, 6))]
    blocks = {"out_block": 2 if kept[0] else 1, "in_block": 4 if kept[1] else 1}

    def run(x, w, b, r):
        also = {"residual": {"residual": r}, "gelu": {"activation": "gelu"}, "plain": {}}[options]
        return pruned_linear(x, w, b, out_index, in_index, **also, **blocks)

    floats[3].requires_grad_(options == "residual")
    assert torch.autograd.gradcheck(run, floats)
    assert torch.autograd.gradgradcheck(run, floats)


@pytest.mark.parametrize("layout", ["row-major", "input-major"])
def test_gradients_in_float32(layout):
    x, w, b, out_index, in_index = draw(20, 90, 70)
    weight = w if layout == "row-major" else input_major(w)
    grads = []
    for op in (pruned_linear, reference.pruned_linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, b)]
        y = op(*leaves, out_index, in_index)
        y.pow(2).sum().backward()
        grads.append([t.grad for t in leaves])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert grads[0][1].shape == w.shape
    assert grads[0][1].count_nonzero() == out_index.numel() * in_index.numel()


def test_only_the_gradients_that_are_asked_for():
    x, w, b, out_index, in_index = draw(4, 10, 12)
    w.requires_grad_()
    pruned_linear(x, w, b, out_index, in_index).sum().backward()
    assert w.grad is not None
    with torch.no_grad():
        assert not pruned_linear(x, w, b, out_index, in_index).requires_grad


def test_autocast():
    x, w, b, out_index, in_index = draw(4, 10, 12)
    w.requires_grad_()
    residual = torch.randn(4, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pruned_linear(x, w, b, out_index, in_index)
        wanted = reference.pruned_linear(x, w, b, out_index, in_index)
        added = pruned_linear(x, w, b, out_index, in_index, residual=residual)
        curved = pruned_linear(x, w, b, out_index, in_index, activation="gelu")
    torch.testing.assert_close(curved, torch.nn.functional.gelu(wanted))
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted)
    assert added.dtype == torch.float32  # as `residual + linear(x)`
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize(("kept", "block"), [(True, 1), (True, 4), (False, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "f32", "f64"])
def test_autocast_with_a_residual(dtype, kept, block, device, monkeypatch):
    """As exact as ``residual.index_add(linear(x))``, whose dtypes it has, and with its gradients; on a GPU one pass."""
    *arguments, _ = move(device, *draw(9, 40, 24, block, 1, kept=(kept, False)))
    arguments.append(torch.randn(9, 40).to(dtype).to(device))

    def in_one_call(x, w, b, out_index, residual):
        return pruned_linear(x, w, b, out_index, out_block=block, residual=residual)

    def in_two_passes(x, w, b, out_index, residual):
        y = reference.pruned_linear(x, w, b, out_index, out_block=block)
        if out_index is None:
            return residual + y
        return residual.index_add(-1, positions(out_index, block), y.to(residual.dtype))

    with torch.autocast(device.type, dtype=torch.bfloat16), monkeypatch.context() as patch:
        if on_gpu(device) and dtype is not torch.float64:
            patch.setattr(torch.Tensor, "index_add", None, raising=False)
        ours = in_one_call(*arguments)
    rounded = [*to(torch.bfloat16, arguments[:4]), arguments[4]]
    assert_as_exact_as_torch(ours, "pruned_linear", in_two_passes, rounded, {})

    grads = []
    for run in (in_one_call, in_two_passes):
        x, w, b, residual = leaves = [arguments[i].detach().requires_grad_() for i in (0, 1, 2, 4)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = run(x, w, b, arguments[3], residual)
        grads.append(torch.autograd.grad(y.float().pow(2).sum(), leaves))
    for mine, theirs in zip(*grads, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_autocast_with_a_residual_and_repeats():
    x, w, b, _, _ = draw(4, 10, 12, kept=(False, False))
    twice, residual = torch.tensor([3, 3, 0]), torch.randn(4, 10)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = pruned_linear(x, w, b, twice, residual=residual.to(dtype))
            y = reference.pruned_linear(x, w, b, twice)
        wanted = residual.to(dtype).index_add(-1, twice, y.to(dtype))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0.01 * wanted.abs().max().item())


def test_gradients_where_nothing_is_kept():
    none = torch.zeros(0, dtype=torch.int32)
    for out_index, in_index in ((none, None), (None, none), (none, none)):
        for options in ({}, {"activation": "gelu"}, {"residual": torch.randn(3, 10)}):
            grads = []
            for op in (pruned_linear, reference.pruned_linear):
                x, w, b, _, _ = draw(3, 10, 12, kept=(False, False))
                leaves = [
                    t.requires_grad_() for t in (x[:, : 0 if in_index is not None else 12].clone(), w, b)
                ]
                y = op(*leaves, out_index, in_index, **options)
                y.sum().backward()
                grads.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
            for ours, wanted in zip(*grads, strict=True):
                torch.testing.assert_close(ours, wanted)


def test_a_loss_of_gelu_and_its_gradient():
    """Then y's own gradient comes beside gelu's."""
    grads = []
    for op in (pruned_linear, reference.pruned_linear):
        x, w, b, out_index, in_index = (t.double() if t.is_floating_point() else t for t in draw(4, 10, 12))
        leaves = [t.requires_grad_() for t in (x, w, b)]
        y = op(*leaves, out_index, in_index, activation="gelu")
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (y.sum() + grad.pow(2).sum()).backward()
        grads.append([t.grad for t in leaves])
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_opcheck():
    x, w, b, out_index, in_index = draw(4, 10, 12)
    for arguments in (
        (x, w, b, out_index, in_index, 1, 1, None),
        (x, w, None, out_index, in_index, 1, 1, torch.randn(4, 10)),
        (torch.randn(2, 3, 12), w, b, None, None, 1, 1, None),
        (x.double(), w.double(), b.double(), out_index, in_index, 1, 1, None),
        (x[:, :4], w, b, torch.tensor([1]), torch.tensor([2]), 5, 4, None),
        (x, w, b, out_index, in_index, 1, 1, None, True),
    ):
        torch.library.opcheck(torch.ops.mvp_ext.pruned_linear.default, arguments)
        if arguments[7] is None:
            torch.library.opcheck(torch.ops.mvp_ext.pruned_linear_gelu.default, arguments[:7])


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compile(activation):
    x, w, b, out_index, in_index = draw(4, 10, 12)
    w.requires_grad_()

    def run(x, w):
        return pruned_linear(x, w, b, out_index, in_index, activation=activation).relu()

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x, w)
    y.sum().backward()
    ours, w.grad = w.grad, None
    run(x, w).sum().backward()
    assert torch.equal(y, run(x, w))
    torch.testing.assert_close(ours, w.grad)
    with torch.no_grad():  # then the op itself does the activation
        y = torch.compile(run, fullgraph=True, backend="aot_eager")(x, w)
        torch.testing.assert_close(y, run(x, w))


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa):
    run_on(isa, __file__, "(equals_reference and cpu and (f32 or row-major-f16)) or tile or keep or rounding")


X, W = torch.zeros(3, 4), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], W), {}, TypeError, "pruned_linear: x: expected a torch.Tensor, got list"),
        (
            (X.int(), W),
            {},
            TypeError,
            "x: expected dtype float32 or float16 or bfloat16 or float64, got int32",
        ),
        ((X.to_sparse(), W), {}, NotImplementedError, "x: expected a strided tensor"),
        ((X, W.double()), {}, TypeError, "weight: expected dtype float32, got float64"),
        ((X, W[0]), {}, ValueError, r"weight: expected 2 dimensions, got shape \(4,\)"),
        ((X, W.to("meta")), {}, ValueError, "weight: expected device cpu, got meta"),
        ((X[:, :3], W), {}, ValueError, r"x: expected shape \[\.\.\., K\] with K = 4, got \(3, 3\)"),
        ((torch.zeros(()), W), {}, ValueError, r"x: expected shape \[\.\.\., K\] with K = 4, got \(\)"),
        ((X, W, torch.zeros(5)), {}, ValueError, r"bias: expected shape \[O\] = \(6,\), got \(5,\)"),
        (
            (X, W, None, torch.tensor([0.0])),
            {},
            TypeError,
            "out_index: expected dtype int32 or int64, got float32",
        ),
        ((X, W, None, torch.tensor([[0]])), {}, ValueError, "out_index: expected 1 dimensions"),
        ((X, W, None, torch.tensor([6])), {}, ValueError, r"out_index: expected values in \[0, 6\), got 6"),
        ((X, W, None, torch.tensor([-1])), {}, ValueError, r"out_index: expected values in \[0, 6\), got -1"),
        ((X.double(), W.double(), None, torch.tensor([0, 6])), {}, ValueError, r"out_index: .*\), got 6"),
        ((X.double(), W.double(), None, torch.tensor([0, -2])), {}, ValueError, r"out_index: .*\), got -2"),
        ((X, W, None, torch.tensor([3])), {"out_block": 2}, ValueError, r"values in \[0, 3\), got 3"),
        (
            (X[:, :1], W, None, None, torch.tensor([4])),
            {},
            ValueError,
            r"in_index: expected values in \[0, 4\)",
        ),
        (
            (X, W, None, torch.tensor([0])),
            {"out_block": 4},
            ValueError,
            "out_index: expected a divisor of 6, got 4",
        ),
        (
            (X, W),
            {"residual": torch.zeros(3, 5)},
            ValueError,
            r"residual: expected shape \[\.\.\., O\] = \(3, 6\)",
        ),
        ((X, W), {"residual": torch.zeros(3, 6).double()}, TypeError, "residual: expected dtype float32"),
        ((X, W), {"activation": "relu"}, ValueError, "activation: expected None or \"gelu\", got 'relu'"),
        (
            (X, W),
            {"activation": "gelu", "residual": torch.zeros(3, 6)},
            ValueError,
            "activation: expected None beside a residual, got 'gelu'",
        ),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        pruned_linear(*arguments, **options)
