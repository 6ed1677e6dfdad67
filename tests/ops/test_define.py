"""The one way round the dispatcher: not taken where something of torch sees or changes calls."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvp_ext.ops import (
    importance,
    merge,
    meta_vote,
    pack,
    pruned_conv2d,
    pruned_linear,
    residual_add,
    unpack,
)

INDEX = torch.tensor([0, 2])


def vote(weights: Tensor) -> Any:
    return meta_vote(torch.ones(4, 6, dtype=torch.bool), weights.flatten()[:4], layers=[2, 4], keep=0.5)[:3]


def unpacked(part: Tensor) -> Tensor:
    out = torch.zeros(4, 4)
    unpack([part[:2]], [out], [INDEX], [None])
    return out


# Name of the op → a call of it by the public function on a float [4, 4].
OPS: dict[str, Callable[[Tensor], Any]] = {
    "meta_vote": vote,
    "importance": lambda x: importance(x, x, kind="taylor"),
    "pack": lambda x: pack([x], [INDEX], [None])[0],
    "unpack": unpacked,
    "merge": lambda x: merge([x], [[x[:2]]], [[INDEX]], [[None]], torch.ones(1), [None], [None])[0],
    "pruned_linear": lambda x: pruned_linear(x, x, None, INDEX),
    "pruned_linear_gelu": lambda x: pruned_linear(x, x.clone().requires_grad_(), activation="gelu").detach(),
    "residual_add": lambda x: residual_add(x, x[:, :2], INDEX),
}
every_op = pytest.mark.parametrize("name", OPS)


def x() -> Tensor:
    return torch.arange(16.0).reshape(4, 4) / 7


def overload(name: str) -> Any:
    return getattr(torch.ops.mvp_ext, name).default


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class FunctionCalls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Watched(Tensor):
    """A subclass that torch asks about every call."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_plain_call_goes_round_the_dispatcher() -> None:
    """Whatever the op is registered for: nothing of the dispatcher is asked."""
    calls: list[tuple[Any, ...]] = []
    real = torch._ops.OpOverload.__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.namespace == "mvp_ext":
            calls.append((self, args))
        return real(self, *args, **kwargs)

    with mock.patch.object(torch._ops.OpOverload, "__call__", spy):
        for op in OPS.values():
            op(x())
            op(torch.nn.Parameter(x()).detach())
        with torch.no_grad():
            pruned_linear(x(), torch.nn.Parameter(x()), None, INDEX)
        assert not calls
        with Calls():
            OPS["pack"](x())
        assert calls


@every_op
def test_modes_see_every_op(name: str) -> None:
    op, expected = OPS[name], OPS[name](x())
    for mode in (Calls(), FunctionCalls()):
        with mode:
            got = op(x())
        assert overload(name) in mode.seen or getattr(torch.ops.mvp_ext, name) in mode.seen
        assert_same(got, expected)


@every_op
def test_a_profiler_sees_every_op(name: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        OPS[name](x())
    assert any(event.key == f"mvp_ext::{name}" for event in profile.key_averages())


@every_op
def test_tracers_see_every_op(name: str) -> None:
    """Else what they trace would be this call's result, forever."""
    op = OPS[name]
    graph = make_fx(op)(x())
    assert any(f"mvp_ext.{name}" in str(node.target) for node in graph.graph.nodes)
    if name in ("pack", "unpack", "merge"):
        # What this tracer does not take: lists with None.
        with pytest.raises(RuntimeError, match="unsupported input list type"):
            torch.jit.trace(op, (x(),), check_trace=False)
    elif name != "pruned_linear_gelu":  # whose gradient is asked for inside, which this tracer does not know
        traced = torch.jit.trace(op, (x(),), check_trace=False)
        assert_same(traced(x() + 1), op(x() + 1))


@every_op
def test_subclasses_see_every_op(name: str) -> None:
    Watched.seen.clear()
    OPS[name](x().as_subclass(Watched))
    seen = [*Watched.seen]
    assert overload(name) in seen or getattr(torch.ops.mvp_ext, name) in seen


def test_a_subclass_among_plain_tensors_is_seen() -> None:
    """In any argument, also within a list."""
    watched = x().as_subclass(Watched)
    for op, name in (
        (lambda: residual_add(x(), watched, None), "residual_add"),
        (lambda: pruned_linear(x(), watched), "pruned_linear"),
        (lambda: pack([x(), watched], [None, None], [None, None]), "pack"),
        (lambda: pack([x()], [INDEX.as_subclass(Watched)], [None]), "pack"),
    ):
        Watched.seen.clear()
        op()
        assert overload(name) in Watched.seen or getattr(torch.ops.mvp_ext, name) in Watched.seen


def test_meta_and_fake_tensors() -> None:
    """Get results of the right shape, dtype and layout, and no kernel reads their memory."""
    index = INDEX.to("meta")
    out = residual_add(torch.empty(2, 4, 3, 3, device="meta"), torch.empty(2, 2, 3, 3, device="meta"), index)
    assert (out.device.type, tuple(out.shape)) == ("meta", (2, 4, 3, 3))
    weight = torch.empty(6, 4, device="meta")
    assert pruned_linear(torch.empty(3, 4, device="meta"), weight, None, index).shape == (3, 2)
    assert pruned_linear(torch.empty(3, 4, device="meta"), weight, activation="gelu").shape == (3, 6)
    assert pack([weight], [index], [index])[0].shape == (2, 2)
    assert importance(weight, weight, kind="taylor").shape == (4,)
    filters = torch.empty(6, 4, 3, 3, device="meta")
    assert pruned_conv2d(torch.empty(1, 2, 5, 5, device="meta"), filters, None, index, index).shape == (
        1,
        2,
        3,
        3,
    )
    with FakeTensorMode():
        fake = torch.empty(2, 4, 3, 3).to(memory_format=torch.channels_last)
        assert residual_add(fake, fake, None).is_contiguous(memory_format=torch.channels_last)
        masks = torch.empty(3, 6, dtype=torch.bool)
        assert meta_vote(masks, layers=[2, 4], keep=0.5).index.shape == (3,)
    assert residual_add(fake, fake, None).is_contiguous(memory_format=torch.channels_last)  # outside its mode


PRIVATE = [
    "torch._C._len_torch_function_stack",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch.get_interpreter_stack",
    "torch._C._functorch.get_unwrapped",
    "torch.autograd._profiler_enabled",
    "torch._C._is_tracing",
    "torch._C._cuda_getCurrentRawStream",
    "torch.autograd.forward_ad._current_level",
]


@pytest.mark.parametrize("name", PRIVATE)
def test_without_a_private_name_of_torch(name: str) -> None:
    """Another version of torch may lack it: mvp_ext imports, and calls go through the dispatcher."""
    code = f"""
import torch, torch.autograd.forward_ad
kept = {name} if hasattr({name.rpartition(".")[0]}, "{name.rpartition(".")[2]}") else None
if kept is not None:
    del {name}
import mvp_ext
from mvp_ext.ops import define
print(define.dispatch_is_observed())
if kept is not None:
    {name} = kept  # torch itself needs it
print(mvp_ext.pack([torch.ones(4, 3)], [torch.tensor([1, 2])], [None])[0].shape)
w = torch.ones(3, 3, requires_grad=True)
mvp_ext.pruned_linear(torch.ones(2, 3), w).sum().backward()
print(w.grad.sum().item(), mvp_ext.residual_add(torch.ones(2, 3), torch.ones(2, 3), None).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    observed, *results = done.stdout.split("\n")
    not_asked = ("RawStream", "_are_functorch", "get_interpreter", "get_unwrapped")
    assert observed == str(not any(part in name for part in not_asked))
    assert results[:2] == ["torch.Size([2, 3])", "18.0 12.0"]


@pytest.mark.parametrize("name", ["meta_vote", "importance", "pruned_linear", "residual_add"])
def test_vmap_is_a_loop(name: str) -> None:
    """Its tensors are wrapped: a kernel would read the memory of all of them as one."""
    many = torch.stack([x(), x() - 1, x().flip(0)])
    got = torch.func.vmap(OPS[name])(many)
    for at in range(3):
        expected = OPS[name](many[at])
        alone = got[at] if isinstance(got, Tensor) else tuple(part[at] for part in got)
        assert_same(alone, tuple(expected) if isinstance(expected, tuple) else expected)
