"""Arms compared on held-out tasks: every method at the same keep ratio, the same shapes and with the same head refit.

What is finished is written down at once, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from mvp_ext.app.environment import environment
from mvp_ext.app.results import FORMAT
from mvp_ext.cluster.workers import Workers
from mvp_ext.data.images import ImageData
from mvp_ext.data.tasks import Task
from mvp_ext.journal import Journal
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import measure
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.build import Progress
from mvp_ext.pruning.iterative import planned_steps
from mvp_ext.pruning.methods import method_for
from mvp_ext.pruning.prune import RunOptions, prune, seen_by
from mvp_ext.pruning.settings import Settings, VoteOptions
from mvp_ext.train.backbone import Backbone, BackboneIdentity, extract_features, fresh_head
from mvp_ext.train.cost import Cost
from mvp_ext.zoo.neighbours import proxy_leep
from mvp_ext.zoo.shared import START
from mvp_ext.zoo.zoo import Zoo, ZooEntry

NAMES = {
    "clustered": "MVP, clustered",
    "refined": "MVP, refined",
    "mvp": "MVP",
    "universal": "universal model",
    "one_shot": "one-shot Taylor",
    "random": "random sub-network",
    "ifp": "iterative from scratch",
}
CONTROLS = ("universal", "one_shot", "random", "ifp")
NEED_ZOO = ("auto", "clustered", "refined", "mvp", "universal")
# Training images of a task that say how near another one is.
OVERLAP_IMAGES = 500


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        settings: what is pruned and how it is trained, for every arm alike; task i uses ``settings.seed + i``. The
            schedule is that of iterative pruning from scratch.
        steps: fine-tuning steps of each arm after its start (iterative pruning has its own, in the schedule).
        vote: of the arms that ask the zoo.
        arms: methods of ``prune``; the first is the one at issue. Empty: what suits the zoo, and the controls.
        rates: method → learning rate, where it is another. One rate for all would favour whoever it suits.
        batches, seconds: batch sizes at which latency is measured, and for how long each model.
    """

    settings: Settings = field(default_factory=Settings)
    steps: int = 60
    vote: VoteOptions = field(default_factory=VoteOptions)
    arms: Sequence[str] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    batches: tuple[int, ...] = (1, 32)
    seconds: float = 1.0

    def last_steps(self, method: str) -> int:
        """Fine-tuning steps at the final shapes."""
        return self.settings.schedule.final_steps if method == "ifp" else self.steps

    def all_steps(self, method: str, structure: Structure) -> int:
        """Optimizer steps of one run."""
        return planned_steps(structure, self.settings) if method == "ifp" else self.steps

    def evaluate_at(self, method: str, structure: Structure) -> tuple[int, ...]:
        """Steps at which accuracy is looked at: few, for each costs two passes over the task's images."""
        total = self.all_steps(method, structure)
        return tuple(sorted({0, *(math.ceil(total * share) for share in (0.17, 0.5, 1.0))}))

    def settings_of(self, method: str, position: int, model: nn.Module) -> Settings:
        """The settings of one arm on the task at ``position``. The dense model is not cut."""
        recipe = self.settings.recipe_for(model)
        recipe = recipe.with_rate(self.rates.get(method, recipe.learning_rate))
        keep = 1.0 if method == "dense" else self.settings.keep
        return replace(self.settings, keep=keep, recipe=recipe, seed=self.settings.seed + position)


@dataclass(frozen=True, eq=False)
class ArmJob:
    """One arm on one task, to be run here or in another process; ``name`` is what progress is told of it."""

    backbone: Backbone
    task: Task
    zoo: Zoo
    method: str
    options: Comparison
    position: int
    name: str


def arms_of(zoo: Zoo, options: Comparison, unrefined: Zoo | None = None) -> tuple[str, ...]:
    """The methods that are compared: those asked for, or what suits the zoo and the controls."""
    suits = (method_for(zoo), *(("mvp",) if unrefined is not None else ()))
    return tuple(options.arms) or (*suits, *CONTROLS)


def compare(
    model: nn.Module | Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    options: Comparison | None = None,
    *,
    unrefined: Zoo | None = None,
    title: str = "Pruned models for new tasks",
    notes: Sequence[str] = (),
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Run every arm on every task and measure the models; the format of the result is that of ``results.py``.

    Args:
        model: the dense backbone.
        tasks: held-out tasks; an entry of a task's own name never votes on it.
        zoo: the voters, and the universal model.
        unrefined: a zoo of entries that were pruned one by one, where ``zoo`` refines one model: the voters of "mvp",
            and whose masks can overlap. It is one more arm by default.
        journal: a file that keeps each finished run; runs that it already has, of the same options, are not repeated.
        workers: of ``ray_workers``, who see the zoos' folders too: several runs at once. Seconds are then those of so
            many side by side.

    Raises:
        ValueError: no task, no arm. ZooError: the zoo has no entry, or is of another backbone.
    """
    options = options or Comparison()
    if not tasks:
        raise ValueError("compare: expected at least one task, got none")
    methods = arms_of(zoo, options, unrefined)
    voters = {"mvp": unrefined} if unrefined is not None else {}
    if unknown := [method for method in methods if method not in NAMES]:
        raise ValueError(f"compare: arms: expected some of {', '.join(NAMES)}, got {unknown[0]!r}")
    backbone = seen_by(zoo, model)
    structure = find_structure(backbone.model, options.settings.scope)
    done = FinishedRuns(
        journal,
        _identity(backbone, structure, options),
        voters=[e for z in (zoo, unrefined) if z is not None for e in z.entries(structure.fingerprint)],
    )

    def tell_finished(job: ArmJob) -> None:
        if progress is not None and job.method != "dense":
            steps = options.all_steps(job.method, structure)
            progress(job.name, steps, steps)

    waiting = []
    for position, task in enumerate(tasks):
        for method in (*methods, "dense"):
            name = task.name if method == "dense" else f"{task.name}, {NAMES[method]}"
            job = ArmJob(backbone, task, voters.get(method, zoo), method, options, position, name)
            if done.get(task, method) is None:
                waiting.append(job)
            else:
                tell_finished(job)
    made = ((job, run_arm(job, progress)) for job in waiting)
    for job, run in made if workers is None else workers.map(run_arm, waiting, progress):
        done.put(job.task, job.method, run)
        tell_finished(job)
    arms: list[dict[str, Any]] = [
        {"name": NAMES[method], "tasks": [done.result(task, method) for task in tasks]} for method in methods
    ]
    dense = [done.result(task, "dense")["accuracy"] for task in tasks]
    models = _measure(backbone, structure, arms, options, tasks[0])
    return {
        "format": FORMAT,
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "setting": _setting(backbone, structure, tasks, zoo, options),
        "keep": options.settings.keep,
        "models": models,
        "arms": arms,
        "dense_accuracy": math.fsum(dense) / len(dense),
        "overlap": overlaps(
            backbone,
            structure,
            zoo if unrefined is None else unrefined,
            tasks[0].data,
            seed=options.settings.seed,
        ),
        "layers": [
            {
                "name": layer.name,
                "units": layer.units,
                "kept": {arm["name"]: arm["tasks"][0]["kept"][layer.name] for arm in arms},
            }
            for layer in structure
        ],
        "zoo": zoo_cost(zoo, structure),
        "notes": list(notes),
    }


def overlaps(
    backbone: Backbone, structure: Structure, zoo: Zoo, data: ImageData, *, seed: int = 0
) -> list[dict[str, Any]]:
    """For each pair of the zoo's tasks: similarity (proxy-LEEP, mean of both directions) and IoU of the masks.

    The IoU is given for the shallower and the deeper half of the layers apart. Entries of other data are left out.
    Where all have one mask, as those that refine one model do, there is nothing to say.
    """
    entries = [e for e in zoo.entries(structure.fingerprint) if not _foreign(e, data)]
    if len({e.mask for e in entries}) < 2:
        return []
    known = {k.name: k for k in zoo.class_means(structure.fingerprint)}
    means = [known[e.name] for e in entries]
    near = torch.zeros(len(entries), len(entries), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for j, entry in enumerate(entries):
        task = Task.from_dict(entry.task, data).split()
        chosen = torch.randperm(len(task.train_labels), generator=generator)[:OVERLAP_IMAGES]
        features = extract_features(backbone.model, task.train_images[chosen], backbone.preprocessing)
        near[:, j] = proxy_leep(means, features, task.train_labels[chosen])
    half = len(structure) // 2
    points = []
    for j, second in enumerate(entries):
        for i, first in enumerate(entries[:j]):
            per_layer = [first.mask.iou(second.mask, per_layer=True)[name] for name in structure.names]  # type: ignore[index]
            halves = {"shallower half of the layers": per_layer[:half], "deeper half": per_layer[half:]}
            for group, values in halves.items():
                if values:
                    iou = math.fsum(values) / len(values)
                    points.append(
                        {"similarity": float(near[i, j] + near[j, i]) / 2, "iou": iou, "group": group}
                    )
    return points


def zoo_cost(zoo: Zoo, structure: Structure | None = None) -> dict[str, Any]:
    """What the zoo's entries, and the model that they start from, cost together; and the entries' mean accuracy."""
    entries = zoo.entries(None if structure is None else structure.fingerprint)
    costs = [Cost.from_dict(e.cost) for e in entries]
    start = zoo.shared(START)
    if start is not None and (made := start.extra.get("result")):
        costs.append(Cost.from_dict(made["cost"]))
    known = [e.accuracy for e in entries if e.accuracy is not None]
    return {
        "entries": len(entries),
        "seconds": math.fsum(c.seconds for c in costs),
        "flops": sum(c.flops for c in costs),
        "accuracy": math.fsum(known) / len(known) if known else None,
    }


class FinishedRuns:
    """The runs of what was asked for, kept in a journal; ``path`` None: in memory only.

    ``voters``: a run that used the zoo counts as finished only for the same entries.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        identity: Mapping[str, Any],
        voters: Sequence[ZooEntry] = (),
    ) -> None:
        self._journal = Journal(path, identity)
        self._voters = hashlib.sha256("".join(sorted(e.sha256 for e in voters)).encode()).hexdigest()[:16]

    def get(self, task: Task, method: str) -> dict[str, Any] | None:
        """The run of this method on exactly this task (its images, not only its name)."""
        return self.result(task, method) if self._key(task, method) in self._journal else None

    def result(self, task: Task, method: str) -> dict[str, Any]:
        """As ``get``; KeyError where it is not finished."""
        found: dict[str, Any] = self._journal.result(self._key(task, method))
        return found

    def put(self, task: Task, method: str, run: dict[str, Any]) -> None:
        self._journal.append(self._key(task, method), run)

    def _key(self, task: Task, method: str) -> str:
        return f"{task.fingerprint} {task.name} {method}" + (f" {self._voters}" if method in NEED_ZOO else "")


def run_arm(job: ArmJob, progress: Progress | None) -> dict[str, Any]:
    """As JSON values. The dense model only gets a ridge head: it is the reference, not an arm."""
    dense, options, model = job.method == "dense", job.options, job.backbone.model
    result = prune(
        job.backbone,
        job.task,
        job.zoo,
        options.settings_of(job.method, job.position, model),
        method=job.method,
        steps=0 if dense else options.last_steps(job.method),
        vote=options.vote,
        run=RunOptions(
            evaluate_at=()
            if dense
            else options.evaluate_at(job.method, find_structure(model, options.settings.scope)),
            on_step=None
            if dense or progress is None
            else lambda done, total: progress(job.name, done, total),
        ),
    )
    summary = result.summary()
    return {
        "task": job.task.name,
        "accuracy": result.accuracy,
        "trained_accuracy": result.trained_accuracy,
        "expected_calibration_error": result.expected_calibration_error,
        "mean_confidence": result.mean_confidence,
        "history": [[point.step, point.refit_accuracy] for point in result.history],
        "class_accuracy": summary["class_accuracy"],
        "cost": summary["cost"],
        "kept": summary["kept"],
        "neighbours": summary["neighbours"],
        "choice": summary["choice"],
    }


def _measure(
    backbone: Backbone, structure: Structure, arms: list[dict[str, Any]], options: Comparison, task: Task
) -> dict[str, Any]:
    """Sizes and latencies of the dense model and of each shape that the arms have; says in each arm which is its."""
    classes = len(task.classes)
    models = {"dense": _with_classes(backbone.copy_model(), classes)}
    shapes: dict[tuple[int, ...], str] = {}
    for arm in arms:
        kept = tuple(arm["tasks"][0]["kept"][name] for name in structure.names)
        if kept not in shapes:
            shapes[kept] = f"pruned, {arm['name']}" if shapes else "pruned"
            mask = Mask.random(structure, list(kept), seed=0, align=1)
            models[shapes[kept]] = prune_model(copy.deepcopy(models["dense"]), mask, structure=structure)
        arm["model"] = shapes[kept]
    size = backbone.preprocessing.size
    measured = measure(models, (3, size, size), batches=options.batches, seconds=options.seconds)
    return {name: m.to_dict() for name, m in measured.items()}


def _with_classes(model: nn.Module, classes: int) -> nn.Module:
    fresh_head(model, classes)
    return model.eval()


def _foreign(entry: ZooEntry, data: ImageData) -> bool:
    try:
        Task.from_dict(entry.task, data)
    except (ValueError, TypeError, RuntimeError):
        return True
    return False


def _identity(backbone: Backbone, structure: Structure, options: Comparison) -> dict[str, Any]:
    """What a finished run depends on beside its task."""
    asked = {
        key: value for key, value in asdict(options).items() if key not in ("arms", "batches", "seconds")
    }
    weights = BackboneIdentity.of(backbone.model, structure).weights_sha256
    return {"backbone": backbone.describe(), "weights": weights, "options": asked}


def _setting(
    backbone: Backbone, structure: Structure, tasks: Sequence[Task], zoo: Zoo, options: Comparison
) -> dict[str, Any]:
    size = backbone.preprocessing.size
    classes = sorted({len(task.classes) for task in tasks})
    return {
        "data": f"{tasks[0].data.name}, {', '.join(map(str, classes))} classes a task",
        "held-out tasks": len(tasks),
        "model": f"{structure.architecture or structure.family} at {size}×{size} pixels",
        "scope": structure.scope,
        "keep": options.settings.keep,
        "zoo": f"{len(zoo)} entries, {min(len(zoo), options.vote.neighbours)} neighbours by "
        f"{options.vote.for_method(method_for(zoo)).similarity}",
        "dense model": "a ridge classifier on its features as they are: it is not fine-tuned to a task",
        "fine-tuning": f"{options.steps} steps; from scratch {options.all_steps('ifp', structure)} with the removals",
        "learning rates": ", ".join(f"{k} {v:g}" for k, v in options.rates.items())
        or "the family's, for every arm",
        "seed": options.settings.seed,
        "threads": torch.get_num_threads(),
    }
