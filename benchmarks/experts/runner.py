"""Everything that is run once, by as many processes as there are cores; what is finished is in a journal."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mvp_ext.app.environment import commit
from mvp_ext.data.tasks import Task
from mvp_ext.journal import Journal
from mvp_ext.train.cost import use_clock

from .arms import IMAGES, SPLITS, Arm, arms_of, parts_of, run_task
from .worlds import WORLDS, Prepared

ROOT = Path(__file__).resolve().parent.parent.parent


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    use_clock(time.process_time)
    seeds = []
    for name in options.worlds:
        for seed in options.seeds:
            folder = options.out / folder_name(name) / f"seed{seed}"
            parts = None if options.parts is None else tuple(options.parts)
            prepared = Prepared(WORLDS[name], seed, folder, options.files, parts)
            seeds.append((prepared, journal_at(name, folder / "journal.jsonl")))
    for number in range(len(seeds)):
        # Whoever waits for the other process makes what later seeds need.
        while _missing(*seeds[number]):
            if not any(_make_one(*later) for later in seeds[number:]):
                time.sleep(5)
        _run_seed(*seeds[number])


def _left(prepared: Prepared, journal: Journal) -> list[tuple[str, Task, int, list[Arm]]]:
    """The units that are not in the journal."""
    journal.refresh()
    units, found = [], results_of(journal)
    for part in parts_of(prepared):
        for split in SPLITS:
            for task in prepared.tasks[split]:
                for images in IMAGES:
                    arms, key = arms_of(part, images), f"{split} {images} {task.name}"
                    # A journal from before there were parts has some of them in its first rows.
                    there = found.get(key, {})
                    if any(str(j) not in there.get(arm.name, {}) for arm in arms for j in arm.steps):
                        units.append((f"{key} {part}".rstrip(), task, images, arms))
    return units


def _missing(prepared: Prepared, journal: Journal) -> list[str]:
    """What has to be made for the units that are left; a journal that came without its zoos makes nothing be there."""
    kinds = dict.fromkeys(arm.zoo for *_, arms in _left(prepared, journal) for arm in arms if arm.zoo)
    return [kind for kind in kinds if not _mark(prepared, kind).exists()]


def _mark(prepared: Prepared, kind: str) -> Path:
    return prepared.folder / f"{kind}.made"


def _make_one(prepared: Prepared, journal: Journal) -> bool:
    """Whether this process made something; another may be at all of it."""
    for kind in _missing(prepared, journal):
        # Not by the name of its result, which may be there.
        with journal.claim(f"at {kind}") as mine:
            if mine and not _mark(prepared, kind).exists():
                result = _made(prepared, kind)
                if f"make {kind}" not in journal:
                    journal.append(f"make {kind}", result)
                _mark(prepared, kind).touch()
                return True
    return False


def _run_seed(prepared: Prepared, journal: Journal) -> None:
    names = {split: {t.name: list(t.class_names) for t in tasks} for split, tasks in prepared.tasks.items()}
    _once(journal, "tasks", lambda: names)
    for key, task, images, arms in _left(prepared, journal):
        _once(journal, key, partial(run_task, prepared, task, images, arms))


def results_of(journal: Journal) -> dict[str, dict[str, Any]]:
    """What is in a journal; of a task ("split images name") the arms and steps of all parts together."""
    found: dict[str, dict[str, Any]] = {}
    for key, record in journal.records.items():
        split, *rest = key.split(" ")
        if split not in SPLITS:
            found[key] = record["result"]
            continue
        unit = found.setdefault(" ".join((split, *rest[:2])), {})
        for arm, rows in record["result"].items():
            unit.setdefault(arm, {}).update(rows)
    return found


def folder_name(world: str) -> str:
    return world.replace(", ", "-").replace(" ", "")


def journal_at(world: str, path: Path) -> Journal:
    return Journal(path, {"world": asdict(WORLDS[world])})


def _once(journal: Journal, key: str, work: Callable[[], Any]) -> bool:
    """Whether this process did it; another may have, or be at it."""
    journal.refresh()
    if key in journal:
        return False
    with journal.claim(key) as mine:
        if not mine:
            return False
        result = work()
        journal.append(key, result)
        print(key, json.dumps(result)[:300], flush=True)
        return True


def _made(prepared: Prepared, kind: str) -> dict[str, Any]:
    prepared.make(kind, lambda name, done, total: None)
    zoo = prepared.zoo(kind)
    return {
        "facts": zoo.facts().get("clusters"),
        "entries": {e.name: e.steps for e in zoo.entries()},
        "commit": code(),
    }


def code() -> str:
    return commit(ROOT, "csrc", "mvp_ext", "benchmarks/experts")
