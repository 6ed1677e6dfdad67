"""Signs of life of long work: a bar in a terminal, and a line every few seconds where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from mvp_ext.app.console import console, plain, say
from mvp_ext.app.results import seconds_text

# Between two lines of a log.
LOG_SECONDS = 5.0
# Of parts that are made at the same time, so many are shown.
MOST_SHOWN = 8

# advance(what is being made, its steps done, its steps in all)
Advance = Callable[[str, int, int], None]


class Work:
    """How far work of several parts is, and how long the rest will take.

    What a part has done when it is first heard of was done by an earlier run: it takes no time of this one.

    Args:
        total: steps of all parts; None: only of the parts that are being made.
    """

    def __init__(self, total: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock, self.began = total, clock, clock()
        self._last = ""
        # Steps done and steps in all of each part; steps that it had done at first.
        self._parts: dict[str, tuple[int, int]] = {}
        self._found: dict[str, int] = {}

    def advance(self, what: str, done: int, total: int) -> None:
        """Part ``what`` has done so many of its steps."""
        self._found.setdefault(what, done)
        self._last, self._parts[what] = what, (done, total)

    @property
    def shown(self) -> dict[str, tuple[int, int]]:
        """Steps done and steps in all of the parts that are being made; of the last where none is."""
        made = {what: part for what, part in self._parts.items() if part[0] < part[1]}
        return dict(list(made.items())[:MOST_SHOWN]) or {self._last: self._parts.get(self._last, (0, 0))}

    @property
    def overall(self) -> tuple[int, int]:
        """Steps done and steps in all; of the part alone where the whole is not known."""
        if self.total is None:
            return self._parts.get(self._last, (0, 0))
        done = sum(done for done, _ in self._parts.values())
        return done, max(done, self.total)

    def times(self) -> str:
        """``12 s so far, about 3 min 20 s left``."""
        passed = self.clock() - self.began
        done, total = self.overall
        worked = sum(done for done, _ in self._parts.values()) - sum(self._found.values())
        text = f"{seconds_text(passed)} so far"
        if worked > 0 and (self.total is not None or len(self._parts) == 1):
            text += f", about {seconds_text((total - done) * passed / worked)} left"
        return text

    def line(self, description: str) -> str:
        """All of it for a log."""
        parts = ", ".join(f"{what} {done}/{total}".lstrip() for what, (done, total) in self.shown.items())
        text = f"{description} {parts}" if "" in self.shown else f"{description}: {parts}"
        if self.total is not None:
            share = self.overall[0] / max(1, self.overall[1])
            text += f"; in all {self.overall[0]}/{self.overall[1]} ({share:.0%})"
        return f"{text}; {self.times()}"


@contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator[Advance]:
    """Shows what ``advance(what, done, total)`` is told; each ``what`` that is being made has a bar of its own.

    Args:
        description: the work's name.
        total: steps of all parts together; there is a bar of these, too.
    """
    work = Work(total)
    with _bars(work, description) if console.is_terminal else _lines(work, description) as show:

        def advance(what: str, done: int, steps: int) -> None:
            work.advance(what, done, steps)
            show()

        yield advance


@contextmanager
def _lines(work: Work, description: str) -> Iterator[Callable[[], None]]:
    said = work.clock()
    unsaid = False

    def show() -> None:
        nonlocal said, unsaid
        unsaid = True
        if work.clock() - said >= LOG_SECONDS:
            say(work.line(description))
            said, unsaid = work.clock(), False

    yield show
    if unsaid:
        say(work.line(description))


@contextmanager
def _bars(work: Work, description: str) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[times]}", markup=False),
    )
    with RichProgress(*columns, console=console) as bars:
        whole = None if work.total is None else bars.add_task(description, total=work.total, times="")
        parts: dict[str, TaskID] = {}

        def show() -> None:
            shown = work.shown
            for name in parts.keys() - shown.keys():
                bars.remove_task(parts.pop(name))
            for name, (done, total) in shown.items():
                if name not in parts:
                    title = ": ".join(part for part in (description, name) if part)
                    parts[name] = bars.add_task(plain(title), total=None, times="")
                times = work.times() if whole is None else ""
                bars.update(parts[name], completed=done, total=total, times=times)
            if whole is not None:
                bars.update(whole, completed=work.overall[0], total=work.overall[1], times=work.times())

        yield show
