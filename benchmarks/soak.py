"""Two hundred tiny tasks on workers that are killed at random: nothing is lost, nothing is there twice, no bit differs.

    python benchmarks/soak.py                     # benchmarks/results/cpu/soak.json
    python benchmarks/soak.py --tasks 20 --out soak.json

Every few seconds one of the workers that are at a task gets SIGKILL. Afterwards the zoo is compared with one that this
process built alone. Ends with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mvp_ext.app.environment import command, commit, environment
from mvp_ext.cluster.workers import ray_workers
from mvp_ext.data.images import load_data
from mvp_ext.data.tasks import Task
from mvp_ext.model.create import create_model
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.pruning.build import EntryJob, Progress, build_zoo
from mvp_ext.pruning.result import Result
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.storage import write_atomic
from mvp_ext.train.backbone import Backbone
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.zoo import Zoo, ZooEntry

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = Settings(
    keep=0.5,
    schedule=Schedule(share=0.5, steps_per_round=1, final_steps=8),
    recipe=Recipe(batch_size=8, precision="float32"),
)


def busy_workers() -> list[int]:
    """Processes below this one that are at a task: Ray calls them after it."""
    parents, at_work = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if (process / "cmdline").read_bytes().startswith(b"ray::task-"):
                at_work.append(int(process.name))

    def ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid in at_work if ours(pid)]


class Killer(threading.Thread):
    """Kills a worker every so often, until it is told to stop."""

    def __init__(self, seconds: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.kills, self.done = 0, threading.Event()
        self._draw, self._seconds = random.Random(seed), seconds

    def run(self) -> None:
        while not self.done.wait(self._draw.uniform(0, 2 * self._seconds)):
            if found := busy_workers():
                with suppress(ProcessLookupError):
                    os.kill(self._draw.choice(found), signal.SIGKILL)
                    self.kills += 1


def same(mine: ZooEntry, theirs: ZooEntry) -> bool:
    a, b = mine.read(), theirs.read()
    return (
        (mine.task, a.mask, a.card.metrics, a.state.keys())
        == (theirs.task, b.mask, b.card.metrics, b.state.keys())
    ) and all(torch.equal(value, b.state[name]) for name, value in a.state.items())


def soak(folder: Path, count: int, workers: int, seconds: float, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = create_model("test_resnet", num_classes=5).eval()
    backbone = Backbone(model, Preprocessing(16, (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)))
    data, pairs = load_data("digits"), itertools.cycle(itertools.combinations(range(10), 2))
    tasks = [
        Task(f"task-{number:03d}", data, pair, number, max_train_per_class=12)
        for number, pair in zip(range(count), pairs, strict=False)
    ]
    came: Counter[str] = Counter()

    def say(what: str, done: int, total: int) -> None:
        if done == total:
            print(f"{what}; {len(came)} of {count} are done, {killer.kills} workers were killed", flush=True)

    killer = Killer(seconds, seed)
    with ray_workers(workers, cpus_per_task=1) as run:

        def counted(jobs: Iterable[EntryJob], progress: Progress | None) -> Iterator[Result]:
            for result in run(jobs, progress):
                came[result.task.name] += 1
                yield result

        killer.start()
        began = time.monotonic()
        together = Zoo(folder / "together")
        build_zoo(backbone, tasks, together, SETTINGS, progress=say, run=counted)
        took = time.monotonic() - began
        killer.done.set()
        killer.join()
    began = time.monotonic()
    alone = Zoo(folder / "alone")
    build_zoo(backbone, tasks, alone, SETTINGS)
    found = {entry.name: entry for entry in together}
    return {
        "tasks": count,
        "workers": workers,
        "killed": killer.kills,
        "seconds": round(took, 1),
        "seconds_alone": round(time.monotonic() - began, 1),
        "lost": sorted({task.name for task in tasks} - found.keys()),
        "twice": sorted(name for name, times in came.items() if times > 1),
        "different": sorted(e.name for e in alone if e.name in found and not same(e, found[e.name])),
        "problems": list(map(str, together.verify())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="between two kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu" / "soak.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), given.tasks, given.workers, given.seconds, given.seed)
    content = {
        "setting": {"command": command(ROOT), "commit": commit(ROOT, "mvp_ext", "benchmarks/soak.py")},
        "environment": environment(),
        "soak": found,
    }
    write_atomic(given.out, f"{json.dumps(content, indent=1)}\n".encode())
    print(json.dumps(found, indent=1))
    sys.exit(any(found[name] for name in ("lost", "twice", "different", "problems")))


if __name__ == "__main__":
    main()
