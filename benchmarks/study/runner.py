"""Runs a study's units one after the other; any number of processes may do so on one folder."""

from __future__ import annotations

import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict

from mvp_ext.journal import Journal

from .keys import parse
from .study import Study
from .units import Unit

# Before looking again for work while another process has what is needed next.
WAIT_SECONDS = 2.0


def run(
    study: Study,
    units: Sequence[Unit],
    *,
    budget_seconds: float = float("inf"),
    on_unit: Callable[[Unit, int, int], None] | None = None,
) -> list[str]:
    """Work through ``units``; no new one is begun after ``budget_seconds``.

    A unit that fails is written to ``errors.log`` and passed over, with what needs it.

    Returns:
        Keys of the units that failed here.
    """
    begin, journal = time.monotonic(), study.journal
    failed: list[str] = []
    while time.monotonic() - begin < budget_seconds:
        journal.refresh()
        left = [unit for unit in units if unit.key not in journal and unit.key not in failed]
        ready = [unit for unit in left if all(need in journal for need in unit.needs)]
        if not left or (not ready and not _others_work(left, failed)):
            break
        if not any(_try(study, unit, failed, len(units) - len(left), len(units), on_unit) for unit in ready):
            time.sleep(WAIT_SECONDS)
    return failed


def _try(
    study: Study,
    unit: Unit,
    failed: list[str],
    done: int,
    total: int,
    on_unit: Callable[[Unit, int, int], None] | None,
) -> bool:
    """Run a unit unless another process has it; whether it was run here."""
    with study.journal.claim(unit.key) as mine:
        if not mine:
            return False
        if on_unit is not None:
            on_unit(unit, done, total)
        begin = time.perf_counter()
        try:
            result = unit.run(study)
        except Exception:
            failed.append(unit.key)
            with open(study.folder / "errors.log", "a") as file:
                file.write(f"{unit.key}\n{traceback.format_exc()}\n")
            return True
        study.journal.append(unit.key, result, time.perf_counter() - begin)
        return True


def _others_work(left: Sequence[Unit], failed: Sequence[str]) -> bool:
    """Whether anything that is left may still become ready: something in it does not hang on a failed unit."""
    lost = set(failed)
    # In the plan's order: what a unit needs comes before it.
    for unit in left:
        if lost.intersection(unit.needs):
            lost.add(unit.key)
    return any(unit.key not in lost for unit in left)


class PartProgress(TypedDict):
    """One part's state: units done, seconds spent, seconds still needed (by the medians so far; None: unknown)."""

    part: str
    done: int
    total: int
    seconds: float
    left: float | None


def progress(journal: Journal, units: Sequence[Unit]) -> list[PartProgress]:
    """Per part, in the plan's order. A unit takes about as long as those of the same kind (arm, point) did."""
    spent: dict[str, list[float]] = defaultdict(list)
    by_part: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        by_part[unit.part].append(unit)
        if unit.key in journal:
            spent[kind_of(unit)].append(journal.records[unit.key]["seconds"])
    rows: list[PartProgress] = []
    for part, members in by_part.items():
        done = [unit for unit in members if unit.key in journal]
        left: float | None = 0.0
        for unit in members:
            if unit.key not in journal and left is not None:
                known = spent.get(kind_of(unit))
                left = None if known is None else left + statistics.median(known)
        seconds = sum(journal.records[unit.key]["seconds"] for unit in done)
        rows.append(
            {"part": part, "done": len(done), "total": len(members), "seconds": seconds, "left": left}
        )
    return rows


def kind_of(unit: Unit) -> str:
    """A unit's key without its task, seed and learning rate."""
    key = parse(unit.key)
    return str(replace(key, at="" if key.kind == "rate" else key.at, split="", seed=None))
