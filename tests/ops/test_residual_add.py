"""residual_add against its reference: every layout and dtype, gradients, and what goes wrong."""

# ruff: noqa: E501  (the tables of errors read best with a case a line)

from __future__ import annotations

from unittest import mock

import pytest
import torch
from backends import move, needs_exchange, sanitized, skip_float64_on_gpu
from emulator import emulated
from isa import OLDER, run_on
from torch import Tensor

from mvp_ext.ops import reference, residual_add
from mvp_ext.ops._native import native

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (shape, dim): empty, single, primes, around a vector's width, small planes, tokens, more than 2^16 rows.
CASES = [
    ((0, 4, 3, 3), 1), ((2, 0, 3, 3), 1), ((2, 5, 0, 3), 1), ((1, 1, 1, 1), 1), ((2, 7, 5, 3), 1), ((3, 32, 7, 7), 1),
    ((2, 31, 4, 4), 1), ((2, 33, 1, 1), 1), ((2, 64, 6, 5), 1), ((3, 16, 14, 14), 1), ((2, 17, 33), -1), ((1, 9, 384), 2), ((2, 5, 8), 1),
    ((70001, 3), 1), ((5,), 0), ((2, 3, 4, 5), 3), ((1, 2, 3, 4, 5), 2),
]  # fmt: skip


def inputs(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, share: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    channels = shape[dim]
    index = torch.randperm(channels, generator=generator)[: round(channels * share)].sort().values
    small = list(shape)
    small[dim] = len(index)
    residual, y = (
        torch.randn(shape, generator=generator).to(dtype),
        torch.randn(small, generator=generator).to(dtype),
    )
    scale, shift = torch.randn(len(index), generator=generator), torch.randn(len(index), generator=generator)
    return residual, y, index, scale, shift


def assert_close(got: Tensor, residual: Tensor, y: Tensor, index: Tensor | None, **options: object) -> None:
    """At most twice the error of the same expression in the same dtype, both against float64."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = reference.residual_add(residual.double(), y.double(), index, **wide)
    plain = reference.residual_add(residual, y, index, **options)
    assert got.shape == residual.shape
    assert got.dtype == residual.dtype
    if got.numel():
        allowed = 2 * (plain.double() - exact).abs().max() + 1e-12
        assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", sanitized(DTYPES, [torch.float32, torch.bfloat16]), ids=str)
def test_shapes(dtype: torch.dtype, device: torch.device) -> None:
    skip_float64_on_gpu(dtype, device)
    for shape, dim in CASES:
        for share in (0.0, 0.5, 1.0):
            residual, y, index, scale, shift = move(device, *inputs(shape, dim, dtype, share))
            for activation in (None, "relu"):
                for options in ({}, {"scale": scale, "shift": shift}, {"shift": shift}):
                    both = {"activation": activation, "dim": dim, **options}
                    assert_close(residual_add(residual, y, index, **both), residual, y, index, **both)
                    if share == 1.0:
                        assert_close(residual_add(residual, y, None, **both), residual, y, None, **both)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, device: torch.device) -> None:
    skip_float64_on_gpu(dtype, device)
    for shape in ((2, 33, 5, 3), (2, 64, 7, 7), (1, 16, 1, 1), (3, 1, 4, 4)):
        residual, y, index, scale, shift = move(device, *inputs(shape, 1, dtype))
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0)).to(device)
        shuffled = index[order].to(torch.int32)
        last = torch.channels_last
        wide = torch.cat([residual, residual], 3)[..., ::2]
        for stream in (
            residual,
            residual.to(memory_format=last),
            wide,
            residual.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            for term in (y, y.to(memory_format=last)):
                for at in (index, shuffled):
                    for options in ({}, {"scale": scale.half(), "shift": shift, "activation": "relu"}):
                        assert_close(residual_add(stream, term, at, **options), stream, term, at, **options)
    stream = torch.randn(2, 8, 3, 3, device=device).to(memory_format=last)
    assert residual_add(stream, stream, None).is_contiguous(memory_format=last)
    assert residual_add(stream.contiguous(), stream, None).is_contiguous()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_special_values(form: torch.memory_format, device: torch.device) -> None:
    residual = torch.zeros(1, 40, 5, 5, device=device).to(memory_format=form)
    residual[0, :, 0, 0], residual[0, :, 1, 1], residual[0, :, 2, 2] = (
        float("nan"),
        float("-inf"),
        float("inf"),
    )
    y = torch.randn(1, 20, 5, 5, device=device).to(memory_format=form)
    index = torch.arange(0, 40, 2, device=device)
    y[0, 0, 3, 3] = float("nan")
    got = residual_add(residual, y, index, activation="relu")
    assert torch.equal(
        got.nan_to_num(nan=-7),
        reference.residual_add(residual, y, index, activation="relu").nan_to_num(nan=-7),
    )
    # An infinite scale must not leak into the removed channels.
    scale = torch.full((20,), float("inf"), device=device)
    got = residual_add(torch.zeros_like(residual), y, index, scale=scale)
    assert torch.equal(got[:, 1::2], torch.zeros(1, 20, 5, 5, device=device))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients(form: torch.memory_format, activation: str | None) -> None:
    residual, y, index, scale, shift = inputs((2, 5, 3, 2), 1, torch.float64)
    leaves = [t.to(memory_format=form) if t.ndim == 4 else t.double() for t in (residual, y, scale, shift)]
    for leaf in leaves:
        leaf.requires_grad_()

    def run(residual: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return residual_add(residual, y, index, scale=scale, shift=shift, activation=activation)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    assert torch.autograd.gradcheck(lambda r, t: residual_add(r, t, index, activation=activation), leaves[:2])


def test_gradients_of_some_inputs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        residual, y, index, scale, shift = inputs((2, 6, 4, 4), 1, dtype)
        for needed in range(4):
            grads = []
            for op in (residual_add, reference.residual_add):
                leaves = [t.clone() for t in (residual, y, scale, shift)]
                leaves[needed].requires_grad_()
                out = op(leaves[0], leaves[1], index, scale=leaves[2], shift=leaves[3], activation="relu")
                out.float().square().sum().backward()
                grads.append(leaves[needed].grad)
            assert grads[0].dtype == grads[1].dtype
            torch.testing.assert_close(
                grads[0],
                grads[1],
                rtol=2e-2 if dtype is torch.bfloat16 else 1e-5,
                atol=1e-5 if dtype is torch.float32 else 5e-2,
            )
    with torch.no_grad():
        assert not residual_add(residual.requires_grad_(), y, index).requires_grad


@needs_exchange
def test_of_plain_dense_tensors_nothing_is_asked_twice() -> None:
    """One native call checks, makes and fills; where a gradient is wanted, or something is amiss, it leaves it all."""
    residual, y, index, scale, _ = inputs((2, 8, 3, 3), 1, torch.float32)
    expected = reference.residual_add(residual, y, index, activation="relu")
    last = torch.channels_last
    streams = residual.to(memory_format=last), y.to(memory_format=last)
    with mock.patch("mvp_ext.ops.residual_add._check", side_effect=AssertionError("asked twice")):
        assert torch.equal(residual_add(residual, y, index, activation="relu"), expected)
        out = residual_add(*streams, index.int(), activation="relu", dim=-3)
        assert torch.equal(out, expected)
        assert out.is_contiguous(memory_format=last)
        with torch.no_grad():
            assert not residual_add(residual, y.clone().requires_grad_(), index).requires_grad
    assert residual_add(residual, y.clone().requires_grad_(), index).requires_grad
    assert residual_add(residual.clone().requires_grad_(), y, index).requires_grad
    freed = residual.clone()
    freed.untyped_storage().resize_(0)
    for arguments in (
        (freed, y, index, True, 1), (residual, y, None, True, 1), (residual, y, index, True, 4), (residual, y, index, True, -5),
        (residual, y.double(), index, True, 1), (residual, streams[1], index, True, 1), (residual, y, scale, True, 1),
        (residual.long(), y.long(), index, True, 1), (residual, y, index[1:], True, 1), (None, y, index, True, 1),
    ):  # fmt: skip
        assert native().residual_add_plain(*arguments, False, 1) is None


def test_no_alias_and_deterministic(device: torch.device) -> None:
    residual, y, index, scale, shift = move(device, *inputs((4, 64, 56, 56), 1, torch.float32))
    for form in (torch.contiguous_format, torch.channels_last):
        residual = residual.to(memory_format=form)
        before = residual.clone()
        first = residual_add(residual, y, index, scale=scale, shift=shift, activation="relu")
        assert torch.equal(residual, before)
        for _ in range(10):
            assert torch.equal(
                residual_add(residual, y, index, scale=scale, shift=shift, activation="relu"), first
            )


def test_opcheck_and_compile() -> None:
    residual, y, index, scale, shift = inputs((2, 6, 4, 4), 1, torch.float32)
    for form in (torch.contiguous_format, torch.channels_last):
        arguments = (residual.to(memory_format=form), y, index, scale, shift, True, 1)
        torch.library.opcheck(torch.ops.mvp_ext.residual_add.default, arguments)

    def run(residual: Tensor, y: Tensor) -> Tensor:
        return residual_add(residual * 2, y, index, scale=scale, activation="relu") + 1

    leaf = y.clone().requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(residual, leaf)
    compiled.sum().backward()
    expected = y.clone().requires_grad_()
    run(residual, expected).sum().backward()
    torch.testing.assert_close(compiled, run(residual, y))
    torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("schedule", range(1, 5))
def test_schedules(schedule: int) -> None:
    """In whatever order the threads of the CUDA kernels run."""
    for shape, dim in (((2, 33, 5, 3), 1), ((3, 32, 7, 8), 1), ((5, 300), -1), ((5, 4, 64), -1)):
        arguments = inputs(shape, dim, torch.float32)
        with emulated(schedule):
            got = residual_add(*arguments[:3], scale=arguments[3], shift=arguments[4], dim=dim)
        assert torch.equal(got, residual_add(*arguments[:3], scale=arguments[3], shift=arguments[4], dim=dim))


def test_what_a_gpu_does_not_take() -> None:
    with (
        emulated(),
        pytest.raises(TypeError, match="residual: expected float32, float16 or bfloat16 on a GPU"),
    ):
        residual_add(R.double(), Y.double(), AT)
    for index, message in (
        (AT + 1, "index: a value out of range"),
        (AT * 0, "index: a value that comes twice"),
    ):
        with emulated(), pytest.raises(RuntimeError, match=message):
            residual_add(R, Y, index)


R, Y, AT = torch.zeros(2, 4, 3, 3), torch.zeros(2, 2, 3, 3), torch.tensor([1, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("r", Y, AT), {}, TypeError, "residual_add: residual: expected a torch.Tensor, got str"),
        ((R.int(), Y, AT), {}, TypeError, "residual: expected dtype float32 or .*, got int32"),
        ((R, Y.half(), AT), {}, TypeError, "y: expected dtype float32, got float16"),
        ((R, Y[0], AT), {}, ValueError, r"y: expected 4 dimensions, got shape \(2, 3, 3\)"),
        ((R, Y, AT.float()), {}, TypeError, "index: expected dtype int32 or int64, got float32"),
        ((R, Y, AT[None]), {}, ValueError, "index: expected 1 dimensions"),
        ((R, Y, None), {}, ValueError, r"y: expected shape \(2, 4, 3, 3\), got \(2, 2, 3, 3\)"),
        ((R, Y, AT[:1]), {}, ValueError, r"y: expected shape \(2, 1, 3, 3\), got \(2, 2, 3, 3\)"),
        ((R, Y, AT + 1), {}, ValueError, r"residual_add: index: expected indices in \[0, 4\), got 4"),
        ((R, Y, AT - 2), {}, ValueError, r"residual_add: index: expected indices in \[0, 4\), got -1"),
        ((R, Y, AT * 0), {}, ValueError, "residual_add: index: expected no index twice, got 0 again"),
        ((R, Y, AT), {"scale": torch.ones(3)}, ValueError, r"scale: expected shape \[K\] = \(2,\), got \(3,\)"),
        ((R, Y, AT), {"shift": AT}, TypeError, "shift: expected dtype float32"),
        ((R, Y, AT), {"activation": "gelu"}, ValueError, "activation: expected None or \"relu\", got 'gelu'"),
        ((R, Y, AT), {"dim": 4}, ValueError, "dim: expected 1 to 6 dimensions and dim among them, got 4 dimensions, 4"),
        ((R, Y.to("meta"), AT), {}, ValueError, "y: expected device cpu, got meta"),
    ],
)  # fmt: skip
def test_errors(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        residual_add(*arguments, **options)


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa: str) -> None:
    run_on(isa, __file__, "test_shapes or test_layouts or special_values")
