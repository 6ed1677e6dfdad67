"""Who else holds a model's tensors: optimizers, whatever wraps them, and modules around the model.

Surgery puts new parameters in the place of old ones, and what still has an old one then trains a tensor that nobody
reads, without a word. So everything that can be reached from the optimizers is looked through before anything changes:
each place that holds an old parameter gets the new one, each state is cut like the parameter it belongs to, and what is
not understood is refused by its name. There is no list of optimizers that can be cut.
"""

from __future__ import annotations

import gc
import sys
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mvp_ext.model.mask import RowsCols
from mvp_ext.model.structure import UnsupportedModelError, storage_of

# Gives what stands in a place after surgery.
Later = Callable[[], Any]
# Nothing in them leads to a parameter, or what does (a class, a module's globals) is no optimizer's.
_LEAVES = (str, bytes, bool, float, complex, type, types.ModuleType, types.CodeType)
_SHARDED = {
    "DistributedDataParallel": "its buckets hold the old parameters",
    "FullyShardedDataParallel": "it holds shards of the old parameters",
    "FSDPModule": "its parameters are shards",
}


class Holders:
    """One search, from all optimizers of a model.

    Args:
        model: with the old tensors.
        kept: of every tensor that is cut, what stays; by its name in the model's state dict.
        add: takes a tensor that is cut alike; what it returns gives the small one, later.
    """

    def __init__(
        self,
        model: nn.Module,
        kept: Mapping[str, RowsCols],
        add: Callable[[Tensor, RowsCols], Later],
    ) -> None:
        state = model.state_dict(keep_vars=True)
        self.add = add
        self.kept = {id(state[name]): rows_cols for name, rows_cols in kept.items()}
        # Old tensor's id → new tensor, once it is made (``replace``).
        self.new: dict[int, Tensor] = {}
        self.parts = set(map(id, model.modules()))
        self.named: dict[str, Tensor] = dict(model.named_parameters())
        self.names = {id(tensor): name for name, tensor in [*state.items(), *self.named.items()]}
        self.memory = {place: name for name in kept if (place := storage_of(state[name])) is not None}
        # Everything that is trained, and in which orders.
        self.trained = {id(parameter): parameter for parameter in self.named.values()}
        self.orders: list[list[Tensor]] = [list(self.named.values())]
        self.roots: dict[int, bool] = {}
        self.cut: dict[int, tuple[Tensor, Later]] = {}
        self.seen: dict[int, Any] = {}
        # What belongs to the parameters comes before what only leads to them.
        self.todo: dict[bool, deque[tuple[str, Any, _Owner | None]]] = {True: deque(), False: deque()}
        self.edits: list[Callable[[], None]] = []
        self.doubts: list[str] = []
        self.counts: list[str] = []
        self.pointer = ""
        self.within = ""

    def search(self, optimizers: Sequence[tuple[str, Any]]) -> None:
        """Look through optimizers, each with its name for messages; UnsupportedModelError if one cannot be cut."""
        parts = [(path, optimizer, list(_optimizers_in(optimizer))) for path, optimizer in optimizers]
        for path, optimizer, inside in parts:
            if not inside:
                raise TypeError(
                    f"prune_model: {path}: expected an optimizer (with param_groups), or a list of them, got "
                    f"{type(optimizer).__name__}"
                )
            trained = [parameter for each in inside for parameter in self._trained_by(each)]
            self.roots[id(optimizer)] = any(id(parameter) in self.kept for parameter in trained)
            if not any(id(parameter) in self.names for parameter in trained):
                raise ValueError(
                    f"prune_model: {path} {type(optimizer).__name__}: expected an optimizer of this model, got "
                    "one that has none of its parameters"
                )
        for path, optimizer, _ in parts:
            self.within = f"{path} {type(optimizer).__name__}"
            self.doubts, self.counts, self.pointer = [], [], ""
            own = self.roots[id(optimizer)]
            self.follow(path, optimizer, own=own)
            if self.doubts:
                raise UnsupportedModelError(self.doubts[0])
            if self.counts:
                raise UnsupportedModelError(f"prune_model: {self.within}: {self.counts[0]}")
            if self.pointer and not own:
                self._refuse(
                    self.pointer,
                    "expected an optimizer that trains what it holds, got a parameter that is cut",
                )

    def _trained_by(self, optimizer: Any) -> list[Tensor]:
        groups = [list(group["params"]) for group in optimizer.param_groups]
        trained = [parameter for group in groups for parameter in group]
        self.trained.update((id(parameter), parameter) for parameter in trained)
        self.orders += [trained, *groups]
        return trained

    def follow(self, path: str, value: Any, owner: Tensor | None = None, *, own: bool) -> Later | None:
        """Look through ``value`` and all that it leads to.

        Args:
            path: what leads to it, for messages.
            value: of any kind.
            owner: the parameter whose state it is.
            own: whether its tensors belong to the parameters, so that each must be understood; else only places that
                hold an old parameter count.

        Returns:
            What has to stand in its place; None if it can stay, and then everything inside that has to change is noted.
        """
        later = self._value(path, value, None if owner is None else _Owner(owner, path), own)
        while self.todo[True] or self.todo[False]:
            belongs = bool(self.todo[True])
            self._inside(*self.todo[belongs].popleft(), belongs)
        return later

    def marks(self, name: str, parameter: Tensor) -> dict[str, Later | None]:
        """What has to be done with a parameter's own attributes, and that its hooks point to nothing old."""
        self.within = name
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            self.follow(f"{name}.{hooks}", getattr(parameter, hooks, None), own=False)
        return {
            key: self.follow(f"{name}.{key}", value, parameter, own=True)
            for key, value in vars(parameter).items()
        }

    def replace(self, old: Tensor, new: Tensor, marks: Mapping[str, Later | None]) -> None:
        """``new`` stands for ``old`` from now on, with its marks and hooks."""
        self.new[id(old)] = new
        if isinstance(old, nn.Parameter):
            new.__dict__.update(old.__dict__)
            self.edits += [
                partial(_put, new.__dict__, key, later) for key, later in marks.items() if later is not None
            ]
            for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                if getattr(old, hooks, None):
                    # The same dictionary, so that handles still remove from it.
                    setattr(new, hooks, getattr(old, hooks))

    def missed(self, optimizer: Any) -> str:
        """Words about the first old parameter in an optimizer that was not reached; empty if there is none."""
        for i, group in enumerate(getattr(optimizer, "param_groups", ())):
            for j, parameter in enumerate(() if id(group) in self.seen else group["params"]):
                if id(parameter) in self.kept:
                    kind = type(optimizer).__name__
                    return f"{kind} has {self._name(parameter)} in param_groups[{i}]['params'][{j}]"
        return ""

    def apply(self) -> None:
        """Every place gets its new value."""
        for edit in self.edits:
            edit()

    # ---- values

    def _value(self, path: str, value: Any, owner: _Owner | None, own: bool) -> Later | None:
        if isinstance(value, Tensor):
            return self._tensor(path, value, owner, own)
        if type(value) is int:
            return (lambda: id(self.new[value])) if value in self.kept else None
        if value is None or isinstance(value, _LEAVES) or id(value) in self.seen:
            return None
        if isinstance(value, torch.Size) and owner is not None and value == owner.parameter.shape:
            old = id(owner.parameter)
            return (lambda: self.new[old].shape) if old in self.kept else None
        if isinstance(value, (tuple, frozenset)):
            items = self._items(path, list(value), owner, own)
            if not any(items):
                return None
            make = getattr(value, "_make", type(value))
            return lambda: make(
                [x if later is None else later() for x, later in zip(value, items, strict=True)]
            )
        # Kept alive, or another object might get its id.
        self.seen[id(value)] = value
        self.todo[own].append((path, value, owner))
        return None

    def _tensor(self, path: str, tensor: Tensor, owner: _Owner | None, own: bool) -> Later | None:
        key = id(tensor)
        if key in self.kept:
            self.pointer = self.pointer or path
            return lambda: self.new[key]
        if not own:
            return None
        place = storage_of(tensor)
        if place in self.memory and key not in self.names:
            self._refuse(path, f"expected no tensor that shares memory with {self.memory[place]}, got one")
        if key in self.trained or key in self.names or tensor.numel() <= 1:
            return None
        if owner is None:
            self._refuse(
                path,
                f"expected numbers, or states of a parameter, got a tensor of shape {tuple(tensor.shape)} that belongs "
                "to none, which cannot be cut",
            )
        parameter = owner.parameter
        kept = self.kept.get(id(parameter))
        plain = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter, type(parameter))
        if tensor.shape != parameter.shape or not plain:
            got = tuple(tensor.shape) if plain else f"a {tensor.layout} {type(tensor).__name__}"
            message = (
                f"prune_model: {self.within}: state {owner.key(path)} of {self._name(parameter)}: expected a number or "
                f"shape {tuple(parameter.shape)}, got {got}, which cannot be cut ({path})"
            )
            if kept is not None:
                raise UnsupportedModelError(message)
            # Of a parameter that stays. But if such a state may have a parameter's shape by chance (a square matrix of
            # statistics beside a square weight), those of others cannot be told apart.
            self.doubts.append(message)
        if kept is None:
            return None
        if key not in self.cut:
            self.cut[key] = tensor, self.add(tensor.detach(), kept)
        return self.cut[key][1]

    def _items(self, path: str, items: list[Any], owner: _Owner | None, own: bool) -> list[Later | None]:
        """What has to stand in a sequence's places."""
        owners: Sequence[_Owner | None] = [owner] * len(items)
        if own and owner is None:
            owners = self._parallel(path, items) or owners
        return [
            self._value(f"{path}[{i}]", item, owner, own)
            for i, (item, owner) in enumerate(zip(items, owners, strict=True))
        ]

    def _parallel(self, path: str, items: list[Any]) -> list[_Owner] | None:
        """The parameters whose states a list holds, in an order in which they are trained; None if it does not."""
        if any(not isinstance(item, (Tensor, types.NoneType)) or id(item) in self.trained for item in items):
            return None
        fitting = [
            order
            for order in self.orders
            if len(order) == len(items)
            and all(item is None or item.shape == p.shape for item, p in zip(items, order, strict=True))
        ]
        for order in fitting[1:]:
            if any(
                item is not None and self.kept.get(id(a)) is not self.kept.get(id(b))
                for item, a, b in zip(items, fitting[0], order, strict=True)
            ):
                self._refuse(path, "expected states in one order of the parameters, got a list that fits two")
        return [_Owner(p, f"{path}[{i}]") for i, p in enumerate(fitting[0])] if fitting else None

    # ---- what has an inside

    def _inside(self, path: str, value: Any, owner: _Owner | None, own: bool) -> None:
        if isinstance(value, dict):
            self._dict(path, value, owner, own)
        elif isinstance(value, (list, deque)):
            for i, new in enumerate(self._items(path, list(value), owner, own)):
                if new is not None:
                    self.edits.append(partial(_put, value, i, new))
        elif isinstance(value, set):
            later = [self._value(f"{path}[{i}]", item, owner, own) for i, item in enumerate(value)]
            if any(later):
                self.edits.append(partial(_rebuild_set, value, list(value), later))
        elif isinstance(value, types.CellType):
            # An empty one has no contents.
            for content in gc.get_referents(value):
                if (new := self._value(path, content, None, own)) is not None:
                    self.edits.append(partial(_put_cell, value, new))
        elif isinstance(value, types.FunctionType):
            free = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            for name, inside in [
                *free,
                ("defaults", value.__defaults__),
                ("kwdefaults", value.__kwdefaults__),
            ]:
                self._fixed(f"{path}.<{name} of {value.__name__}>", inside)
            self._dict(path, vars(value), None, False, dot=True)
        elif isinstance(value, nn.Module):
            if id(value) not in self.parts:
                self._module(path, value)
        else:
            self._object(path, value, owner, own)

    def _dict(
        self, path: str, values: dict[Any, Any], owner: _Owner | None, own: bool, *, dot: bool = False
    ) -> None:
        # The globals of a module.
        if "__builtins__" in values:
            return
        keys: dict[Any, Later] = {}
        later: dict[Any, Later] = {}
        for key, value in list(values.items()):
            of = self._parameter(key) if own or isinstance(key, Tensor) else None
            label = f".{key}" if dot else f"[{key!r}]" if of is None else f"[{self._name(of)}]"
            if not isinstance(key, str):
                if isinstance(key, (Tensor, int)):
                    new_key = self._value(path, key, None, False)
                    if new_key is not None:
                        keys[key] = new_key
                else:
                    self._fixed(f"a key of {path}", key)
            inner = owner if of is None else _Owner(of, path + label)
            new = self._value(path + label, value, inner, own or id(of) in self.kept)
            if new is not None:
                later[key] = new
        if keys:
            self.edits.append(partial(_rebuild_dict, values, keys, later))
        else:
            self.edits += [partial(_put, values, key, new) for key, new in later.items()]

    def _parameter(self, key: Any) -> Tensor | None:
        """Which parameter a dictionary's key stands for: itself, its id or its name."""
        if isinstance(key, Tensor):
            return self.trained.get(id(key))
        if isinstance(key, str):
            return self.named.get(key)
        return self.trained.get(key) if type(key) is int else None

    def _module(self, path: str, module: nn.Module) -> None:
        for name, parameter in module._parameters.items():
            if id(parameter) in self.kept:
                self._refuse(
                    f"{path}.{name}",
                    f"expected a model of its own, got one that shares {self._name(parameter)}",
                )
        self._dict(path, vars(module), None, False, dot=True)

    def _object(self, path: str, value: Any, owner: _Owner | None, own: bool) -> None:
        """An object of a class that is not known here: attributes, slots, and what C code holds in it."""
        if not own and _is_torchs(value):
            return
        attributes = getattr(value, "__dict__", None)
        attributes = attributes if type(attributes) is dict else {}
        if isinstance(attributes.get("param_groups"), list):
            own = any(id(parameter) in self.kept for parameter in self._trained_by(value))
        elif id(value) in self.roots:
            own = self.roots[id(value)]
        elif any(isinstance(inside, nn.Module) for inside in attributes.values()):
            # What holds a whole model (a trainer, say) has tensors of all kinds.
            own = False
        if own:
            totals = {sum(parameter.numel() for parameter in order) for order in self.orders}
            for name, number in attributes.items():
                if type(number) is int and number > 1 and number in totals:
                    self.counts.append(
                        f"{path}.{name}: expected no count of the parameters' entries, got {number}"
                    )
        self._dict(path, attributes, owner, own, dot=True)
        done = {id(attributes), *map(id, attributes.values())}
        for name, held in _slots(value):
            done.add(id(held))
            later = self._value(f"{path}.{name}", held, owner, own)
            if later is not None:
                self.edits.append(partial(_put_attribute, value, name, later))
        target = [value()] if isinstance(value, weakref.ref) else []
        for name, held in [
            *_members(value),
            *(("<referent>", held) for held in target + gc.get_referents(value)),
        ]:
            if id(held) not in done:
                done.add(id(held))
                self._fixed(f"{path}.{name}", held)

    def _fixed(self, path: str, value: Any) -> None:
        """Look through what is held where nothing else can be put."""
        if self._value(path, value, None, False) is not None:
            held = self._name(value) if isinstance(value, Tensor) else "an old parameter"
            self._refuse(
                path, f"expected no parameter that is cut, got {held}, which cannot be replaced there"
            )

    def _refuse(self, path: str, problem: str) -> NoReturn:
        raise UnsupportedModelError(f"prune_model: {self.within}: {path}: {problem}")

    def _name(self, parameter: Any) -> str:
        return self.names.get(id(parameter), "a parameter of another model")


class _Owner:
    """The parameter that states belong to, and where they begin."""

    def __init__(self, parameter: Tensor, path: str) -> None:
        self.parameter, self.path = parameter, path

    def key(self, path: str) -> str:
        """What leads from the parameter's states to one of them."""
        inside = path.removeprefix(self.path)
        return inside[1:-1] if inside.startswith("[") and inside.count("[") == 1 else inside or path


def _optimizers_in(root: Any) -> list[Any]:
    """``root``, if it is an optimizer, and those that its attributes hold, in containers too."""
    found, level, seen = [], [root], set()
    # An optimizer in an optimizer, in a list of a wrapper: so deep, and not through all that a trainer leads to.
    for _ in range(6):
        below: list[Any] = []
        for value in level:
            if id(value) in seen or isinstance(value, (*_LEAVES, nn.Module, Tensor, types.FunctionType)):
                continue
            seen.add(id(value))
            attributes = getattr(value, "__dict__", None)
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, (list, tuple)):
                below += value
            elif type(attributes) is dict and not _is_torchs(value):
                if isinstance(attributes.get("param_groups"), list):
                    found.append(value)
                below += attributes.values()
            below += [held for _, held in _slots(value)]
        level = below
    return found


def _is_torchs(value: Any) -> bool:
    """An object of torch's own that is no optimizer: a compiler's leads to everything, and none to a parameter."""
    inside_torch = str(type(value).__module__).partition(".")[0] == "torch"
    return inside_torch and not isinstance(value, torch.optim.Optimizer)


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            # Python writes the class's name before a private one.
            slot = (
                f"_{kind.__name__.lstrip('_')}{name}"
                if name.startswith("__") and not name.endswith("__")
                else name
            )
            if isinstance(vars(kind).get(slot), types.MemberDescriptorType) and hasattr(value, slot):
                yield slot, getattr(value, slot)


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of a class written in C: what a method is bound to, the arguments of a partial."""
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType) and "__slots__" not in vars(kind):
                yield name, getattr(value, name, None)


def _put(container: Any, key: Any, later: Later) -> None:
    container[key] = later()


def _put_cell(cell: types.CellType, later: Later) -> None:
    cell.cell_contents = later()


def _put_attribute(value: Any, name: str, later: Later) -> None:
    object.__setattr__(value, name, later())


def _rebuild_set(values: set[Any], items: list[Any], later: list[Later | None]) -> None:
    new = [item if make is None else make() for item, make in zip(items, later, strict=True)]
    values.clear()
    values.update(new)


def _rebuild_dict(values: dict[Any, Any], keys: dict[Any, Later], later: dict[Any, Later]) -> None:
    # In its order, which a state dict numbers.
    new = [
        (keys[key]() if key in keys else key, later[key]() if key in later else value)
        for key, value in values.items()
    ]
    values.clear()
    values.update(new)


# ---- who is not named by the caller


def check_wrappers(model: nn.Module, inner: nn.Module, argument: str) -> None:
    """UnsupportedModelError if something that a cut would break is around ``inner``, or in it."""
    modules = list(model.modules())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Whoever calls may give the model inside of its wrapper.
        modules += [
            live
            for live in _live(nn.Module)
            if _sharded(live) and any(part is inner for part in live.modules())
        ]
    for module in modules:
        if kind := _sharded(module):
            raise UnsupportedModelError(
                f"prune_model: {argument}: expected a model that is not in {kind}, got one: {_SHARDED[kind]}. Cut the "
                "model first, then wrap it"
            )


def _sharded(module: nn.Module) -> str | None:
    # By name, where importing the classes takes long.
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _SHARDED), None)


def check_others(holders: Holders, *, named: bool) -> None:
    """What to do about optimizers that hold an old parameter and that the caller did not name.

    Where others were named (``named``), it is an error: UnsupportedModelError. Where none was, a warning: it may be one
    that has done its work.
    """
    for collect in (False, True):
        # One that is only waiting to be collected does not count, and this takes its time.
        if collect:
            gc.collect()
        found = [each for each in map(holders.missed, _live(torch.optim.Optimizer)) if each]
        if not found:
            return
    message = f"prune_model: optimizer: expected all that train the model, got not all: a live {found[0]}, which is cut"
    if named:
        raise UnsupportedModelError(f"{message}. Give a list, or delete it first")
    warnings.warn(f"{message}; it will not train the model any more", stacklevel=3)


def _live(kind: type) -> list[Any]:
    # Known beforehand, as there may be millions of objects.
    kinds = [kind]
    for known in kinds:
        kinds += type.__subclasses__(known)
    wanted = set(kinds)
    return [each for each in gc.get_objects() if type(each) in wanted]


def is_held(model: nn.Module) -> bool:
    """Whether anything but the model refers to its parameters: quick, where looking for what is slow."""

    def references(tensors: dict[str, Any]) -> int:
        return max((sys.getrefcount(tensor) for tensor in tensors.values() if tensor is not None), default=0)

    alone = references({"alone": nn.Parameter(torch.empty(0))})
    return any(references(module._parameters) > alone for module in model.modules())
