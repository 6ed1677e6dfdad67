"""Masks: which units of each layer stay. A mask knows its layers' names and sizes, and nothing of models or tensors."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from mvp_ext import storage
from mvp_ext.model.structure import Structure
from mvp_ext.ops import kept_units

_FORMAT = "mvp_ext.mask"
_VERSION = 1
# Filters and neurons are kept in multiples of this: an aligned layer often runs faster than a smaller one.
ALIGN = 8

# Kept rows and kept columns of a tensor (dim 0, dim 1): int64 indices, ascending; None keeps all.
RowsCols = tuple[Tensor | None, Tensor | None]
Keep = float | Sequence[float] | Sequence[int]


class Mask:
    """Per layer, which units stay: an immutable value that can be compared, hashed, combined and stored.

    Its vector form is the layers' bits one after the other, in the structure's order (bool [U], as
    ``meta_vote`` takes them).

    Args:
        layers: name → bool [units], at least one unit each, at least one of them True. Copied to the CPU.

    Raises:
        TypeError: a layer is not a bool tensor.
        ValueError: a layer has another rank than 1, or keeps no unit.
    """

    __slots__ = ("_layers",)

    def __init__(self, layers: Mapping[str, Tensor]) -> None:
        if not layers:
            raise ValueError("Mask: expected at least one layer, got none")
        copied = {}
        for name, bits in layers.items():
            if not isinstance(bits, Tensor) or bits.dtype is not torch.bool:
                got = str(bits.dtype) if isinstance(bits, Tensor) else type(bits).__name__
                raise TypeError(f"Mask: layer {name!r}: expected a bool tensor, got {got}")
            if bits.ndim != 1:
                raise ValueError(f"Mask: layer {name!r}: expected shape [units], got {tuple(bits.shape)}")
            copied[name] = bits.detach().to("cpu", copy=True)
            if not bool(copied[name].any()):
                raise ValueError(
                    f"Mask: layer {name!r}: expected at least one unit of {bits.numel()} to stay, got none"
                )
        self._layers = copied

    # ---- where masks come from

    @classmethod
    def full(cls, structure: Structure) -> Mask:
        """Every unit stays."""
        return cls({layer.name: torch.ones(layer.units, dtype=torch.bool) for layer in structure})

    @classmethod
    def random(cls, structure: Structure, keep: Keep, seed: int, align: int = ALIGN) -> Mask:
        """A seeded draw without replacement; ``keep`` and ``align`` as in ``from_scores``."""
        generator = torch.Generator().manual_seed(seed)
        scores = {layer.name: torch.rand(layer.units, generator=generator) for layer in structure}
        return cls.from_scores(structure, scores, keep, align)

    @classmethod
    def from_scores(
        cls,
        structure: Structure,
        scores: Mapping[str, Tensor],
        keep: Keep,
        align: int = ALIGN,
        *,
        global_: bool = False,
    ) -> Mask:
        """The units with the highest scores. Ties go to the lower index; no layer loses all its units.

        Args:
            structure: gives the layers and their order.
            scores: layer name → [units], any real dtype, any device.
            keep: share of units that stays, in (0, 1]; or one share, or one exact count, per layer.
            align: kept counts of filters and neurons are rounded to a multiple of this. Heads are not: each
                is already a whole number of aligned blocks, and there are few of them.
            global_: rank the units of all layers together, each layer's scores divided by their L2 norm.
                ``keep`` is then one share, of all units; rounding to ``align`` comes after.

        Raises:
            ValueError: a layer has no scores, another number of them, NaN, or (with ``global_``) an infinite one;
                a share is outside (0, 1], a count outside [1, units].
            TypeError: ``keep`` is of another kind.
        """
        checked = [_scores_of(layer.name, layer.units, scores, finite=global_) for layer in structure]
        aligns = [layer.multiple(align) for layer in structure]
        units = structure.units_per_layer
        # Not 1 for 1.0: is it all units, or one a layer?
        if isinstance(keep, (numbers.Integral, str)):
            raise TypeError(
                f"Mask.from_scores: keep: expected a float, or a sequence of floats or ints, got {keep!r}"
            )
        if isinstance(keep, numbers.Real):
            keep = float(keep)
        if global_ and not isinstance(keep, float):
            raise TypeError(
                f"Mask.from_scores: keep: expected one share (float) with global_=True, got {keep!r}"
            )
        shares: Sequence[float | int] = [keep] * len(units) if isinstance(keep, float) else keep
        if len(shares) != len(units):
            raise ValueError(
                f"Mask.from_scores: keep: expected {len(units)} values (one a layer), got {len(shares)}"
            )
        if global_:
            shares = [k / n for k, n in zip(_global_counts(checked, shares[0]), units, strict=True)]
        kept = [kept_units((n,), (share,), a)[0] for n, share, a in zip(units, shares, aligns, strict=True)]
        layers = {}
        for layer, values, k in zip(structure, checked, kept, strict=True):
            bits = torch.zeros(layer.units, dtype=torch.bool)
            bits[values.sort(descending=True, stable=True).indices[:k]] = True
            layers[layer.name] = bits
        return cls(layers)

    @classmethod
    def from_vector(cls, structure: Structure, vector: Tensor) -> Mask:
        """From bool [U], the layers one after the other in the structure's order."""
        if vector.shape != (structure.total_units,):
            raise ValueError(
                f"Mask.from_vector: expected shape [U] = ({structure.total_units},), got {tuple(vector.shape)}"
            )
        return cls(dict(zip(structure.names, vector.split(structure.units_per_layer), strict=True)))

    @classmethod
    def compose(cls, outer: Mask, inner: Mask) -> Mask:
        """The choice of two prunings after each other, as a mask of the first model.

        ``outer`` is a mask of the first model, ``inner`` one of the smaller model that it left.
        """
        if set(outer._layers) != set(inner._layers):
            raise ValueError(
                f"Mask.compose: the two masks have different layers ({_difference(outer, inner)})"
            )
        layers = {}
        for name, bits in outer._layers.items():
            units, chosen = bits.nonzero().flatten(), inner._layers[name]
            if units.numel() != chosen.numel():
                raise ValueError(
                    f"Mask.compose: layer {name!r}: outer keeps {units.numel()} units, "
                    f"inner is a mask of {chosen.numel()}"
                )
            layers[name] = torch.zeros_like(bits)
            layers[name][units[chosen]] = True
        return cls(layers)

    # ---- what a mask says

    @property
    def layers(self) -> Mapping[str, Tensor]:
        """Layer name → bool [units] on the CPU, in the structure's order. Not to be written to."""
        return MappingProxyType(self._layers)

    @property
    def kept(self) -> dict[str, int]:
        """Layer name → number of units that stay."""
        return {name: int(bits.sum()) for name, bits in self._layers.items()}

    @property
    def indices(self) -> dict[str, Tensor]:
        """Layer name → int64 [kept], ascending."""
        return {name: bits.nonzero().flatten() for name, bits in self._layers.items()}

    @property
    def keep(self) -> float:
        """Share of all units that stays."""
        return sum(self.kept.values()) / sum(bits.numel() for bits in self._layers.values())

    def check(self, structure: Structure) -> None:
        """ValueError unless this mask has exactly the structure's layers with their numbers of units."""
        for layer in structure:
            if layer.name not in self._layers:
                raise ValueError(
                    f"mask: expected layer {layer.name!r} (scope {structure.scope!r}), got none of that name"
                )
            units = self._layers[layer.name].numel()
            if units != layer.units:
                raise ValueError(f"mask: layer {layer.name!r}: expected {layer.units} units, got {units}")
        if surplus := set(self._layers) - set(structure.names):
            raise ValueError(
                f"mask: layer {sorted(surplus)[0]!r} is not in the structure (scope {structure.scope!r})"
            )

    def index_in(self, structure: Structure) -> dict[str, RowsCols]:
        """For every tensor that changes shape, its name → (rows, cols): int64 indices kept of dim 0 and dim 1.

        None keeps all. Layers that keep all their units change nothing and are left out.

        Raises:
            ValueError: the mask is not one of this structure.
        """
        self.check(structure)
        index: dict[str, list[Tensor | None]] = {}
        # Of dimensions that several layers cut, or that have places of others: which places stay.
        shared: dict[tuple[str, int], Tensor] = {}
        for layer in structure:
            kept = self._layers[layer.name]
            if bool(kept.all()):
                continue
            units = kept.nonzero().flatten()
            # A layer's tensors share one index tensor where they can.
            places: dict[tuple[int, int], Tensor] = {}
            for cut in layer.slices:
                if cut.length is not None:
                    stays = shared.setdefault((cut.tensor, cut.dim), torch.ones(cut.length, dtype=torch.bool))
                    stays[cut.places((~kept).nonzero().flatten(), layer.units)] = False
                    continue
                if (cut.block, cut.repeat) not in places:
                    places[cut.block, cut.repeat] = cut.places(units, layer.units)
                index.setdefault(cut.tensor, [None, None])[cut.dim] = places[cut.block, cut.repeat]
        for (name, dim), stays in shared.items():
            index.setdefault(name, [None, None])[dim] = stays.nonzero().flatten()
        return {name: (rows, cols) for name, (rows, cols) in index.items()}

    def to_vector(self) -> Tensor:
        """bool [U], the layers one after the other."""
        return torch.cat(list(self._layers.values()))

    def iou(self, other: Mask, *, per_layer: bool = False) -> float | dict[str, float]:
        """Intersection over union of the kept units, in (0, 1] for equal masks, 0 for disjoint ones.

        Over all units, or with ``per_layer`` a dict of one value per layer.
        """
        pairs = {name: (bits, other._layers[name]) for name, bits in self._paired(other, "iou")}
        both = {name: int((a & b).sum()) for name, (a, b) in pairs.items()}
        either = {name: int((a | b).sum()) for name, (a, b) in pairs.items()}
        if per_layer:
            return {name: both[name] / either[name] for name in pairs}
        return sum(both.values()) / sum(either.values())

    def __and__(self, other: Mask) -> Mask:
        """Units that both keep; ValueError if that is none in some layer."""
        return Mask({name: bits & other._layers[name] for name, bits in self._paired(other, "&")})

    def __or__(self, other: Mask) -> Mask:
        """Units that either keeps."""
        return Mask({name: bits | other._layers[name] for name, bits in self._paired(other, "|")})

    def __invert__(self) -> Mask:
        """The removed units; ValueError if some layer has none."""
        return Mask({name: ~bits for name, bits in self._layers.items()})

    def _paired(self, other: Mask, operation: str) -> list[tuple[str, Tensor]]:
        if not isinstance(other, Mask):
            raise TypeError(f"Mask {operation}: expected a Mask, got {type(other).__name__}")
        if set(self._layers) != set(other._layers):
            raise ValueError(
                f"Mask {operation}: the two masks have different layers ({_difference(self, other)})"
            )
        for name, bits in self._layers.items():
            if bits.numel() != other._layers[name].numel():
                raise ValueError(
                    f"Mask {operation}: layer {name!r}: {bits.numel()} units against {other._layers[name].numel()}"
                )
        return list(self._layers.items())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return set(self._layers) == set(other._layers) and all(
            torch.equal(bits, other._layers[name]) for name, bits in self._layers.items()
        )

    def __hash__(self) -> int:
        return hash(frozenset((name, bits.numpy().tobytes()) for name, bits in self._layers.items()))

    def __repr__(self) -> str:
        layers = ", ".join(f"{name} {int(bits.sum())}/{bits.numel()}" for name, bits in self._layers.items())
        return f"Mask({layers})"

    # ---- files

    def to_bytes(self) -> bytes:
        """A versioned safetensors file of packed bits, as bytes; the same mask always gives the same bytes."""
        bits = torch.from_numpy(np.packbits(self.to_vector().numpy()))
        spec = {"layers": [[name, bits.numel()] for name, bits in self._layers.items()]}
        return storage.to_bytes({"bits": bits}, spec, kind=_FORMAT, version=_VERSION)

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "these bytes") -> Mask:
        """The inverse of ``to_bytes``; FileFormatError (a ValueError) if the bytes are not a whole mask."""
        tensors, spec = storage.from_bytes(data, kind=_FORMAT, version=_VERSION, source=source)
        try:
            names, sizes = zip(*((str(name), int(units)) for name, units in spec["layers"]), strict=True)
            flat = torch.from_numpy(np.unpackbits(tensors["bits"].numpy(), count=sum(sizes))).bool()
            return cls(dict(zip(names, flat.split(sizes), strict=True)))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise storage.FileFormatError(
                f"{source}: its description does not fit its bits ({error})"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask to a file of its own, whole or not at all."""
        storage.write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a file that ``save`` wrote; FileNotFoundError, or FileFormatError naming the file."""
        with open(path, "rb") as file:
            return cls.from_bytes(file.read(), source=os.fspath(path))


def _difference(a: Mask, b: Mask) -> str:
    name = sorted(set(a.layers) ^ set(b.layers))[0]
    return f"{name!r} is only in the {'first' if name in a.layers else 'second'}"


def _scores_of(name: str, units: int, scores: Mapping[str, Tensor], *, finite: bool) -> Tensor:
    if name not in scores:
        raise ValueError(f"Mask.from_scores: scores: expected scores for layer {name!r}, got none")
    values = scores[name].detach().to("cpu", torch.float64)
    if values.shape != (units,):
        raise ValueError(
            f"Mask.from_scores: layer {name!r}: expected shape [units] = ({units},), got {tuple(values.shape)}"
        )
    if bool(values.isnan().any()):
        raise ValueError(
            f"Mask.from_scores: layer {name!r}: {int(values.isnan().sum())} of its {units} scores are NaN"
        )
    if finite and bool(values.isinf().any()):
        raise ValueError(
            f"Mask.from_scores: layer {name!r}: an infinite score cannot be compared across layers"
        )
    return values


def _global_counts(scores: Sequence[Tensor], keep: float) -> list[int]:
    """How many units each layer keeps if all are ranked together, after each layer kept its best one."""
    if not 0 < keep <= 1:
        raise ValueError(f"Mask.from_scores: keep: expected a share in (0, 1], got {keep}")
    sizes = torch.tensor([values.numel() for values in scores])
    ranked = []
    for values in scores:
        norm = values.norm()
        values = values / norm if norm > 0 else values.clone()
        values[values.argmax()] = math.inf
        ranked.append(values)
    order = torch.cat(ranked).sort(descending=True, stable=True).indices
    chosen = order[: max(len(scores), math.floor(keep * int(sizes.sum()) + 0.5))]
    layer_of = torch.arange(len(scores)).repeat_interleave(sizes)
    return layer_of[chosen].bincount(minlength=len(scores)).tolist()
