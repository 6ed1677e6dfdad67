"""How cost grows: with the entries of a zoo, the classes of a task, the size of the model, and workers.

    python benchmarks/scale.py                    # benchmarks/results/cpu/scale.json, 10 to 10,000 entries

- ``entries``: zoos of resnet18 with real rows (10 classes, features of width 512; files are holes): the index's size,
  to open it, to find a task's 5 nearest, to vote among all; and ``prune`` of a tiny model by a zoo of as many entries.
- ``classes``: to find the nearest among 1,000 entries of so many classes each.
- ``models``: one training step, and the file of an entry.
- ``workers``: entries pruned from scratch by this process, and by workers of Ray with a core each (`mvp_ext[ray]`).
- ``driver``: to add one finished entry to a zoo, durably: what a single writer does for each.
- ``steps``: optimizer steps that the default settings plan, for one task.

Times are medians of three, in one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from bench_neighbours import VOTERS, add_rows, make_case  # noqa: E402

from mvp_ext.app.environment import command, commit, environment  # noqa: E402
from mvp_ext.cluster.workers import ray_workers  # noqa: E402
from mvp_ext.data.images import load_data  # noqa: E402
from mvp_ext.data.tasks import Task, sample_tasks  # noqa: E402
from mvp_ext.model.create import create_model  # noqa: E402
from mvp_ext.model.families import find_structure  # noqa: E402
from mvp_ext.model.mask import Mask  # noqa: E402
from mvp_ext.model.measure import count_flops  # noqa: E402
from mvp_ext.model.preprocessing import Preprocessing  # noqa: E402
from mvp_ext.model.surgery import prune_model  # noqa: E402
from mvp_ext.pruning.build import (  # noqa: E402
    UNIVERSAL_SHARE,
    Run,
    build_zoo,
    one_by_one,
    planned_zoo_steps,
)
from mvp_ext.pruning.prune import prune  # noqa: E402
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions  # noqa: E402
from mvp_ext.pruning.vote import vote_mask  # noqa: E402
from mvp_ext.storage import write_atomic  # noqa: E402
from mvp_ext.train.backbone import Backbone  # noqa: E402
from mvp_ext.train.recipe import Recipe  # noqa: E402
from mvp_ext.train.trainer import Trainer  # noqa: E402
from mvp_ext.zoo.entry import NewEntry  # noqa: E402
from mvp_ext.zoo.zoo import Zoo  # noqa: E402

ENTRIES, CLASSES, MODELS = (10, 100, 1000, 10_000), (2, 10, 100), ("resnet18", "resnet50")
WORKERS = (1, 2)
AMONG, BATCH, PIXELS, TIMES = 1000, 32, 64, 3
SEE = Preprocessing(32, (0.3,) * 3, (0.35,) * 3)


def seconds(call: Callable[[], object], times: int = TIMES) -> float:
    """The median."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 6)


def by_entries(count: int, folder: Path) -> dict[str, Any]:
    case = make_case(folder / "rows", count, real_files=False)
    masks = [entry.mask for entry in case.zoo.entries()]
    backbone, task, zoo = tiny_zoo(count, folder / "tiny")
    vote = VoteOptions(VOTERS, similarity="proxy_leep")
    return {
        "entries": count,
        "index_bytes": (case.path / "index.sqlite").stat().st_size,
        "open_seconds": seconds(lambda: Zoo(case.path)),
        "nearest_seconds": seconds(case.opened),
        "vote_seconds": seconds(lambda: vote_mask(masks, case.target.structure, keep=0.3)),
        "prune_seconds": seconds(lambda: prune(backbone, task, zoo, method="mvp", steps=0, vote=vote)),
    }


def tiny_zoo(count: int, path: Path) -> tuple[Backbone, Task, Zoo]:
    """A backbone, a task of digits, and a zoo of so many entries that have one model in common."""
    torch.manual_seed(0)
    backbone, task = Backbone(create_model("test_resnet", num_classes=10), SEE), digits(1)[0]
    structure, zoo = find_structure(backbone.model), Zoo(path)
    mask = Mask.random(structure, 0.5, 0)
    small = prune_model(backbone.copy_model(), mask, structure=structure)
    means = torch.rand(count, 10, int(small.num_features))  # type: ignore[arg-type]
    tensors = {"class_means": means[0], "temperature": torch.tensor(5.0)}
    zoo.add_model(NewEntry("task-0000", small, mask, structure, {"name": "task-0000"}, tensors=tensors))
    add_rows(path, [mask] * count, means, linked=True)
    return backbone, task, zoo


def digits(count: int) -> list[Task]:
    return sample_tasks(load_data("digits"), count, 3, seed=0)


def by_model(name: str, pixels: int) -> dict[str, Any]:
    see = replace(SEE, size=pixels)
    data = digits(1)[0].split()
    model = create_model(name, num_classes=data.num_classes)
    trainer = Trainer(model, data, see, Recipe(batch_size=BATCH), seed=0)
    trainer.run(1)
    return {
        "model": name,
        "pixels": pixels,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": count_flops(model, (3, pixels, pixels)),
        "step_seconds": seconds(lambda: trainer.run(1)),
    }


def by_workers(workers: int, tasks: int, folder: Path) -> dict[str, Any]:
    """By this process, or by so many workers of Ray, of a core each, that have made an entry before."""
    torch.manual_seed(0)
    backbone = Backbone(create_model("test_resnet", num_classes=10), SEE)
    schedule = Schedule(share=0.5, steps_per_round=2, final_steps=10)
    settings = Settings(0.5, schedule=schedule)

    def build(name: str, tasks: list[Task], run: Run) -> None:
        build_zoo(backbone, tasks, Zoo(folder / f"{name}-{workers}"), settings, run=run)

    with nullcontext(one_by_one) if workers == 1 else ray_workers(workers, cpus_per_task=1) as run:
        build("warm", digits(tasks)[:workers], run)
        taken = seconds(lambda: build("timed", digits(tasks), run), 1)
    return {"workers": workers, "entries": tasks, "seconds": taken}


def of_the_driver(folder: Path) -> dict[str, Any]:
    model = create_model("resnet18", num_classes=10)
    structure, zoo, names = find_structure(model), Zoo(folder / "driver"), iter(range(TIMES))
    mask = Mask.random(structure, 0.3, 0)
    small = prune_model(model, mask, structure=structure)
    tensors = {"class_means": torch.rand(10, 512), "temperature": torch.tensor(5.0)}

    def add() -> None:
        name = f"task-{next(names)}"
        zoo.add_model(NewEntry(name, small, mask, structure, {"name": name}, tensors=tensors))

    taken = seconds(add)
    return {"add_seconds": taken, "entry_bytes": next(iter(zoo)).path.stat().st_size}


def planned() -> dict[str, Any]:
    settings = Settings()
    shared, each = planned_zoo_steps(find_structure(create_model("resnet18")), settings, 1000)
    return {
        "share": UNIVERSAL_SHARE,
        "universal_a_task": shared / 1000,
        "entry": each,
        "batch": Recipe().batch_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How cost grows with entries, classes, models and workers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu", help="a folder")
    parser.add_argument("--dry-run", action="store_true", help="small zoos, a tiny model")
    options = parser.parse_args()
    dry = options.dry_run
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "setting": {
            "voters": VOTERS,
            "among": 10 if dry else AMONG,
            "batch": BATCH,
            "threads": 1,
            "command": command(ROOT),
            "commit": commit(ROOT, "csrc", "mvp_ext", "benchmarks/*.py"),
        },
        "environment": environment(),
        **{part: [] for part in ("entries", "classes", "models", "workers")},
    }

    def add(part: str, row: dict[str, Any]) -> None:
        print(f"{part}: {row}", flush=True)
        result[part].append(row)

    for count in (2,) if dry else ENTRIES:
        with tempfile.TemporaryDirectory() as folder:
            add("entries", by_entries(count, Path(folder)))
    for classes in (2,) if dry else CLASSES:
        with tempfile.TemporaryDirectory() as folder:
            count = result["setting"]["among"]
            one = Mask.random(find_structure(create_model("resnet18")), 0.3, 0)
            case = make_case(
                Path(folder) / "zoo", count, real_files=False, classes=classes, masks=[one] * count
            )
            add("classes", {"classes": classes, "nearest_seconds": seconds(case.opened)})
    for name in ("test_resnet",) if dry else MODELS:
        add("models", by_model(name, PIXELS))
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1,) if dry else WORKERS:
            add("workers", by_workers(workers, 2 if dry else 24, Path(folder)))
        result |= {"driver": of_the_driver(Path(folder)), "steps": planned()}
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "scale.json", f"{json.dumps(result, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
