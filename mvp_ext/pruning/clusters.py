"""A clustered zoo: one universal model, and an expert that refines it for each kind of the zoo's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvp_ext.data.tasks import Task, TaskData
from mvp_ext.pruning.build import (
    EntryJob,
    Progress,
    Run,
    bind,
    build_entries,
    make_universal,
    one_by_one,
    planned_zoo_steps,
    pooled_task,
    universal_start,
)
from mvp_ext.pruning.iterative import planned_steps
from mvp_ext.pruning.methods import STATISTICS
from mvp_ext.pruning.prune import seen_by
from mvp_ext.pruning.result import Result
from mvp_ext.pruning.settings import Settings
from mvp_ext.train.backbone import Backbone, extract_features
from mvp_ext.train.heads import ClassStatistics, class_means, fit_temperature
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.shared import CLUSTERS, UNIVERSAL
from mvp_ext.zoo.zoo import Zoo, ZooError

# Of all optimizer steps: what goes into the model that the experts refine.
CLUSTERED_SHARE = 0.6

# Of the recipe's: what an expert is for is in its tasks' labels, and it has few steps to learn it in.
EXPERT_DISTILLATION, EXPERT_RATE = 0.25, 2.0
# Of a class: its mean is known well enough to tell kinds of tasks.
_KIND_IMAGES = 32
# Against so many draws of the same classes into other tasks: better than all is chance in one of 20.
_DRAWS = 19
# As long as there are more, an expert would see too few tasks to be better than the universal model.
MOST_CLUSTERS = 12


def build_clustered_zoo(
    model: nn.Module | Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    settings: Settings | None = None,
    *,
    clusters: int | None = None,
    share: float = CLUSTERED_SHARE,
    base_keep: float | None = None,
    progress: Progress | None = None,
    run: Run = one_by_one,
) -> list[Result]:
    """One pruned model of all tasks, and an expert that refines it for each kind of them.

    It takes as many optimizer steps as ``build_zoo`` with the same schedule: ``share`` of them go into the universal
    model, the rest into the experts, by the number of their tasks. The experts are the zoo's entries, each of all
    classes of its tasks; a task has no model of its own. Tasks that are given later are assigned to the experts that
    are there. May be interrupted and called again like ``build_zoo``.

    Args:
        clusters: number of experts; None: from the data (``cluster_tasks``), one where the tasks are of one kind.
        base_keep: keep ratio of the model that experts are cut from, each by its own tasks' scores, so that each has a
            mask of its own; the universal model is then cut from it likewise. None: ``settings.keep``, one mask for
            all, which was as good on classes that the zoo knows, and better on others.
        run: makes the experts, as of ``build_zoo``; the universal model is made by this process.

    Returns:
        The results of the experts made by this call.

    Raises:
        ValueError: ``share`` outside (0, 1), ``clusters`` or ``base_keep`` out of range.
        ZooError: the zoo is of another backbone or keep ratio, or its entries are no experts; an expert has to be made
            again and its tasks are not given.
    """
    settings = settings or Settings.of_zoo(zoo)
    base_keep = settings.keep if base_keep is None else base_keep
    if not 0.0 < share < 1.0:
        raise ValueError(f"build_clustered_zoo: share: expected a value in (0, 1), got {share}")
    if not settings.keep <= base_keep <= 1.0:
        raise ValueError(
            f"build_clustered_zoo: base_keep: expected a ratio in [{settings.keep}, 1], got {base_keep}"
        )
    if len(zoo) > 0 and CLUSTERS not in zoo.facts():
        raise ZooError(
            f"build_clustered_zoo: {zoo.path}: its {len(zoo)} entries are no experts; use another zoo"
        )
    backbone = seen_by(zoo, model)
    structure = bind(backbone, zoo, settings)
    first, each = planned_zoo_steps(structure, settings, len(tasks), share)
    start = universal_start(backbone, tasks, zoo, replace(settings, keep=base_keep), first, progress)
    described = _Described(backbone, start.model, tasks, settings)
    experts = _assign(zoo, described, clusters)
    removing = replace(settings, schedule=replace(settings.schedule, final_steps=0))
    removal = planned_steps(structure, removing, start.mask)
    if base_keep > settings.keep and zoo.shared(UNIVERSAL) is None:
        # As one of the experts.
        steps = max(1, round(each * len(tasks) / max(1, len(experts))))
        pooled = pooled_task(tasks, UNIVERSAL, settings.seed)
        make_universal(backbone, pooled, zoo, settings, steps, progress, start)
    recipe = expert_recipe(settings.recipe_for(backbone.model))
    jobs = []
    for expert, members in experts.items():
        trained = replace(settings.schedule, final_steps=max(0, each * len(members) - removal))
        task = pooled_task(members, expert, settings.seed)
        trained_so = replace(settings, schedule=trained, recipe=recipe)
        jobs.append(EntryJob(backbone, task, trained_so, start, _by_start))
    return build_entries(jobs, structure, zoo, progress, run)


def expert_recipe(recipe: Recipe) -> Recipe:
    """How an expert is trained, where the universal model is by ``recipe``."""
    return replace(
        recipe,
        distillation=EXPERT_DISTILLATION * recipe.distillation,
        learning_rate=EXPERT_RATE * recipe.learning_rate,
    )


def of_several_kinds(model: nn.Module | Backbone, tasks: Sequence[Task], settings: Settings) -> bool:
    """Whether ``cluster_tasks`` finds more than one kind of tasks, by the dense backbone's features of a few images."""
    backbone = Backbone.wrap(model)
    described = _Described(backbone, backbone.model, tasks, settings, _KIND_IMAGES)
    return max(cluster_tasks(*described.vectors(tasks), seed=settings.seed)) > 0


def _assign(zoo: Zoo, described: _Described, clusters: int | None) -> dict[str, list[Task]]:
    """Expert → the tasks that it is made of, of those experts that the zoo lacks; who serves whom is recorded."""
    known: dict[str, Any] = zoo.facts().get(CLUSTERS) or {"made_of": {}, "tasks": {}}
    given = {task.name: task for task in described.tasks}
    late = [task for task in described.tasks if task.name not in known["tasks"]]
    if CLUSTERS not in zoo.facts():
        numbers = cluster_tasks(*described.vectors(late), clusters, seed=described.settings.seed)
        for task, number in zip(late, numbers, strict=True):
            expert = f"expert-{number:02d}"
            known["tasks"][task.name] = _served_by(task, expert)
            known["made_of"].setdefault(expert, []).append(task.name)
        zoo.record_facts(**{CLUSTERS: known})
    elif late:
        for task, nearest in zip(late, described.nearest(zoo, late), strict=True):
            known["tasks"][task.name] = _served_by(task, nearest)
        zoo.record_facts(**{CLUSTERS: known})
    wanted = {name: members for name, members in known["made_of"].items() if not zoo.is_sound(name)}
    missing = sorted({name for members in wanted.values() for name in members} - given.keys())
    if missing:
        raise ZooError(
            f"build_clustered_zoo: {zoo.path}: expected the tasks that its experts {', '.join(wanted)} are made of, "
            f"{', '.join(missing)} not among those given"
        )
    return {name: [given[member] for member in members] for name, members in wanted.items()}


def _served_by(task: Task, expert: str | None) -> dict[str, Any]:
    return {"expert": expert, "classes": list(task.class_names), "fingerprint": task.fingerprint}


@dataclass
class _Described:
    """The tasks by the features of a model, of so many images of a class; its pass is made if somebody asks."""

    backbone: Backbone
    model: nn.Module
    tasks: Sequence[Task]
    settings: Settings
    images: int | None = None

    def vectors(self, tasks: Sequence[Task]) -> tuple[Tensor, list[list[int]]]:
        """As ``cluster_tasks`` takes them."""
        at = {label: row for row, label in enumerate(self._classes.classes)}
        return self._means, [[at[label] for label in task.classes] for task in tasks]

    def nearest(self, zoo: Zoo, tasks: Sequence[Task]) -> list[str | None]:
        """Of each the expert whose classes' mean is nearest to that of its own; None where there is none."""
        known = zoo.class_means()
        if not known:
            return [None] * len(tasks)
        own = _vectors(*self.vectors(tasks))
        theirs = np.stack([entry.means.double().mean(0).numpy() for entry in known])
        distances = ((own[:, None] - theirs) ** 2).sum(2)
        return [known[position].name for position in distances.argmin(1)]

    @cached_property
    def _classes(self) -> Task:
        pooled = pooled_task(self.tasks, "all", self.settings.seed)
        return pooled if self.images is None else replace(pooled, max_train_per_class=self.images)

    @cached_property
    def _means(self) -> Tensor:
        data = self._classes.split()
        features = _features(self.backbone, self.model, self.settings, data)
        return class_means(features, data.train_labels, data.num_classes)


def _by_start(job: EntryJob, result: Result) -> dict[str, Tensor]:
    """Of all training images of its classes: by the features of the start, and what the expert knows by its own."""
    assert job.start is not None
    data = job.task.split()
    labels, classes = data.train_labels, data.num_classes
    features = _features(job.backbone, job.start.model, job.settings, data)
    means = class_means(features, labels, classes)
    own = ClassStatistics.of(_features(job.backbone, result.model, job.settings, data), labels, classes)
    return {
        "class_means": means,
        "temperature": torch.tensor(fit_temperature(features, labels, means)),
        **dict(zip(STATISTICS, own, strict=True)),
    }


def _features(backbone: Backbone, model: nn.Module, settings: Settings, data: TaskData) -> Tensor:
    """f32 [n, F], of the training images."""
    model = model.to(backbone.device)
    precision = settings.recipe_for(backbone.model).precision
    return extract_features(model, data.train_images, backbone.preprocessing, precision)


def cluster_tasks(
    means: Tensor, tasks: Sequence[Sequence[int]], clusters: int | None = None, *, seed: int = 0
) -> list[int]:
    """Which tasks are of one kind: a cluster's number for each, in 0..k−1, numbered as they come.

    A task is the mean of its classes' mean features. Ward's clusters; their number k is that of the largest silhouette
    if no partition of tasks of the same sizes with classes drawn at random has such a one, else 1: tasks that are
    random sets of one data set's classes are of one kind.

    Args:
        means: f32 [K, F], mean features of the classes.
        tasks: of each its classes, numbers in 0..K−1.
        clusters: k, in [1, number of tasks]; None: from the data.
        seed: of the draws.

    Raises:
        ValueError: ``clusters`` out of range.
    """
    if clusters is not None and not 1 <= clusters <= len(tasks):
        raise ValueError(f"cluster_tasks: clusters: expected 1 to {len(tasks)}, got {clusters}")
    if clusters == 1 or len(tasks) < 3:
        found = np.arange(len(tasks)) if clusters == len(tasks) else np.zeros(len(tasks), int)
        return [int(number) for number in found]
    vectors = _vectors(means, tasks)
    if clusters is not None:
        return _numbered(_partition(vectors, clusters))
    best, score = _best_partition(vectors)
    draw = np.random.default_rng(seed)
    pool = np.concatenate([np.asarray(classes) for classes in tasks])
    for _ in range(_DRAWS):
        shuffled = np.split(draw.permutation(pool), np.cumsum([len(classes) for classes in tasks])[:-1])
        if _best_partition(_vectors(means, [list(part) for part in shuffled]))[1] >= score:
            return [0] * len(tasks)
    return _numbered(best)


def _vectors(means: Tensor, tasks: Sequence[Sequence[int]]) -> np.ndarray:
    return torch.stack([means[list(classes)].double().mean(0) for classes in tasks]).numpy()


def _partition(vectors: np.ndarray, clusters: int) -> np.ndarray:
    from scipy.cluster.hierarchy import fcluster, linkage

    return fcluster(linkage(vectors, "ward"), clusters, "maxclust")


def _best_partition(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    # Reading them takes a second that nobody else should wait for.
    from scipy.cluster.hierarchy import fcluster, linkage
    from sklearn.metrics import silhouette_score

    tree = linkage(vectors, "ward")
    found = [fcluster(tree, k, "maxclust") for k in range(2, min(MOST_CLUSTERS, len(vectors) - 1) + 1)]
    scores = [silhouette_score(vectors, labels) if len(set(labels)) > 1 else -1.0 for labels in found]
    best = int(np.argmax(scores))
    return found[best], float(scores[best])


def _numbered(labels: np.ndarray) -> list[int]:
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return [numbers[label] for label in labels.tolist()]
