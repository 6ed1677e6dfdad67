"""What ``meta_vote`` takes and returns besides tensors: the number of units each layer keeps, and the result."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

from torch import Tensor

from mvp_ext.ops.checks import check_int


class Vote(NamedTuple):
    """The outcome of a vote on the U units of all layers, for one target or for T targets."""

    mask: Tensor
    """bool [U] or [T, U]: the kept units."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody misses here
    """int32 [K] or [T, K], K = sum(kept): the kept units layer by layer, counted within the layer, ascending."""
    votes: Tensor
    """float32 [U] or [T, U]: the weight of the voters that kept each unit."""
    kept: tuple[int, ...]
    """How many units each layer keeps."""


def kept_units(
    layers: Sequence[int], keep: float | Sequence[float] | Sequence[int], align: int = 1
) -> tuple[int, ...]:
    """How many units each layer keeps: round(ratio · units), halves up, then the nearest multiple of ``align``.

    Always at least 1, or ``min(align, units)`` where ``align`` is given, and at most all units of the layer.

    Args:
        layers: units of each layer, >= 1.
        keep: one ratio in (0, 1] for all layers, or for each layer a ratio (float) or an exact count (int); exact
            counts are not aligned.
        align: round to multiples of this (8 or 16 are often faster than a smaller, odd shape), >= 1.

    Raises:
        TypeError, ValueError: wrong kinds, ratios outside (0, 1], counts outside [1, units], lengths that differ.
    """
    return count_kept("kept_units", layers, keep, align)


def count_kept(
    op: str, layers: Sequence[int], keep: float | Sequence[float] | Sequence[int], align: int
) -> tuple[int, ...]:
    """``kept_units`` for another op, with whose name its errors begin."""
    layers = as_ints(op, "layers", layers)
    if layers and min(layers) < 1:
        raise ValueError(f"{op}: layers: expected at least 1 unit in each layer, got {list(layers)}")
    align = check_int(op, "align", align)
    if align < 1:
        raise ValueError(f"{op}: align: expected at least 1, got {align}")
    if _is_ratio(keep):
        return _from_ratios(layers, _check_ratio(op, keep), align)
    if isinstance(keep, (str, bytes)) or not isinstance(keep, Sequence):
        raise TypeError(f"{op}: keep: expected a float or a sequence of floats or ints, got {keep!r}")
    if len(keep) != len(layers):
        raise ValueError(f"{op}: keep: expected one entry for each of {len(layers)} layers, got {len(keep)}")
    return tuple(_one(op, n, k, align) for n, k in zip(layers, keep, strict=True))


def as_ints(op: str, name: str, values: Sequence[int]) -> tuple[int, ...]:
    """A sequence of integers of any kind."""
    values = tuple(values)
    if all(type(value) is int for value in values):
        return values
    return tuple(check_int(op, name, value) for value in values)


def _one(op: str, units: int, keep: object, align: int) -> int:
    if _is_ratio(keep):
        return _from_ratio(units, _check_ratio(op, keep), align)
    if isinstance(keep, bool) or not isinstance(keep, numbers.Integral):
        raise TypeError(f"{op}: keep: expected floats (ratios) or ints (counts), got {keep!r}")
    if not 1 <= int(keep) <= units:
        raise ValueError(f"{op}: keep: expected a count in [1, {units}], got {keep}")
    return int(keep)


def _is_ratio(keep: object) -> TypeGuard[float]:
    """Of float, and of what numpy has for it."""
    return isinstance(keep, float) or (
        isinstance(keep, numbers.Real) and not isinstance(keep, numbers.Integral)
    )


def _check_ratio(op: str, keep: float) -> float:
    if not 0.0 < keep <= 1.0:  # false for NaN, too
        raise ValueError(f"{op}: keep: expected a ratio in (0, 1], got {keep}")
    return float(keep)


@functools.lru_cache(maxsize=256)  # it is part of every vote, and a model's layers do not change
def _from_ratios(layers: tuple[int, ...], ratio: float, align: int) -> tuple[int, ...]:
    return tuple(_from_ratio(units, ratio, align) for units in layers)


def _from_ratio(units: int, ratio: float, align: int) -> int:
    kept = max(1, int(ratio * units + 0.5))
    aligned = (2 * kept + align) // (2 * align) * align
    return min(units, max(aligned, align))
