"""What can be cut in a model: its layers of units, as a value.

A unit is a convolution filter, an attention head or an MLP hidden neuron. A layer of units lists every tensor that
shrinks when one of them goes: the unit's own weights, its normalisation, and the weights of whatever reads it.
``families`` finds a model's structure; here is what it says.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn


class UnsupportedModelError(ValueError):
    """A model has a part that cannot be cut here; the message names the part and what was expected."""


@dataclass(frozen=True)
class Slice:
    """One dimension of one tensor that a layer's units index.

    ``dim`` is cut into ``repeat`` equal parts (3 for q, k and v); unit u is ``block`` consecutive places
    [u·block, (u+1)·block) in each of them. So the units have units · block · repeat places, which are the whole
    dimension, or lie at ``offset`` in one of ``length`` (behind a concatenation).

    Attributes:
        tensor: its name in the model's state dict.
        dim: 0 or 1.
        block: places of one unit (a head's width; 1 for filters and neurons).
        repeat: parts that the units' places are in.
        offset: of the first place.
        length: of the dimension, where it has places of others, too.
    """

    tensor: str
    dim: int
    block: int = 1
    repeat: int = 1
    offset: int = 0
    length: int | None = None

    def places(self, units: Tensor, total: int) -> Tensor:
        """Where units lie in the dimension.

        Args:
            units: int64 [n], their indices in [0, total).
            total: units of the layer.

        Returns:
            int64 [repeat · n · block], part by part.
        """
        within = (units[:, None] * self.block + torch.arange(self.block)).flatten()
        part = torch.arange(self.repeat)[:, None] * (total * self.block) + self.offset
        return (part + within).flatten()

    def size(self, total: int) -> int:
        """Of the dimension of a tensor none of whose ``total`` units is cut."""
        return total * self.block * self.repeat if self.length is None else self.length


@dataclass(frozen=True)
class Probe:
    """Where the activation of a layer's units can be read: the first input, or the output, of a module.

    A block adds its shortcut IN PLACE to its last norm's output, so a hook on side "output" must keep a clone; if it
    also wants the gradient, it must keep the output and return a clone.

    Attributes:
        module: its path in the model.
        side: which of the two.
        dim: the dimension that holds the units, as in ``ops.importance``.
        heads: set where ``dim`` holds that many equal blocks, one a unit.
    """

    module: str
    side: Literal["input", "output"]
    dim: int
    heads: int | None = None


@dataclass(frozen=True)
class Attribute:
    """A number that a module keeps of how many units there are: ``module.name`` = kept · ``per_unit``.

    Attributes:
        module: its path in the model ("" is the model itself).
        name: of the attribute, an int.
        per_unit: how much of it a unit makes.
    """

    module: str
    name: str
    per_unit: int = 1


@dataclass(frozen=True)
class UnitLayer:
    """Units that are voted on and budgeted together.

    Attributes:
        name: path of the module that makes the units.
        kind: what a unit is.
        units: how many there are.
        slices: every dimension of every tensor that shrinks with them.
        probe: where their activation can be read.
        scatter: for a block's last convolution (scope `all`), the block into whose residual stream the kept channels
            are added; else None.
        attributes: numbers of modules that follow.
        narrowed: modules that cannot compute with fewer units, and give their parts to one of ours that can
            (``narrow``).
    """

    name: str
    kind: Literal["filter", "head", "neuron"]
    units: int
    slices: tuple[Slice, ...]
    probe: Probe
    scatter: str | None = None
    attributes: tuple[Attribute, ...] = ()
    narrowed: tuple[str, ...] = ()

    def multiple(self, align: int) -> int:
        """Of how many units kept counts are multiples, so that those of their channels are multiples of ``align``.

        1 for heads: each already is a whole number of aligned blocks, and there are few of them.
        """
        block = self.slices[0].block if self.slices else 1
        return 1 if self.kind == "head" else align // math.gcd(align, block)


class LeftWhole(NamedTuple):
    """A part of a model that no scope cuts, and why."""

    module: str
    reason: str


class LayerCheck:
    """Whether layers of units are a model's, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self._state = model.state_dict(keep_vars=True)
        self._modules = dict(model.named_modules())
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self._memory: dict[Any, list[str]] = {}
        for name, tensor in self._state.items():
            if (memory := storage_of(tensor)) is not None:
                self._memory.setdefault(memory, []).append(name)

    def check(self, layer: UnitLayer) -> None:
        """UnsupportedModelError unless all that ``layer`` names is there, of its size, and no one else's."""
        for cut in layer.slices:
            self._check_slice(layer, cut)
        for attribute in layer.attributes:
            value = getattr(self._modules.get(attribute.module), attribute.name, None)
            expected = layer.units * attribute.per_unit
            if type(value) is not int or value != expected:
                raise UnsupportedModelError(
                    f"{attribute.module}.{attribute.name}: expected {expected} for {layer.units} units, got {value!r}"
                )
        for path in layer.narrowed:
            if path not in self._modules:
                raise UnsupportedModelError(f"{path}: expected a module that can be narrower, got none")

    def _check_slice(self, layer: UnitLayer, cut: Slice) -> None:
        tensor = self._state.get(cut.tensor)
        expected = cut.size(layer.units)
        if tensor is None:
            raise UnsupportedModelError(
                f"{cut.tensor}: expected a plain tensor, got none (is it parametrised?)"
            )
        if cut.dim >= tensor.ndim or tensor.shape[cut.dim] != expected:
            raise UnsupportedModelError(
                f"{cut.tensor}: expected {expected} places in dimension {cut.dim} for {layer.units} units, "
                f"got shape {tuple(tensor.shape)}"
            )
        shared = self._names.get(id(tensor), [])
        if len(shared) > 1:
            raise UnsupportedModelError(
                f"{cut.tensor}: the same tensor is also {shared[-1]}; shared weights cannot be cut"
            )
        for other in self._memory.get(storage_of(tensor), []):
            if other != cut.tensor and _overlap(tensor, self._state[other]):
                raise UnsupportedModelError(
                    f"{cut.tensor}: its memory is also that of {other}; shared weights cannot be cut"
                )


@dataclass(frozen=True)
class Structure:
    """All layers of units of one model in one scope, in the model's order. A value: hashable, no tensors, no model.

    Iteration and ``len`` go over the layers; ``structure["layer1.0.conv1"]`` is one of them.

    Attributes:
        family: whose rules found it.
        scope: which kinds of units it has (see ``families``).
        architecture: timm's name of the model, where the model knows it.
        layers: in the order in which masks and votes concatenate them.
        left_whole: parts with weights that no scope cuts.
    """

    family: str
    scope: str
    architecture: str | None
    layers: tuple[UnitLayer, ...]
    left_whole: tuple[LeftWhole, ...] = field(default=(), compare=False)

    # What ``verify`` does. ``surgery`` puts it here: a structure does not know how a model is cut.
    verifier: ClassVar[Callable[[Structure, nn.Module, Tensor | None], None]]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def units_per_layer(self) -> tuple[int, ...]:
        """Sizes of the layers."""
        return tuple(layer.units for layer in self.layers)

    @property
    def total_units(self) -> int:
        """U, the length of a mask's vector."""
        return sum(self.units_per_layer)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the scope and the layers' names, kinds and sizes: equal where masks can be compared."""
        described = [
            self.family,
            self.scope,
            [[layer.name, layer.kind, layer.units] for layer in self.layers],
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[UnitLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> UnitLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer of units named {name!r}; there are {', '.join(self.names)}")

    def check(self, model: nn.Module) -> None:
        """UnsupportedModelError unless every slice names a plain tensor of ``model``, of its size, used once only."""
        known = LayerCheck(model)
        for layer in self:
            known.check(layer)
        self._check_places()

    def verify(self, model: nn.Module, *, images: Tensor | None = None) -> None:
        """Try whether this structure is exact: cut, the model has to compute what it computes masked.

        About half of the units of every layer are cut, in a copy of the model whose weights got some noise (fresh
        ones hide mistakes), and all outputs compared in eval and in train mode, with dropout off. ``prune_model``
        does this with the first model of each class that it gets on an installation. Classes that passed are noted in
        the user's cache; this call tries the model anyway.

        Args:
            model: whose structure this is, dense or already pruned, with memory (not on "meta"). Not changed.
            images: what the model takes, float [B, C, H, W], B at least 2. None: noise of the size that the model
                was built for, or of 64 or 224 pixels.

        Raises:
            UnsupportedModelError: cut, it computes something else. The message names the first layer that is wrong,
                the mode and the difference. Or the model does not run on the images in eval mode. Train mode is left
                out where it does not run, or is random beyond its dropout.
            ValueError: the model is on "meta", or takes images with another number of channels.
        """
        Structure.verifier(self, model, images)

    def _check_places(self) -> None:
        """UnsupportedModelError where two units claim one place, or a place is outside of its dimension."""
        by_dimension: dict[tuple[str, int], list[tuple[UnitLayer, Slice]]] = {}
        for layer in self:
            for cut in layer.slices:
                by_dimension.setdefault((cut.tensor, cut.dim), []).append((layer, cut))
        for (tensor, dim), cuts in by_dimension.items():
            # The usual case: one layer's units are the whole dimension.
            if len(cuts) == 1 and cuts[0][1].length is None and cuts[0][1].offset == 0:
                continue
            sizes = {cut.size(layer.units) for layer, cut in cuts}
            places = torch.cat([cut.places(torch.arange(layer.units), layer.units) for layer, cut in cuts])
            inside = len(sizes) == 1 and int(places.min()) >= 0 and int(places.max()) < min(sizes)
            if not inside or len(places.unique()) != len(places):
                names = ", ".join(layer.name for layer, _ in cuts)
                raise UnsupportedModelError(
                    f"{tensor}: dimension {dim}: the units of {names} claim the same places, or some outside of it"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Structure:
        """The inverse of ``to_dict``; ValueError if a field is missing, unknown or of another kind."""
        try:
            layers = tuple(
                UnitLayer(
                    **{
                        **layer,
                        "slices": tuple(Slice(**s) for s in layer["slices"]),
                        "probe": Probe(**layer["probe"]),
                        "attributes": tuple(Attribute(**a) for a in layer.get("attributes", _before(layer))),
                        "narrowed": tuple(layer.get("narrowed", ())),
                    }
                )
                for layer in data["layers"]
            )
            whole = tuple(LeftWhole(*each) for each in data.get("left_whole", ()))
            return Structure(**{**data, "layers": layers, "left_whole": whole})
        except (TypeError, KeyError) as error:
            raise ValueError(f"Structure.from_dict: not a description of a structure ({error})") from error


def _before(layer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The attributes of a layer in a file from before version 0.3: of timm's attention, the only ones there were."""
    if layer["kind"] != "head":
        return []
    names = {"num_heads": 1, "attn_dim": layer["slices"][0]["block"]}
    return [{"module": layer["name"], "name": name, "per_unit": n} for name, n in names.items()]


def storage_of(tensor: Tensor) -> tuple[str, int] | None:
    """The memory that a tensor lies in; None where that says nothing (meta tensors, sparse ones)."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage may have a place in common. Those of one flat buffer need not."""
    (a0, a1), (b0, b1) = (
        (
            t.storage_offset() * t.itemsize,
            (t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1)
            * t.itemsize,
        )
        for t in (a, b)
    )
    return a0 < b1 and b0 < a1 and a.numel() > 0 and b.numel() > 0
