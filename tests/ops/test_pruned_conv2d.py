"""pruned_conv2d against its reference."""

import contextlib
import sys

import pytest
import torch
from emulator import emulated
from isa import OLDER, run_on
from pruned_helpers import BY_NAME, FLOATS, assert_as_exact_as_torch, draw_index, generator, to

from mvp_ext.ops import pruned_conv2d, reference


def draw(filters, channels, kernel, kept_filters, kept_channels, batch=2, size=9, seed=0):
    """x, weight, bias, out_index, in_index; a kept count of None keeps all without an index."""
    g = generator(seed)
    return [
        torch.randn(batch, channels if kept_channels is None else kept_channels, size, size + 1, generator=g),
        torch.randn(filters, channels, *kernel, generator=g),
        torch.randn(filters, generator=g),
        None if kept_filters is None else draw_index(filters, kept_filters, seed),
        None if kept_channels is None else draw_index(channels, kept_channels, seed + 1, torch.int64),
    ]


SIZES = [
    (1, 1, (1, 1), 1, 1),
    (33, 31, (3, 3), 13, 32 // 2),
    (8, 16, (1, 1), None, 7),
    (16, 8, (3, 1), 5, None),
    (7, 3, (7, 7), None, None),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=BY_NAME)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(size, dtype):
    for options in ({}, {"stride": 2, "padding": (3, 1), "dilation": 1}, {"padding": "same"}):
        for channels_last in (False, True):
            arguments = to(dtype, draw(*size))
            if channels_last:
                arguments[0] = arguments[0].contiguous(memory_format=torch.channels_last)
                arguments[1] = arguments[1].contiguous(memory_format=torch.channels_last)
            y = pruned_conv2d(*arguments, **options)
            assert_as_exact_as_torch(y, "pruned_conv2d", reference.pruned_conv2d, arguments, options)
    torch.testing.assert_close(
        pruned_conv2d(*arguments[:2], None, *arguments[3:]),
        reference.pruned_conv2d(*arguments[:2], None, *arguments[3:]),
    )


def test_the_cuda_kernel_cuts_the_same():
    x, weight, bias, out_index, in_index = draw(7, 9, (3, 2), 4, 5)
    results = []
    for way in (contextlib.nullcontext, emulated):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with way():
            y = pruned_conv2d(*leaves, out_index, in_index, padding=1)
            with torch.no_grad():
                # By a kernel of its own, where there is no gradient.
                torch.testing.assert_close(pruned_conv2d(*leaves, out_index, in_index, padding=1), y)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def no_library(monkeypatch):
    """Whatever the kernel does not do fails."""
    monkeypatch.setattr(sys.modules[pruned_conv2d.__module__], "F", None)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (4, 4)], ids=str)
@pytest.mark.parametrize("kept", [(None, None), (5, None), (None, 7), (37, 33)], ids=str)
def test_the_kernel_of_small_images(kernel, kept, monkeypatch):
    no_library(monkeypatch)
    for batch, size, threads in ((1, 6, 1), (2, 5, 2), (3, 4, 5)):
        for stride, padding, dilation in ((1, 0, 1), (1, 1, 1), (2, 3, 1), (2, 2, 2), (3, 4, 2)):
            x, *others = draw(40, 35, kernel, *kept, batch=batch, size=size)
            options = {"stride": stride, "padding": padding, "dilation": dilation}
            before = torch.get_num_threads()
            for form in (torch.contiguous_format, torch.channels_last):
                torch.set_num_threads(threads)
                y = pruned_conv2d(x.contiguous(memory_format=form), *others, **options)
                torch.set_num_threads(before)
                expected = reference.pruned_conv2d(x, *others, **options)
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
                assert y.is_contiguous(memory_format=form)


def test_the_kernel_does_not_ask_for_the_default_dtype(monkeypatch):
    no_library(monkeypatch)
    x, *others = draw(6, 8, (3, 3), 3, 4, batch=1, size=5)
    try:
        torch.set_default_dtype(torch.float64)
        y = pruned_conv2d(x, *others)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(y, reference.pruned_conv2d(x, *others))


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa):
    run_on(isa, __file__, "small_images")


def test_the_library_does_what_is_too_much_for_the_kernel(monkeypatch):
    module = sys.modules[pruned_conv2d.__module__]
    monkeypatch.setattr(module, "_by_kernel", lambda *_: pytest.fail("by the kernel"))
    index = torch.tensor([1])
    for x, weight, options in (
        (torch.ones(2, 1, 12, 12), torch.ones(2, 1, 1, 1), {}),
        (torch.ones(1, 1, 2, 3), torch.ones(2, 1, 1, 1), {"padding": 4, "stride": 3}),
        (torch.ones(1, 1, 4, 8)[..., ::2], torch.ones(2, 1, 3, 3), {}),
        (torch.ones(1, 1, 3, 3).double(), torch.ones(2, 1, 3, 3).double(), {}),
        (torch.ones(1, 1, 3, 3), torch.ones(2, 1, 1, 1), {"dilation": 2**40}),
        (torch.ones(1, 1, 3, 3), torch.ones(2, 1, 3, 3).requires_grad_(), {}),
    ):
        y = pruned_conv2d(x, weight, None, index, **options)
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight[1:], **options))
    with pytest.raises(ValueError, match="at least the height and width"):
        pruned_conv2d(torch.ones(1, 1, 3, 3), torch.ones(2, 1, 4, 1), None, index)
    for wrong in ({"stride": 2**70}, {"dilation": 2**70}, {"padding": 2**70}):
        with pytest.raises((OverflowError, RuntimeError, TypeError, ValueError)):
            pruned_conv2d(torch.ones(1, 1, 3, 3), torch.ones(2, 1, 3, 3), None, index, **wrong)


def test_filters_of_larger_images_are_derived_and_cast():
    x, weight, bias, out_index, _ = draw(6, 4, (3, 3), 3, None, size=14)
    results = []
    for op in (pruned_conv2d, reference.pruned_conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = op(*leaves, out_index, None)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results)
    with torch.autocast("cpu", torch.bfloat16):
        assert pruned_conv2d(x, weight, bias, out_index).dtype is torch.bfloat16


def test_sizes_of_nothing():
    x, weight, bias, out_index, in_index = draw(6, 8, (3, 3), 3, 4)
    assert pruned_conv2d(x, weight, bias, out_index[:0], in_index, padding=1).shape == (2, 0, 9, 10)
    y = pruned_conv2d(x[:, :0], weight, bias, out_index, in_index[:0], stride=2)
    assert torch.equal(y, bias[out_index.long()][None, :, None, None].expand(2, 3, 4, 4))
    assert torch.equal(
        pruned_conv2d(x[:, :0], weight, None, out_index, in_index[:0]), torch.zeros(2, 3, 7, 8)
    )
    assert pruned_conv2d(x[:0], weight, bias, out_index, in_index).shape == (0, 3, 7, 8)


def test_gradcheck():
    x, weight, bias, out_index, in_index = draw(4, 5, (3, 2), 2, 3, batch=1, size=4)
    floats = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *f: pruned_conv2d(*f, out_index, in_index, padding=1), floats)
    pruned_conv2d(*floats, out_index, in_index).sum().backward()
    assert floats[1].grad.shape == weight.shape
    assert floats[1].grad.abs().sum((1, 2, 3)).nonzero().flatten().tolist() == out_index.tolist()


def test_compile():
    arguments = draw(6, 8, (3, 3), 3, 4)
    compiled = torch.compile(pruned_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, padding=1), pruned_conv2d(*arguments, padding=1))


X, W = torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], W), ValueError, "pruned_conv2d: x: expected 4 dimensions"),
        ((X, W[0]), ValueError, "weight: expected 4 dimensions"),
        ((X, W.double()), TypeError, "weight: expected dtype float32, got float64"),
        ((X, W, torch.zeros(4)), ValueError, r"bias: expected shape \[O\] = \(6,\), got \(4,\)"),
        ((X[:, :3], W), ValueError, r"x: expected shape .* with K = 4, got \(1, 3, 5, 5\)"),
        ((X, W, None, torch.tensor([0.0])), TypeError, "out_index: expected dtype int32 or int64"),
        ((X, W, None, torch.tensor([6])), ValueError, r"expected indices in \[0, 6\), got 6"),
        ((X[:, :1], W, None, None, torch.tensor([-1])), ValueError, r"expected indices in \[0, 4\), got -1"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        pruned_conv2d(*arguments)
