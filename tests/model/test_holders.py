"""After surgery nothing holds an old parameter: not what the optimizers lead to, nor what is around the model."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import nn

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.model.surgery import prune_model
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = tiny_model("test_vit", depth=1, img_size=32)
MASK = Mask.random(find_structure(BASE, "heads+mlp"), 0.5, seed=3, align=1)
CUT = "blocks.0.mlp.fc1.weight"


def trained(model: nn.Module, optimizer: Any) -> Any:
    """The optimizer, after a step of any gradients."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    (optimizer if hasattr(optimizer, "step") else optimizer.base).step()
    return optimizer


class Sam(torch.optim.Optimizer):
    """As in the repositories that implement SAM: groups of the inner optimizer, and states of its own."""

    def __init__(self, params: Any, base: Any, **kwargs: Any) -> None:
        super().__init__(params, {"rho": 0.05, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.detach().clone()
                self.state[p]["more"] = {"list": [p.detach() + 1, (2, p.detach() + 3)], "shape": p.shape}
        self.base_optimizer.step(closure)


class Slow:
    """No Optimizer, but holds one in a list, and slow weights in lists in the order of the groups."""

    def __init__(self, params: Any) -> None:
        self.slow: Any = None
        self.named: Any = None
        self.inner = {"optimizers": [torch.optim.SGD(params, lr=0.1, momentum=0.9)]}

    def step(self) -> None:
        (optimizer,) = self.inner["optimizers"]
        optimizer.step()
        groups = optimizer.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in groups]
        self.pairs = tuple(tuple(p.detach() + 1 for p in group["params"]) for group in groups)
        self.by_id = {id(p): p.detach() + 2 for group in groups for p in group["params"]}


class Slotted:
    __slots__ = ("parameter",)

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter


def with_attributes(model: nn.Module) -> Any:
    """References of every kind, to all parameters."""
    optimizer: Any = torch.optim.AdamW(model.parameters())
    ps = list(model.parameters())
    optimizer.listed, optimizer.pair, optimizer.set = list(ps), (1, [tuple(ps)]), set(ps)
    optimizer.queue, optimizer.keys = deque(ps), {p: i for i, p in enumerate(ps)}
    optimizer.ids, optimizer.slotted = [id(p) for p in ps], [Slotted(p) for p in ps]
    optimizer.buffers = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.register_step_post_hook(lambda *_: [p.grad for p in ps])
    optimizer.register_step_pre_hook(functools.partial(lambda all_, *_: None, list(ps)))
    return optimizer


def lookahead(model: nn.Module) -> Any:
    import_timm()
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, opt="lookahead_adamw", lr=1e-2)
    for _ in range(6):
        trained(model, optimizer)
    return optimizer


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "lookahead": lookahead,
    "sam": lambda m: Sam(m.parameters(), torch.optim.SGD, lr=0.1),
    "slow": lambda m: Slow(list(m.parameters())),
    "attributes": with_attributes,
    "lbfgs before its first step": lambda m: torch.optim.LBFGS(m.parameters()),
    "two": lambda m: [
        trained(m, torch.optim.Muon([p for p in m.parameters() if p.ndim == 2])),
        torch.optim.AdamW([p for p in m.parameters() if p.ndim != 2]),
    ],
    "one for each": lambda m: [trained(m, torch.optim.SGD([p], momentum=0.9)) for p in m.parameters()],
}


def tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """All tensors in what an optimizer holds, by the garbage collector: not by the code that is tested."""
    if id(value) in seen or isinstance(value, (type, type(torch), type(HOLDERS.get), nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    held = gc.get_referents(value)
    for each in held if not callable(value) or hasattr(value, "param_groups") else ():
        yield from tensors_in(each, seen)


@pytest.mark.parametrize("kind", HOLDERS)
def test_nothing_holds_an_old_parameter(kind: str) -> None:
    model = copy.deepcopy(BASE)
    optimizer = HOLDERS[kind](model)
    if not isinstance(optimizer, list) and "before" not in kind:
        trained(model, optimizer)
    shapes = {p.shape for p in model.parameters()}
    state = model.state_dict(keep_vars=True)
    cut = set(MASK.index_in(find_structure(model, "heads+mlp")))
    old = {name: weakref.ref(state[name]) for name in cut}
    dense = {state[name].shape for name in cut} - {state[name].shape for name in set(state) - cut}
    assert any(t.shape in dense for t in tensors_in(optimizer, set()))
    del state
    prune_model(model, MASK, optimizer=optimizer)
    gc.collect()
    assert {name for name, reference in old.items() if reference() is not None} == set()
    assert [t.shape for t in tensors_in(optimizer, set()) if t.shape in dense and t.shape in shapes] == []
    before = model.get_parameter(CUT).detach().clone()
    for each in optimizer if isinstance(optimizer, list) else [optimizer]:
        if "before" not in kind:
            trained(model, each)
    if "before" in kind:
        optimizer.step(
            lambda: sum(p.square().sum() for p in model.parameters())
        )  # no gradients: a step of none
    else:
        assert not torch.equal(before, model.get_parameter(CUT))


def test_references_are_the_new_parameters_in_their_places() -> None:
    model = copy.deepcopy(BASE)
    optimizer = trained(model, with_attributes(model))
    groups = optimizer.param_groups
    ids = [id(groups), id(groups[0]), id(groups[0]["params"]), id(optimizer.state), id(optimizer.listed)]
    prune_model(model, MASK, optimizer=optimizer)
    now = list(model.parameters())
    assert ids == [
        id(groups),
        id(groups[0]),
        id(groups[0]["params"]),
        id(optimizer.state),
        id(optimizer.listed),
    ]
    for held in (
        groups[0]["params"],
        optimizer.listed,
        optimizer.pair[1][0],
        optimizer.queue,
        optimizer.keys,
        [each.parameter for each in optimizer.slotted],
        optimizer.state,
    ):
        assert [id(p) for p in held] == [id(p) for p in now]
    assert optimizer.ids == [id(p) for p in now]
    assert optimizer.set == set(now)
    assert [t.shape for t in optimizer.buffers.values()] == [p.shape for p in now]


# ---- refused


def stepped_lbfgs(model: nn.Module) -> Any:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    x = tiny_images(model, batch=1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer


def forgotten_count(model: nn.Module) -> Any:
    optimizer = stepped_lbfgs(model)
    optimizer.state.clear()
    return optimizer


def flat(model: nn.Module) -> Any:
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.buffer = torch.zeros(sum(p.numel() for p in model.parameters()))
    return optimizer


def view(model: nn.Module) -> Any:
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.get_parameter(CUT)]["view"] = model.get_parameter(CUT).detach()
    return optimizer


def statistics(model: nn.Module) -> Any:
    """[n, n] of each side, as in Shampoo: of a square weight they have its shape."""
    square = model.get_parameter("blocks.0.attn.proj.weight")
    other = model.get_parameter("head.weight")
    optimizer: Any = torch.optim.SGD([square, other], lr=0.1)
    for p in (square, other):
        optimizer.state[p]["sides"] = [torch.eye(n) for n in p.shape]
    return optimizer


def bound(model: nn.Module) -> Any:
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero = model.get_parameter(CUT).zero_
    return optimizer


def weak(model: nn.Module) -> Any:
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.refs = [weakref.ref(p) for p in model.parameters()]
    return optimizer


def copies(model: nn.Module) -> Any:
    """Copies in another precision are trained, in a wrapper that knows the model's own."""
    wrapper: Any = Slow(list(model.parameters()))
    wrapper.halves = list(model.parameters())
    masters = [nn.Parameter(p.detach().double()) for p in wrapper.halves[1:]]
    wrapper.inner = torch.optim.SGD([wrapper.halves[0], *masters], lr=0.1)
    return wrapper


def other_model(model: nn.Module) -> Any:
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    teacher = nn.Linear(2, 2)
    teacher.weight = model.get_parameter(CUT)
    optimizer.teacher = teacher
    return optimizer


def two_orders(model: nn.Module) -> Any:
    """Two groups of one parameter each, of one shape, and a list that may belong to either."""
    pair = [model.get_parameter(CUT), model.get_parameter("blocks.0.attn.qkv.weight")]
    optimizer: Any = torch.optim.SGD([{"params": [p]} for p in pair], lr=0.1)
    optimizer.list = [torch.zeros_like(pair[0])]
    return optimizer


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "lbfgs": (stepped_lbfgs, r"LBFGS: state 'd' of .*optimizer\.state\[.*\]\['d'\]"),
    "count": (forgotten_count, r"optimizer\._numel_cache: expected no count"),
    "flat": (flat, r"optimizer\.buffer: expected numbers, or states of a parameter, got a tensor of shape"),
    "view": (view, rf"optimizer\.state\[{CUT}\]\['view'\]: expected no tensor that shares memory with {CUT}"),
    "statistics": (statistics, r"state \['sides'\]\[0\] of head\.weight: expected a number or shape"),
    "bound method": (
        bound,
        r"optimizer\.zero\.<referent>: expected no parameter that is cut, got .*fc1\.weight",
    ),
    "weak references": (weak, r"optimizer\.refs\[\d+\]\.<referent>: expected no parameter that is cut"),
    "copies": (copies, r"optimizer\.halves\[\d+\]: expected an optimizer that trains what it holds"),
    "another model": (
        other_model,
        r"optimizer\.teacher\.weight: expected a model of its own, got one that shares",
    ),
    "two orders": (two_orders, r"optimizer\.list: expected states in one order"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_cut_changes_nothing(kind: str) -> None:
    make, message = REFUSED[kind]
    model = copy.deepcopy(BASE)
    optimizer = make(model)
    before = [(id(t), t.clone()) for t in model.state_dict(keep_vars=True).values()]
    held = [(id(t), t.clone()) for t in tensors_in(optimizer, set())]
    with pytest.raises(UnsupportedModelError, match=message):
        prune_model(model, MASK, optimizer=optimizer)
    for saved, now in (
        (before, model.state_dict(keep_vars=True).values()),
        (held, tensors_in(optimizer, set())),
    ):
        assert all(i == id(t) and torch.equal(v, t) for (i, v), t in zip(saved, now, strict=True))


def test_what_is_no_optimizer_is_refused() -> None:
    model = copy.deepcopy(BASE)
    with pytest.raises(TypeError, match=r"optimizer: expected an optimizer \(with param_groups\).*, got str"):
        prune_model(model, MASK, optimizer="adamw")
    with pytest.raises(TypeError, match=r"optimizer\[0\]: expected an optimizer .*, got VisionTransformer"):
        prune_model(model, MASK, optimizer=[model])
    with pytest.raises(ValueError, match=r"optimizer SGD: expected an optimizer of this model"):
        prune_model(model, MASK, optimizer=torch.optim.SGD(copy.deepcopy(model).parameters()))
    with pytest.raises(TypeError, match=r"ema: expected a model, or a wrapper with one in \.module, got int"):
        prune_model(model, MASK, ema=3)
    with pytest.raises(ValueError, match="ema: expected another model"):
        prune_model(model, MASK, ema=model)


def test_an_optimizer_that_is_not_given_is_missed() -> None:
    model = copy.deepcopy(BASE)
    flat_ones = torch.optim.SGD([p for p in model.parameters() if p.ndim == 1])
    rest = torch.optim.SGD([p for p in model.parameters() if p.ndim != 1])
    missed = r"a live SGD has blocks\.0\.attn\.qkv\.weight in param_groups\[0\]\['params'\]\[\d\]"
    with pytest.raises(UnsupportedModelError, match=missed):
        prune_model(model, MASK, optimizer=flat_ones)
    del flat_ones
    with pytest.warns(UserWarning, match=missed):
        prune_model(model, MASK)
    del rest


def test_an_optimizer_that_has_done_its_work_is_not_missed() -> None:
    for optimizer in (None, []):
        model = copy.deepcopy(BASE)
        old = torch.optim.SGD(model.parameters())
        # Gone, but in a cycle: the collector has not come yet.
        old.cycle = old  # type: ignore[attr-defined]
        if optimizer is None:
            del old
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prune_model(model, MASK, optimizer=optimizer)


# ---- around the model, and on its parameters


def test_compiled_and_parallel_models_are_cut_inside() -> None:
    model = copy.deepcopy(BASE)
    x = tiny_images(model, batch=2)
    plain = prune_model(copy.deepcopy(BASE), MASK).eval()
    compiled = torch.compile(model.eval(), backend="eager")
    compiled(x)
    optimizer = torch.optim.SGD(compiled.parameters())
    average = torch.optim.swa_utils.AveragedModel(nn.DataParallel(copy.deepcopy(BASE)))
    assert prune_model(compiled, MASK, optimizer=optimizer, ema=average) is compiled
    for each in (compiled, average.eval(), prune_model(nn.DataParallel(copy.deepcopy(BASE)), MASK).eval()):
        torch.testing.assert_close(each(x), plain(x))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.usefixtures("one_process")
def test_distributed_models_are_refused() -> None:
    model = copy.deepcopy(BASE)
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = dict(model.state_dict(keep_vars=True))
    # Its wrapper is found, too, where the model is given without it.
    for each in (wrapped, model):
        with pytest.raises(UnsupportedModelError, match=r"model: expected .* not in DistributedDataParallel"):
            prune_model(each, MASK)
    with pytest.raises(UnsupportedModelError, match=r"ema: expected .* not in DistributedDataParallel"):
        prune_model(copy.deepcopy(BASE), MASK, ema=wrapped)
    assert all(before[name] is t for name, t in model.state_dict(keep_vars=True).items())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.usefixtures("one_process")
def test_sharded_models_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = copy.deepcopy(BASE)
    structure = find_structure(model, "heads+mlp")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        UnsupportedModelError, match=r"model: expected .* not in FSDPModule, .* parameters are shards"
    ):
        prune_model(model, MASK, structure=structure)


def test_hooks_and_marks_go_over() -> None:
    model = copy.deepcopy(BASE)
    weight: Any = model.get_parameter(CUT)
    calls: list[tuple[int, ...]] = []
    weight.register_hook(lambda grad: grad * 2)
    handle = weight.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.shape)))
    weight.hess, weight.note = torch.ones_like(weight), "mine"
    prune_model(model, MASK)
    new: Any = model.get_parameter(CUT)
    assert new.note == "mine"
    assert new.hess.shape == new.shape
    new.sum().backward()
    assert calls == [tuple(new.shape)]
    assert bool((new.grad == 2).all())
    handle.remove()
    new.sum().backward()
    assert len(calls) == 1


def test_a_mark_of_another_shape_is_refused() -> None:
    model = copy.deepcopy(BASE)
    model.get_parameter(CUT).scale = torch.ones(7)  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=rf"{CUT}.scale.* expected a number or shape"):
        prune_model(model, MASK)


def test_weights_that_share_memory_are_refused() -> None:
    """Two parameters, one memory: tied, though they are different objects. Parts of one buffer are not."""
    model: Any = copy.deepcopy(BASE)
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    whole = copy.deepcopy(BASE)
    torch.testing.assert_close(
        prune_model(model, MASK).state_dict(), prune_model(whole, MASK).state_dict(), rtol=0, atol=0
    )
    model = copy.deepcopy(BASE)
    model.tied = nn.Parameter(model.get_parameter(CUT).detach()[3:])
    with pytest.raises(UnsupportedModelError, match=rf"{CUT}: its memory is also that of tied"):
        prune_model(model, MASK, structure=find_structure(BASE, "heads+mlp"))
    with pytest.raises(ValueError, match=rf"no scope of this model .*{CUT}: its memory is also that of tied"):
        prune_model(model, MASK)
