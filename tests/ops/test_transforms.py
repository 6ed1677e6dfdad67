"""Every op under what torch does to calls: transforms of gradients, meta and fake tensors, autocast, odd memory.

The measure is the plain-torch reference under the same transform.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from mvp_ext import ops
from mvp_ext.ops import reference

ROWS, COLUMNS = torch.tensor([2, 0]), torch.tensor([1, 3, 0], dtype=torch.int32)
TWICE = torch.tensor([1, 1, 0])


class Case(NamedTuple):
    op: str
    shapes: tuple[tuple[int, ...], ...]
    """Of the floating tensors, the first arguments."""
    indices: tuple[Tensor | None, ...] = ()
    """The arguments after them."""
    options: dict[str, Any] = {}  # noqa: RUF012
    keywords: tuple[str, ...] = ()
    """Names of floating tensors that are given by name: the last of ``shapes``."""

    def floats(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in self.shapes
        ]

    def call(self, module: Any, *floats: Tensor, indices: tuple[Tensor | None, ...] | None = None) -> Tensor:
        first = floats[: len(floats) - len(self.keywords)]
        named = dict(zip(self.keywords, floats[len(first) :], strict=True))
        indices = self.indices if indices is None else indices
        result: Tensor = getattr(module, self.op)(*first, *indices, **named, **self.options)
        return result

    def of(self, module: Any) -> Callable[..., Tensor]:
        return lambda *floats: self.call(module, *floats)


CASES = {
    "rows": Case("pruned_linear", ((3, 4), (6, 4), (6,)), (ROWS,)),
    "blocks": Case(
        "pruned_linear", ((2, 2, 4), (6, 6), (6,)), (TWICE, ROWS), {"out_block": 2, "in_block": 2}
    ),
    "columns": Case("pruned_linear", ((3, 3), (5, 4), (5,)), (None, COLUMNS)),
    "vector": Case("pruned_linear", ((4,), (6, 4), (6,)), (ROWS,)),
    "gelu": Case("pruned_linear", ((3, 4), (6, 4), (6,)), (ROWS,), {"activation": "gelu"}),
    "stream": Case("pruned_linear", ((3, 4), (6, 4), (6,), (3, 6)), (ROWS,), {}, ("residual",)),
    "whole stream": Case("pruned_linear", ((3, 4), (6, 4), (6,), (3, 6)), (), {}, ("residual",)),
    "filters": Case("pruned_conv2d", ((1, 2, 4, 3), (4, 2, 3, 2), (4,)), (ROWS,), {"padding": 1}),
    "channels": Case("pruned_conv2d", ((1, 3, 4, 3), (4, 4, 1, 2), (4,)), (ROWS, COLUMNS), {"stride": 2}),
    "add": Case("residual_add", ((2, 4, 3), (2, 3, 3)), (COLUMNS,)),
    "add all": Case("residual_add", ((2, 3), (2, 3)), (None,), {"dim": -1}),
    "affine": Case(
        "residual_add",
        ((2, 4, 3), (2, 3, 3), (3,), (3,)),
        (COLUMNS,),
        {"activation": "relu"},
        ("scale", "shift"),
    ),
    "heads": Case("pruned_attention", ((1, 3, 4), (18, 4), (18,), (4, 6), (4,)), (ROWS,), {"num_heads": 3}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def stirred(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A number whose gradient differs from element to element."""
    return lambda *floats: (f(*floats).sin() * 1.5).square().sum()


def arguments_of(floats: list[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(floats)))


def by_dual(f: Callable[..., Tensor], floats: list[Tensor]) -> Any:
    with forward_ad.dual_level():
        y = f(*[forward_ad.make_dual(t, t.cos()) for t in floats])
        primal, tangent = forward_ad.unpack_dual(y)
        return primal, tangent if tangent is not None else torch.zeros_like(primal)


def by_batched_grads(f: Callable[..., Tensor], floats: list[Tensor]) -> Any:
    floats = [t.clone().requires_grad_() for t in floats]
    y = f(*floats)
    many = torch.stack([y.detach().sin(), y.detach().cos()])
    return torch.autograd.grad(y, floats, many, is_grads_batched=True, create_graph=True)


def by_backward_through_vmap(f: Callable[..., Tensor], floats: list[Tensor]) -> Any:
    many = [torch.stack([t, t.sin()]).requires_grad_() for t in floats]
    return torch.autograd.grad(stirred(vmap(f))(*many), many)


def by_second_gradient(f: Callable[..., Tensor], floats: list[Tensor]) -> Any:
    every = arguments_of(floats)
    return grad(lambda *fs: sum(g.square().sum() for g in grad(stirred(f), every)(*fs)), every)(*floats)


# What is done with a function of tensors.
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], list[Tensor]], Any]] = {
    "jvp": lambda f, fs: jvp(f, tuple(fs), tuple(t.cos() for t in fs)),
    "dual": by_dual,
    "jacfwd": lambda f, fs: jacfwd(f, arguments_of(fs))(*fs),
    "jacrev": lambda f, fs: jacrev(f, arguments_of(fs))(*fs),
    "grad": lambda f, fs: grad(stirred(f), arguments_of(fs))(*fs),
    "grad of grad": by_second_gradient,
    "hessian": lambda f, fs: hessian(stirred(f))(*fs),
    "vjp": lambda f, fs: vjp(f, *fs)[1](f(*fs).sin()),
    "vmap of grad": lambda f, fs: vmap(grad(stirred(f), arguments_of(fs)))(
        *[torch.stack([t, t.sin()]) for t in fs]
    ),
    "grad of vmap": lambda f, fs: grad(stirred(vmap(f)), arguments_of(fs))(
        *[torch.stack([t, t.sin()]) for t in fs]
    ),
    "vmap": lambda f, fs: vmap(f)(*[torch.stack([t, t.sin()]) for t in fs]),
    "backward through vmap": by_backward_through_vmap,
    "batched gradients": by_batched_grads,
    "forward jacobian": lambda f, fs: torch.autograd.functional.jacobian(
        f, tuple(fs), strategy="forward-mode", vectorize=True
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


@every_case
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_the_reference_under(case: Case, transform: str) -> None:
    if case.op == "pruned_attention" and transform == "batched gradients":
        pytest.skip("torch has no second derivative of its fused attention")
    act, floats = TRANSFORMS[transform], case.floats()
    torch.testing.assert_close(act(case.of(ops), floats), act(case.of(reference), floats))


@every_case
def test_gradcheck_in_every_mode(case: Case) -> None:
    floats = [t.requires_grad_() for t in case.floats()]
    assert torch.autograd.gradcheck(
        case.of(ops),
        floats,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize(
    ("name", "transform"), [("blocks", "grad"), ("gelu", "vmap"), ("affine", "jvp"), ("channels", "grad")]
)
def test_compiled_transforms(name: str, transform: str) -> None:
    case = CASES[name]
    act, floats = TRANSFORMS[transform], case.floats()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *fs: act(case.of(ops), list(fs)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*floats), act(case.of(reference), floats))


@every_case
@pytest.mark.parametrize("transform", ["grad", "jvp", "plain"])
def test_a_wrong_index_is_an_error(case: Case, transform: str) -> None:
    """Also where no kernel looks at it."""
    act = TRANSFORMS.get(transform, lambda f, fs: f(*fs))
    for at, index in enumerate(case.indices):
        for wrong in [] if index is None else [-1, 6]:
            indices = list(case.indices)
            indices[at] = index.clone()
            indices[at][-1] = wrong
            with pytest.raises(
                ValueError, match=rf"^{case.op}: \w+: expected (values|indices) in \[0, .*got"
            ):
                act(lambda *fs: case.call(ops, *fs, indices=tuple(indices)), case.floats())  # noqa: B023


# ---- what tensors can be


def changes(case: Case, change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """The case's floats, one of them changed, for each; then all of them."""
    floats = case.floats(dtype)
    for at in range(len(floats)):
        yield [change(t) if a == at else t for a, t in enumerate(floats)]
    yield [change(t) for t in floats]


def negative_view(tensor: Tensor) -> Tensor:
    """Equal, but for a bit that says that the memory holds the negative."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


def with_gaps(tensor: Tensor) -> Tensor:
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def turned(tensor: Tensor) -> Tensor:
    return (
        tensor.t().contiguous().t()
        if tensor.ndim == 2
        else tensor.transpose(0, -1).contiguous().transpose(0, -1)
    )


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


MEMORIES = {"negative": negative_view, "gaps": with_gaps, "turned": turned, "expanded": expanded}


@every_case
@pytest.mark.parametrize("memory", MEMORIES)
def test_memory_does_not_matter(case: Case, memory: str) -> None:
    for floats in changes(case, MEMORIES[memory]):
        for leaves in (floats, [t.detach().requires_grad_() for t in floats]):
            got = case.call(ops, *leaves).detach()
            expected = case.call(reference, *[t.clone(memory_format=torch.contiguous_format) for t in floats])
            torch.testing.assert_close(got, expected)


def meta(case: Case, floats: list[Tensor]) -> Tensor:
    move = [t if t is None else t.to("meta") for t in case.indices]
    shaped = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in floats]
    return case.call(ops, *shaped, indices=tuple(move))


def fake(case: Case, floats: list[Tensor]) -> Tensor:
    with FakeTensorMode() as mode:
        indices = tuple(t if t is None else mode.from_tensor(t) for t in case.indices)
        return case.call(ops, *map(mode.from_tensor, floats), indices=indices)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_meta_and_fake_tensors_know_the_result(case: Case, dtype: torch.dtype) -> None:
    for change in (torch.clone, with_gaps, turned, expanded):
        for floats in changes(case, change, dtype):
            real = case.call(ops, *floats)
            for without in (meta(case, floats), fake(case, floats)):
                assert (without.shape, without.dtype) == (real.shape, real.dtype)
                if case.op != "pruned_conv2d":  # whose strides are its library's
                    assert without.stride() == real.stride()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("kept", [(0, 2), (2, 0), (0, 0), (None, 0), (0, None)])
def test_nothing_kept(kept: tuple[int | None, ...], blocks: tuple[int, int], autocast: bool) -> None:
    out_index, in_index = (None if n is None else torch.arange(n) for n in kept)
    inputs = 8 if in_index is None else len(in_index) * blocks[1]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(20, inputs, dtype=dtype, requires_grad=True)
        weight = torch.randn(6, 8, dtype=dtype, requires_grad=True)
        bias = torch.randn(6, dtype=dtype, requires_grad=True)
        options: dict[str, Any] = {"out_block": blocks[0], "in_block": blocks[1]}
        for residual in (None, torch.randn(20, 6, dtype=dtype)):
            for w in (weight, weight.t().contiguous().t()):
                results = []
                for module in (ops, reference):
                    with torch.autocast("cpu", enabled=autocast):
                        y = module.pruned_linear(
                            x, w, bias, out_index, in_index, residual=residual, **options
                        )
                    results.append([y, *torch.autograd.grad(y.sum(), (x, weight, bias))])
                torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@every_case
def test_autocast(case: Case) -> None:
    results = []
    for module in (ops, reference):
        floats = [t.requires_grad_() for t in case.floats(torch.float32)]
        with torch.autocast("cpu"):
            y = case.call(module, *floats)
        results.append([y.float(), *torch.autograd.grad(y.float().sin().sum(), floats)])
    torch.testing.assert_close(*results, rtol=3e-2, atol=6e-2)


# ---- every op, also without gradient

MASKS = torch.tensor([[True, False, True, True], [False, False, True, False]])


def call_vote(weights: Tensor, prior: Tensor) -> Any:
    return ops.meta_vote(MASKS, weights, layers=[2, 2], keep=0.5, prior=prior)[:3]


def call_unpack(part: Tensor, out: Tensor) -> Any:
    out = out if type(out) is not Tensor or not out.untyped_storage().nbytes() else out.clone()
    ops.unpack([part], [out], [ROWS], [None])
    return out


EVERY: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Any]]] = {
    "meta_vote": (((2,), (4,)), call_vote),
    "importance": (((3, 4), (3, 4)), lambda a, g: ops.importance(a, g, kind="taylor")),
    "pack": (((3, 4), (4,)), lambda a, b: ops.pack([a, b], [ROWS, None], [COLUMNS, None])),
    "unpack": (((2, 4), (3, 4)), call_unpack),
    "merge": (
        ((3, 4), (2, 4), (1,)),
        lambda base, part, weights: ops.merge(
            [base], [[part]], [[ROWS]], [[None]], weights, [None], [COLUMNS]
        ),
    ),
    **{f"{case.op} {name}": (case.shapes, case.of(ops)) for name, case in CASES.items()},
}
every_op = pytest.mark.parametrize("name", EVERY)


def drawn(name: str) -> list[Tensor]:
    return [t.abs() for t in Case("", EVERY[name][0]).floats(torch.float32)]


@every_op
def test_the_negative_bit_is_seen(name: str) -> None:
    _, op = EVERY[name]
    expected = op(*drawn(name))
    for at in range(len(drawn(name))):
        floats = drawn(name)
        floats[at] = negative_view(floats[at])
        torch.testing.assert_close(op(*floats), expected)


def test_unpack_into_a_negative_view() -> None:
    behind = torch.zeros(3, 4, dtype=torch.complex64)
    out, part = behind.conj().imag, torch.randn(2, 4)
    ops.unpack([part], [out], [ROWS], [None])
    assert torch.equal(out[ROWS], part)
    assert torch.equal(behind.imag[ROWS], -part)


@every_op
def test_freed_memory_is_an_error(name: str) -> None:
    _, op = EVERY[name]
    for at in range(len(drawn(name))):
        for cut in (False, True):
            floats = drawn(name)
            shape = floats[at].shape
            whole = torch.zeros(2, *shape)
            floats[at] = whole[1] if cut else torch.zeros(shape)
            floats[at].untyped_storage().resize_(0)
            with pytest.raises(ValueError, match=rf"^{name.split()[0]}: [\w\[\]]+: .*storage was freed"):
                op(*floats)


@every_op
def test_fake_beside_real_tensors_is_an_error(name: str) -> None:
    _, op = EVERY[name]
    for at in range(len(drawn(name))):
        floats = drawn(name)
        floats[at] = FakeTensorMode().from_tensor(floats[at])
        with pytest.raises((ValueError, AssertionError), match=r"(?i)fake"):
            op(*floats)


@every_case
def test_a_fake_index_beside_real_tensors_is_an_error(case: Case) -> None:
    for at, index in enumerate(case.indices):
        if index is not None:
            indices = list(case.indices)
            indices[at] = FakeTensorMode().from_tensor(index)
            with pytest.raises((ValueError, AssertionError), match=r"(?i)fake"):
                case.call(ops, *case.floats(torch.float32), indices=tuple(indices))


def test_unpack_refuses_outputs_that_share_memory() -> None:
    wide = torch.zeros(4, 4)
    part = torch.ones(2, 4)
    for out in ([wide[:3], wide[1:]], [wide, wide], [torch.zeros(1, 4).expand(3, 4)] * 1):
        with pytest.raises(ValueError, match=r"^unpack: out\[\d\]: expected"):
            ops.unpack([part] * len(out), out, [ROWS] * len(out), [None] * len(out))
        assert not wide.any()
    ops.unpack([part, part], [wide[:, :2].t()[:2], wide[:, 2:].t()[:2]], [None] * 2, [None] * 2)  # columns
    assert wide.all()
    wide = torch.arange(12.0).reshape(3, 4)
    expected = wide.clone()
    expected[[1, 2]] = wide[:2].clone()
    ops.unpack([wide[:2]], [wide], [torch.tensor([1, 2])], [None])
    assert torch.equal(wide, expected)


# ---- numbers of numpy


@pytest.mark.parametrize("real", [float, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("whole", [int, np.int8, np.int32, np.int64, np.uint8])
def test_numbers_of_numpy(real: Any, whole: Any) -> None:
    layers = [whole(2), whole(2)]
    for keep in (real(0.5), [real(0.5), whole(1)]):
        vote = ops.meta_vote(
            MASKS, layers=layers, keep=keep, temperature=real(0.5), seed=whole(3), align=whole(1)
        )
        assert vote.kept == (1, 1) == ops.kept_units(layers, keep, whole(1))
        assert all(type(count) is int for count in vote.kept)
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    assert ops.importance(x, x, kind="taylor", dim=whole(1), heads=whole(2)).shape == (2,)
    y = ops.pruned_linear(x, w, None, ROWS[1:], ROWS[1:].repeat(2), out_block=whole(2), in_block=whole(2))
    assert y.shape == (2, 2)
    assert ops.residual_add(x, x, None, dim=whole(1)).shape == (2, 4)
    image = torch.randn(1, 1, 5, 5)
    options: dict[str, Any] = {"stride": whole(2), "padding": (whole(1), whole(0)), "dilation": [whole(1)]}
    assert ops.pruned_conv2d(image, torch.ones(1, 1, 3, 3), **options).shape == (1, 1, 3, 2)
    case = CASES["heads"]
    named = Case(case.op, case.shapes, case.indices, {"num_heads": whole(3), "scale": real(0.5)})
    torch.testing.assert_close(named.call(ops, *named.floats()), named.call(reference, *named.floats()))


# ---- errors begin with the op that was called

X, W = torch.zeros(1, 3, 4), torch.zeros(18, 4)
PROJ, IMAGE, FILTERS = torch.zeros(4, 6), torch.zeros(1, 2, 3, 3), torch.zeros(4, 2, 3, 3)


def attention(*arguments: Any, **options: Any) -> Any:
    return ops.pruned_attention(*arguments, **{"num_heads": 3, **options})


ERRORS: list[tuple[str, Callable[[], Any]]] = [
    ("pruned_attention: x: ", lambda: attention(X[..., :3], W, None, PROJ, None, ROWS)),
    ("pruned_attention: qkv_weight: ", lambda: attention(X, W.double(), None, PROJ, None, ROWS)),
    ("pruned_attention: qkv_bias: ", lambda: attention(X, W, torch.zeros(3), PROJ, None, ROWS)),
    ("pruned_attention: proj_weight: ", lambda: attention(X, W, None, PROJ.double(), None, ROWS)),
    ("pruned_attention: proj_bias: ", lambda: attention(X, W, None, PROJ, torch.zeros(3), ROWS)),
    ("pruned_attention: head_index: ", lambda: attention(X, W, None, PROJ, None, ROWS + 1)),
    ("pruned_attention: num_heads: ", lambda: attention(X, W, None, PROJ, None, ROWS, num_heads="3")),
    ("pruned_attention: scale: ", lambda: attention(X, W, None, PROJ, None, ROWS, scale="1")),
    ("pruned_conv2d: out_index: ", lambda: ops.pruned_conv2d(IMAGE, FILTERS, None, ROWS + 2)),
    ("pruned_conv2d: in_index: ", lambda: ops.pruned_conv2d(IMAGE, FILTERS, None, None, ROWS)),
    ("pruned_conv2d: x: ", lambda: ops.pruned_conv2d(IMAGE[..., :2], FILTERS)),
    ("pruned_conv2d: stride: ", lambda: ops.pruned_conv2d(IMAGE, FILTERS, stride=0)),
    ("pruned_conv2d: stride: ", lambda: ops.pruned_conv2d(IMAGE, FILTERS, stride=(1, 1, 1))),
    ("pruned_conv2d: stride: ", lambda: ops.pruned_conv2d(IMAGE, FILTERS, stride=2, padding="same")),
    ("pruned_conv2d: padding: ", lambda: ops.pruned_conv2d(IMAGE, FILTERS, padding="none")),
    ("pruned_conv2d: padding: ", lambda: ops.pruned_conv2d(IMAGE, FILTERS, padding=-1)),
    ("pruned_conv2d: dilation: ", lambda: ops.pruned_conv2d(IMAGE, FILTERS, dilation=1.5)),
    ("meta_vote: keep: ", lambda: ops.meta_vote(MASKS, layers=[2, 2], keep=2.0)),
    ("meta_vote: keep: ", lambda: ops.meta_vote(MASKS, layers=[2, 2], keep=np.float32("nan"))),
    ("meta_vote: layers: ", lambda: ops.meta_vote(MASKS, layers=[0, 4], keep=0.5)),
    ("meta_vote: align: ", lambda: ops.meta_vote(MASKS, layers=[2, 2], keep=0.5, align=0)),
    (
        "meta_vote: seed: ",
        lambda: ops.meta_vote(MASKS, layers=[4], keep=0.5, temperature=1.0, seed="1"),
    ),
    (
        "meta_vote: temperature: ",
        lambda: ops.meta_vote(MASKS, layers=[4], keep=0.5, temperature="1", seed=1),
    ),
    ("kept_units: keep: ", lambda: ops.kept_units([2, 2], 1)),
    ("importance: dim: ", lambda: ops.importance(W, W, kind="taylor", dim=0.5)),
    ("importance: heads: ", lambda: ops.importance(W, W, kind="taylor", heads="2")),
    ("residual_add: dim: ", lambda: ops.residual_add(W, W, None, dim="1")),
    ("pruned_linear: out_block: ", lambda: ops.pruned_linear(X, W, None, ROWS, out_block=1.0)),
]


@pytest.mark.parametrize(("start", "call"), ERRORS)
def test_errors_begin_with_the_op_that_was_called(start: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("weight", [None, W.int(), W[0], W.to("meta")])
def test_errors_under_autocast(weight: Any) -> None:
    with torch.autocast("cpu"), pytest.raises((TypeError, ValueError), match=r"^pruned_linear: weight: "):
        ops.pruned_linear(X, weight)
