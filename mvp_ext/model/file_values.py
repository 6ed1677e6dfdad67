"""Kinds and ranges of the values that a file may hold of how its model is built."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Fits = Callable[[Any], bool]


def integer(low: int, high: int) -> Fits:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def number(low: float, high: float) -> Fits:
    return lambda value: (
        isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    )


def several(fits: Fits, counts: range) -> Fits:
    return lambda value: isinstance(value, (list, tuple)) and len(value) in counts and all(map(fits, value))


def either(*kinds: Fits) -> Fits:
    return lambda value: any(fits(value) for fits in kinds)


def word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{0,100}", value) is not None


def flag(value: Any) -> bool:
    return isinstance(value, bool)


RATE, SIDE, COUNT = number(0, 1), integer(1, 16384), integer(1, 256)
SIDES = either(SIDE, several(SIDE, range(2, 3)))
# Of every model.
COMMON: dict[str, Fits] = {
    "num_classes": integer(0, 1_000_000),
    "in_chans": integer(1, 1024),
    "img_size": SIDES,
}
