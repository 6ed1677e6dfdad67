"""What of a data set cannot be used: an error where nothing can, else a count and a reason for what is left out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence


class DataError(ValueError):
    """Images or labels that cannot be used; the message names the file and what to do about it."""


class LeftOut:
    """What is not taken from a data set, counted by reason and told in one line.

    Args:
        where: the data set, as its user named it.
    """

    def __init__(self, where: object) -> None:
        self._where = where
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, object] = {}

    def add(self, reason: str, what: object, count: int = 1) -> None:
        """One thing, or ``count``, for a reason that is read after a number: "link(s) are broken"."""
        if count:
            self._counts[reason] += count
            self._examples.setdefault(reason, what)

    def add_all(self, reason: str, things: Sequence[object]) -> None:
        """Each of these for one reason."""
        if things:
            self.add(reason, things[0], len(things))

    def tell(self) -> None:
        """Warn of all that was added, if there was anything."""
        if self._counts:
            parts = (f"{n} {reason} (e.g. {self._examples[reason]})" for reason, n in self._counts.items())
            # Of the call of load_data.
            warnings.warn(f"{self._where}: left out: {'; '.join(parts)}", stacklevel=4)
