"""Do experts pay, and is it known when? Zoos of experts by cluster beside one universal model, where tasks differ.

    python benchmarks/experts.py run --files DATA --out runs/experts --seeds 0 1 2    # twice, to use two cores
    python benchmarks/experts.py report --out runs/experts
    # benchmarks/results/cpu/experts_<world>.json, and each seed's journal beside it

DATA holds image folders (or tars of them), CIFAR-100's parts and weights, as named in ``WORLDS``. One unit is a task in
one world under one training seed; what is finished is kept in a journal, and the same command goes on from there (also
from a committed journal, unpacked to OUT/<world>/seed<seed>/journal.jsonl).

A training seed draws which classes of each domain are hidden and which domains are held out, makes the base, the
universal model and the experts anew, and draws the tasks, each with few images of a class and with more (``IMAGES``).
Asked, before any of these seeds was run (``QUESTIONS``): is the default better than universal on known classes, also
where that has a head of what it knows of the classes, and is it not worse by a point on hidden classes and on domains
that nobody saw? Superiority is corrected over these questions (Holm), non-inferiority has an uncorrected 95 % interval.
Everything else is exploratory: what was built under one seed alone (``FIRST_SEED``) above all. The method itself was
chosen on seed 100.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import json
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from study.stats import Scores, holm, mean_of, paired
from torch import nn

from mvp_ext.app.environment import commit, environment
from mvp_ext.app.plots import MARKERS, Theme, add_legend, new_figure, to_png
from mvp_ext.data.images import ImageData, load_joined
from mvp_ext.data.tasks import Task, sample_tasks
from mvp_ext.journal import Journal
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_parameters
from mvp_ext.model.structure import Structure
from mvp_ext.pruning.build import build_refined_zoo, build_universal, pooled_task
from mvp_ext.pruning.clusters import build_clustered_zoo, expert_recipe
from mvp_ext.pruning.iterative import planned_steps
from mvp_ext.pruning.job import Job
from mvp_ext.pruning.methods import METHODS
from mvp_ext.pruning.prune import RunOptions, prune
from mvp_ext.pruning.settings import REFINED_WEIGHTING, Schedule, Settings, VoteOptions
from mvp_ext.storage import write_atomic
from mvp_ext.train.backbone import Backbone, extract_features, load_backbone
from mvp_ext.train.cost import use_clock
from mvp_ext.train.evaluate import accuracy_of
from mvp_ext.train.heads import ClassStatistics, ridge_head
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.shared import START, UNIVERSAL
from mvp_ext.zoo.zoo import Zoo

ROOT = Path(__file__).resolve().parent.parent
# Domain → its source, and of CIFAR-100 the superclasses.
DOMAINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "photo": ("pacs_photo", ()),
    "art": ("pacs_art_painting", ()),
    "cartoon": ("pacs_cartoon", ()),
    "imagenette": ("imagenette", ()),
    "textures": ("textures10", ()),
    "flowers": ("flowers5", ()),
    "digits": ("digits", ()),
    "fish": ("cifar100", ("fish", "aquatic_mammals", "reptiles")),
    "mammals": (
        "cifar100",
        ("large_carnivores", "large_omnivores_and_herbivores", "medium_mammals", "small_mammals"),
    ),
    "things": ("cifar100", ("household_electrical_devices", "household_furniture", "food_containers")),
}
# Of each seed; a seed that is not here holds out those of its number modulo 5.
HELD_OUT = (
    *(("textures", "cartoon"), ("flowers", "art"), ("digits", "fish")),
    *(("photo", "things"), ("imagenette", "mammals")),
)
CLASSES, ZOO_IMAGES = 4, 200
# Of a class, in a task.
IMAGES = (10, 50)
J = (0, 20, 40)


@dataclass(frozen=True)
class World:
    """A backbone and how much of it stays."""

    model: str
    weights: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scope: str
    keep: float
    steps: int


WORLDS = {
    "diverse": World(
        *("resnet18", "resnet18_cifar100_64px_fp16.safetensors", 64),
        *((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        *("all", 0.1, 1200),
    ),
}
WORLDS["diverse, keep 0.05"] = replace(WORLDS["diverse"], keep=0.05)


@dataclass
class Prepared:
    """One world under one training seed: its data, tasks, backbone and zoos."""

    world: World
    seed: int
    folder: Path
    files: Path

    @cached_property
    def data(self) -> ImageData:
        return load_images(self.files, self.folder.parent / "images", self.world.size)

    @cached_property
    def backbone(self) -> Backbone:
        world = self.world
        return load_backbone(
            world.model,
            weights=self.files / world.weights,
            image_size=world.size,
            mean=world.mean,
            std=world.std,
        )

    @cached_property
    def structure(self) -> Structure:
        return find_structure(self.backbone.model, self.world.scope)

    @cached_property
    def settings(self) -> Settings:
        schedule = Schedule(share=0.1, steps_per_round=3, final_steps=0)
        recipe = replace(Recipe.for_model(self.backbone.model), batch_size=64)
        settings = Settings(
            self.world.keep, self.world.scope, schedule=schedule, recipe=recipe, seed=self.seed
        )
        # All arms that make something once take as many steps.
        final = max(1, self.world.steps // len(self.tasks["zoo"]) - planned_steps(self.structure, settings))
        return replace(settings, schedule=replace(schedule, final_steps=final))

    @property
    def steps(self) -> int:
        return planned_steps(self.structure, self.settings) * len(self.tasks["zoo"])

    @cached_property
    def tasks(self) -> dict[str, list[Task]]:
        """The zoo's; those of known classes, of which the zoo's were drawn; of hidden ones; of held-out domains."""
        draw, found = random.Random(self.seed), {"zoo": [], "known": [], "hidden": [], "new": []}
        for domain, classes in domains_of(self.data).items():
            if domain in HELD_OUT[self.seed % len(HELD_OUT)]:
                count = min(CLASSES, len(classes) - 1)
                drawn = sample_tasks(self.data, 4, count, 3000 + self.seed, domain, classes=classes)
                found["new"] += drawn
                continue
            classes = draw.sample(classes, len(classes))
            hidden = max(2, round(0.4 * len(classes)))
            hidden, seen = classes[:hidden], classes[hidden:]
            if len(seen) > CLASSES:
                drawn = sample_tasks(self.data, 3, CLASSES, 1000 + self.seed, domain, classes=seen)
            else:
                drawn = [Task(f"{domain}-000", self.data, tuple(seen), 1000 + self.seed)]
            found["zoo"] += [replace(t, max_train_per_class=ZOO_IMAGES) for t in drawn]
            for split, pool, count in (("known", seen, 3), ("hidden", hidden, 2)):
                most = CLASSES if len(pool) > CLASSES else max(2, len(pool) - 1)
                for number in range(count):
                    chosen = tuple(draw.sample(pool, most))
                    name = f"{domain}-{split}-{number}"
                    seed = 5000 + self.seed + number
                    found[split].append(Task(name, self.data, chosen, seed))
        return found

    def zoo(self, kind: str) -> Zoo:
        return Zoo(self.folder / kind)

    def make(self, kind: str, say: Callable[[str, int, int], None]) -> None:
        """A zoo, or what is made once for all tasks; goes on where it was."""
        zoo, tasks, settings = self.zoo(kind), self.tasks["zoo"], self.settings
        if kind == "universal":
            build_universal(self.backbone, tasks, zoo, settings, steps=self.steps, progress=say)
        elif kind == "universal, experts' recipe":
            recipe = settings.recipe_for(self.backbone.model)
            settings = replace(settings, recipe=expert_recipe(recipe))
            build_universal(self.backbone, tasks, zoo, settings, steps=self.steps, progress=say)
        elif kind == "refined":
            build_refined_zoo(self.backbone, tasks, zoo, settings, progress=say)
        else:
            wide = min(1.0, 2 * settings.keep) if kind == "own masks" else None
            build_clustered_zoo(self.backbone, tasks, zoo, settings, base_keep=wide, progress=say)

    @cached_property
    def known_to_universal(self) -> tuple[list[str], nn.Module, ClassStatistics]:
        """The names of its classes, itself, and what is known of them by its features."""
        data = pooled_task(self.tasks["zoo"], "all", self.seed).split()
        stored = self.zoo("universal").shared(UNIVERSAL)
        assert stored is not None
        model = stored.load().model
        features = extract_features(model, data.train_images, self.backbone.preprocessing)
        return (
            list(data.class_names),
            model,
            ClassStatistics.of(features, data.train_labels, data.num_classes),
        )


def load_images(files: Path, folder: Path, size: int) -> ImageData:
    """All domains' as one data set; tars are unpacked once."""
    folder.mkdir(parents=True, exist_ok=True)
    sources: list[Any] = []
    for source in dict.fromkeys(source for source, _ in DOMAINS.values()):
        if source == "cifar100":
            sources.append(sorted(files.glob("cifar100_part*.npz")))
        elif source == "digits":
            sources.append(source)
        else:
            if not (folder / source).exists() and not (files / source).exists():
                _unpack(files / f"{source}.tar", folder / source)
            sources.append(files / source if (files / source).exists() else folder / source)
    return load_joined(sources, image_size=size)


def _unpack(path: Path, folder: Path) -> None:
    """The folder of this name in a tar; by several processes at once, too."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place, tarfile.open(path) as tar:
        tar.extractall(place, filter="data")
        # Another may have been faster: a folder that holds something is not replaced.
        with contextlib.suppress(OSError):
            Path(place, folder.name).rename(folder)


def domains_of(data: ImageData) -> dict[str, list[int]]:
    """Class numbers of each domain."""
    groups_of, names = data.superclass_of_class, data.superclass_names
    assert data.domains is not None
    assert groups_of is not None
    assert names is not None
    sources = list(dict.fromkeys(source for source, _ in DOMAINS.values()))
    group = {c: names[g].rpartition("/")[2] for c, g in enumerate(groups_of)}
    return {
        name: [c for c in data.domains[sources.index(source)] if not groups or group[c] in groups]
        for name, (source, groups) in DOMAINS.items()
    }


# ---- arms


def _universal_that_knows(prepared: Prepared, job: Job) -> tuple[nn.Module, Mask]:
    """The universal model with the same kind of head as the experts', and told which classes it knows."""
    small, mask = METHODS["universal"](job)
    names, model, statistics = prepared.known_to_universal
    labels = job.data.train_labels
    known = {c: names.index(name) for c, name in enumerate(job.data.class_names) if name in names}
    if len(known) >= 2:
        classes = torch.tensor(list(known))
        index = torch.isin(labels, classes).nonzero().flatten()
        targets = nn.functional.one_hot(labels, job.data.num_classes).float()
        targets[index[:, None], classes] = statistics.head(list(known.values()))(
            job.features_by(model, index)
        )
        job.targets = targets
    return small, mask


def _base(prepared: Prepared, job: Job) -> tuple[nn.Module, Mask]:
    start = job.start(prepared.zoo("clustered"))
    assert start is not None
    return copy.deepcopy(start.model), start.mask


_WEIGHTED = VoteOptions(similarity="proxy_leep", weighting=REFINED_WEIGHTING)


@dataclass(frozen=True)
class Arm:
    """``zoo``: what is made once for it; ``steps``: at which J it is run, and with how many ``images`` of a class.

    ``method`` is of ``prune``, or takes what is prepared and a job.
    """

    zoo: str | None
    method: Any
    vote: VoteOptions | None = None
    steps: tuple[Any, ...] = (20,)
    images: tuple[int, ...] = IMAGES


ARMS = {
    "default": Arm("clustered", "clustered", steps=(*J, "auto")),
    "universal": Arm("universal", "universal", steps=J),
    "universal, head of what it knows": Arm("universal", _universal_that_knows, steps=(0, 20)),
    "experts merged, labels alone": Arm("clustered", "mvp", _WEIGHTED, (0, 20)),
    "base of the default": Arm("clustered", _base, None, (20,), (50,)),
    "universal, experts' recipe": Arm("universal, experts' recipe", "universal", None, (0, 20)),
    "own masks": Arm("own masks", "clustered", None, (0, 20)),
    "refined": Arm("refined", "refined", _WEIGHTED, (20,), (50,)),
    "one-shot Taylor": Arm(None, "one_shot", None, (20,), (50,)),
    "random": Arm(None, "random", None, (20,), (50,)),
}
# Dear, and no question is about them: in the first world alone.
FIRST_SEED = (
    *("universal, experts' recipe", "own masks", "refined"),
    *("one-shot Taylor", "random"),
)
SPLITS = ("known", "hidden", "new")


def arms_of(prepared: Prepared) -> dict[str, Arm]:
    """Those that are run in a world under a training seed."""
    first = (prepared.world, prepared.seed) == (WORLDS["diverse"], 0)
    return {name: arm for name, arm in ARMS.items() if first or name not in FIRST_SEED}


def run_task(prepared: Prepared, task: Task, images: int) -> dict[str, Any]:
    """Accuracy and cost of every arm, and of a ridge head on the dense model."""
    task = replace(task, max_train_per_class=images)
    backbone, data = prepared.backbone, task.split()
    train = extract_features(backbone.model, data.train_images, backbone.preprocessing)
    test = extract_features(backbone.model, data.test_images, backbone.preprocessing)
    head = ridge_head(train, data.train_labels, data.num_classes)
    rows: dict[str, Any] = {
        "dense, ridge head": {"0": {"accuracy": accuracy_of(head(test), data.test_labels)}}
    }
    # Every arm's class means are of the dense model's pass; its seconds are nobody's.
    known = RunOptions(features=(train, 0.0))
    for name, arm in arms_of(prepared).items():
        if images not in arm.images:
            continue
        method = arm.method if isinstance(arm.method, str) else partial(arm.method, prepared)
        if not isinstance(method, str):
            method.__name__ = name  # type: ignore[attr-defined]
        for steps in arm.steps:
            if steps == J[-1] and (prepared.seed, images) != (0, IMAGES[-1]):
                continue
            result = prune(
                backbone,
                task,
                None if arm.zoo is None else prepared.zoo(arm.zoo),
                replace(prepared.settings, seed=prepared.seed),
                method=method,
                steps=steps,
                vote=arm.vote,
                run=known,
            )
            rows.setdefault(name, {})[str(steps)] = {
                "accuracy": result.accuracy,
                "seconds": result.cost.seconds,
                "flops": result.cost.flops,
                "steps": result.cost.steps,
                "choice": result.choice,
                "neighbours": result.neighbours[:3],
            }
    return rows


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    use_clock(time.process_time)
    seeds = []
    for name in options.worlds:
        for seed in options.seeds:
            folder = options.out / _folder_name(name) / f"seed{seed}"
            prepared = Prepared(WORLDS[name], seed, folder, options.files)
            seeds.append((prepared, _journal(name, folder / "journal.jsonl")))
    for number in range(len(seeds)):
        # Whoever waits for the other process makes what later seeds need.
        while not _all_made(*seeds[number]):
            if not any(_make_one(*later) for later in seeds[number:]):
                time.sleep(5)
        _run_seed(*seeds[number])


def _kinds(prepared: Prepared) -> list[str]:
    return list(dict.fromkeys(arm.zoo for arm in arms_of(prepared).values() if arm.zoo))


def _all_made(prepared: Prepared, journal: Journal) -> bool:
    journal.refresh()
    return all(f"make {kind}" in journal for kind in _kinds(prepared))


def _make_one(prepared: Prepared, journal: Journal) -> bool:
    return any(_once(journal, f"make {kind}", partial(_made, prepared, kind)) for kind in _kinds(prepared))


def _run_seed(prepared: Prepared, journal: Journal) -> None:
    names = {split: {t.name: list(t.class_names) for t in tasks} for split, tasks in prepared.tasks.items()}
    _once(journal, "tasks", lambda: names)
    for split in SPLITS:
        for task in prepared.tasks[split]:
            for images in IMAGES:
                _once(journal, f"{split} {images} {task.name}", partial(run_task, prepared, task, images))


def _folder_name(world: str) -> str:
    return world.replace(", ", "-").replace(" ", "")


def _journal(world: str, path: Path) -> Journal:
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
        "commit": _commit(),
    }


def _commit() -> str:
    return commit(ROOT, "csrc", "mvp_ext", "benchmarks/*.py")


# ---- what it says


@dataclass(frozen=True)
class Question:
    """``first`` − ``second`` at equal J: above 0 ("superior"), or not below −1 point ("not inferior")."""

    kind: str
    split: str
    images: int
    second: str
    first: str = "default"
    steps: str = "20"


QUESTIONS = tuple(
    Question(kind, split, images, second)
    for images in IMAGES
    for kind, split, second in (
        ("superior", "known", "universal"),
        ("superior", "known", "universal, head of what it knows"),
        ("not inferior", "hidden", "universal"),
        ("not inferior", "new", "universal"),
    )
)
MARGIN = 0.01


def report(options: argparse.Namespace) -> None:
    for name in options.worlds:
        folder = options.out / _folder_name(name)
        journals = {
            int(path.parent.name.removeprefix("seed")): {
                key: record["result"] for key, record in _journal(name, path).records.items()
            }
            for path in sorted(folder.glob("seed*/journal.jsonl"))
        }
        # One that was only begun has no tasks yet.
        journals = {seed: found for seed, found in journals.items() if "tasks" in found}
        result = {
            "setting": {
                "world": asdict(WORLDS[name]),
                "seeds": sorted(journals),
                "held out": {seed: HELD_OUT[seed % len(HELD_OUT)] for seed in sorted(journals)},
                "command": f"python benchmarks/experts.py run --seeds {' '.join(map(str, sorted(journals)))}",
                "commit": _commit(),
            },
            "environment": environment(),
            "made": {
                seed: {k: v for k, v in found.items() if k.startswith("make")}
                for seed, found in journals.items()
            },
            "arms": {
                f"{split}, {images} images": _table(journals, f"{split} {images}")
                for images in IMAGES
                for split in SPLITS
            },
            "questions": _answers(journals),
            "by known share": _by_known_share(journals),
            "latency": _latency(
                Prepared(WORLDS[name], min(journals), folder / f"seed{min(journals)}", options.files)
            ),
        }
        path = ROOT / "benchmarks" / "results" / "cpu" / f"experts_{_folder_name(name)}.json"
        write_atomic(path, f"{json.dumps(result, indent=1)}\n".encode())
        for images in IMAGES:
            figure = to_png(partial(accuracy_against_cost, result["arms"][f"known, {images} images"]))
            place = ROOT / "docs" / "figures" / path.stem / f"known_{images}_images.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, figure)
        for seed in journals:
            text = (folder / f"seed{seed}" / "journal.jsonl").read_bytes()
            write_atomic(path.with_name(f"{path.stem}_seed{seed}.jsonl.gz"), gzip.compress(text, mtime=0))
        for split, table in result["arms"].items():
            for arm, points in table.items():
                print(f"{split:20}{arm:34}", "  ".join(f"J {j}: {p['text']}" for j, p in points.items()))
        for answer in result["questions"]:
            print(json.dumps(answer))


def _by_known_share(journals: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Default minus universal at 20 steps, of tasks of all splits, by the share of classes that the zoo knows."""
    found = []
    for images in IMAGES:
        tasks = [
            (rows["default"]["20"]["choice"]["known_share"], f"{seed} {key}", seed, rows)
            for seed, made in journals.items()
            for key, rows in made.items()
            if key.split(" ")[1:2] == [str(images)]
        ]
        for low, high in ((0.0, 0.0), (0.01, 0.5), (0.51, 0.99), (1.0, 1.0)):
            some = [task for task in tasks if low <= task[0] <= high]
            scores = (
                {(key, seed): rows[arm]["20"]["accuracy"] for _, key, seed, rows in some}
                for arm in ("default", "universal")
            )
            if (difference := paired(*scores)) is not None:
                found.append({"images": images, "from": low, "to": high, **asdict(difference)})
    return found


def _latency(prepared: Prepared) -> dict[str, Any] | None:
    """Milliseconds for one image on one core, the dense and the pruned model in turn; None where the zoo is gone."""
    zoo = prepared.zoo("clustered")
    if (stored := zoo.shared(START)) is None:
        return None
    torch.set_num_threads(1)
    size = prepared.backbone.preprocessing.size
    models = {"dense": prepared.backbone.model.eval(), "pruned": stored.load().model}
    image, times = torch.randn(1, 3, size, size), {name: list[float]() for name in models}
    with torch.inference_mode():
        for _ in range(60):
            for name, model in models.items():
                began = time.perf_counter()
                model(image)
                times[name].append(1000 * (time.perf_counter() - began))
    return {
        name: {"median_ms": statistics.median(taken[10:]), "parameters": count_parameters(models[name])}
        for name, taken in times.items()
    }


def accuracy_against_cost(arms: dict[str, dict[str, Any]], theme: Theme) -> Figure:
    """Mean accuracy of an arm after so many steps against the seconds of a task, and the dense model's.

    Of those arms that were run on all tasks.
    """
    figure, axes = new_figure(theme, 7.2, 4.0)
    # Of other tasks a mean is another one.
    tasks = arms["universal"]["20"]["tasks"]
    shown = [name for name, points in arms.items() if len(points) > 1 and points["20"]["tasks"] == tasks]
    for position, (mark, name) in enumerate(zip(MARKERS, shown, strict=False)):
        points = [
            (p["seconds a task"], 100 * p["accuracy"])
            for j, p in arms[name].items()
            if j != "auto" and p["tasks"] == tasks
        ]
        axes.plot(
            *zip(*points, strict=True), marker=mark, ms=5, lw=1.2, color=theme.colour(position), label=name
        )
    if (dense := arms.get("dense, ridge head")) is not None:
        axes.axhline(
            100 * dense["0"]["accuracy"], color=theme.muted, lw=1, ls="--", label="dense, ridge head"
        )
    axes.set_xlabel("seconds a task, one core (0 and 20 steps)")
    axes.set_ylabel("test accuracy (%), classes that the zoo knows")
    add_legend(axes, theme)
    return figure


def scores_of(
    journals: dict[int, dict[str, Any]], split: str, arm: str, steps: str, what: str = "accuracy"
) -> Scores:
    """(task, training seed) → accuracy. Tasks of different seeds are different tasks."""
    return {
        (f"{seed} {key}", seed): rows[arm][steps].get(what, 0.0)
        for seed, found in journals.items()
        for key, rows in found.items()
        if key.startswith(f"{split} ") and steps in rows.get(arm, {})
    }


# Tasks of which a mean is shown: a journal may have a few units of arms that were dropped later.
_FEWEST = 5


def _table(journals: dict[int, dict[str, Any]], split: str) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for arm in ("dense, ridge head", *ARMS):
        for steps in ("0", *(str(j) for j in J if j), "auto"):
            scores = scores_of(journals, split, arm, steps)
            if len(scores) < _FEWEST:
                continue
            mean = mean_of(scores)
            against = paired(scores, scores_of(journals, split, "universal", steps))
            text = mean.percent()
            if against is not None and arm != "universal":
                text += f" ({against.percent})"
            costs = scores_of(journals, split, arm, steps, "seconds").values()
            table.setdefault(arm, {})[steps] = {
                "tasks": len(scores),
                "accuracy": mean.value,
                "error": mean.error,
                "minus universal": None if against is None else asdict(against),
                "seconds a task": sum(costs) / len(costs),
                "text": text,
            }
    return table


def _answers(journals: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for question in QUESTIONS:
        first, second = (
            scores_of(journals, f"{question.split} {question.images}", arm, question.steps)
            for arm in (question.first, question.second)
        )
        over_tasks = paired(first, second)
        if over_tasks is None:
            continue
        by_seed = {
            seed: mean_of({k: v for k, v in first.items() if k[1] == seed}).value
            - mean_of({k: v for k, v in second.items() if k[1] == seed}).value
            for seed in sorted(journals)
        }
        over_seeds = paired({(s, 0): v for s, v in by_seed.items()}, {(s, 0): 0.0 for s in by_seed})
        found.append(
            {
                **asdict(question),
                "over tasks": asdict(over_tasks),
                "over seeds": asdict(over_seeds),
                "by seed": by_seed,
            }
        )
    superior = [answer for answer in found if answer["kind"] == "superior"]
    for answer, p in zip(superior, holm([a["over tasks"]["p"] for a in superior]), strict=True):
        answer["corrected p"] = p
        answer["holds"] = p < 0.05 and answer["over tasks"]["difference"] > 0
    for answer in found:
        if answer["kind"] == "not inferior":
            answer["holds"] = answer["over tasks"]["low"] > -MARGIN
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Do experts pay?")
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--files", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=["diverse"])
    options = parser.parse_args()
    (run if options.what == "run" else report)(options)


if __name__ == "__main__":
    main()
