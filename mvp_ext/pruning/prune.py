"""From a dense backbone and a task to a small model. Every method starts differently and then goes the same way:

    start (mask, weights) → statistics → class-mean head → fine-tune J steps → ridge head

so that methods are compared by what they start from, not by how their heads were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.model.structure import Structure, find_structure
from mvp_ext.pruning.backbone import Backbone, extract_features, set_head
from mvp_ext.pruning.cost import Cost
from mvp_ext.pruning.heads import class_mean_head, class_means, fit_temperature, ridge_head
from mvp_ext.pruning.iterative import Schedule, planned_steps, prune_iteratively, scoring_batches
from mvp_ext.pruning.result import Point, Result
from mvp_ext.pruning.tasks import Task, TaskData
from mvp_ext.pruning.training import Recipe, Trainer, accuracy_of, evaluate, fit_head, reestimate_statistics
from mvp_ext.pruning.vote import (
    VoteOptions,
    merge_voters,
    nearest_entries,
    small_model,
    vote_mask,
    voter_weights,
    weight_prior,
)
from mvp_ext.pruning.zoo import Zoo, ZooError
from mvp_ext.pruning.zoo_entry import BackboneIdentity

OnStep = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass
class _Job:
    """One call of ``prune``: its inputs, checked, and what every method needs."""

    backbone: Backbone
    data: TaskData
    structure: Structure
    features: Tensor  # the dense backbone's on the training images, f32 [n, F]
    zoo: Zoo | None
    keep: float
    steps: int
    align: int
    seed: int
    recipe: Recipe
    schedule: Schedule
    vote: VoteOptions
    task_name: str
    cost: Cost
    neighbours: list[tuple[str, float]] = field(default_factory=list)

    @property
    def image_flops(self) -> int:
        size = self.backbone.preprocessing.size
        return count_flops(self.backbone.model, (3, size, size))

    def need_zoo(self, method: str) -> Zoo:
        if self.zoo is None:
            raise ZooError(
                f"prune: method {method!r} needs a zoo; got none. Build one with build_zoo or `mvp-ext zoo build`"
            )
        with (
            self.cost.timed()
        ):  # entries of other dense weights have the same shapes: they would merge into nonsense
            self.zoo.check(BackboneIdentity.of(self.backbone.model, self.structure))
        return self.zoo


def _start_mvp(job: _Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("mvp")
    neighbours = nearest_entries(
        zoo,
        job.structure,
        job.backbone,
        job.data,
        job.features,
        job.vote,
        cost=job.cost,
        seed=job.seed,
        exclude=(job.task_name,),
    )
    job.neighbours = [(n.entry.name, n.similarity) for n in neighbours]
    with job.cost.timed():
        weights = voter_weights(neighbours, job.vote.weighting)
        masks = [n.entry.mask for n in neighbours]
        mask = vote_mask(
            masks,
            job.structure,
            keep=job.keep,
            weights=weights,
            prior=weight_prior(job.backbone.model, job.structure),
            rule=job.vote.rule,
            temperature=job.vote.temperature,
            align=job.align,
            seed=job.seed,
        )
        states = [n.entry.read().state for n in neighbours]
        merged = merge_voters(job.backbone.model.state_dict(), states, masks, job.structure, mask, weights)
        return small_model(job.backbone, job.structure, mask, merged), mask


def _start_universal(job: _Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("universal")
    path = universal_path(zoo)
    if not path.exists():
        raise ZooError(
            f"prune: method 'universal' needs {path}; make it with build_universal or `zoo build --universal`"
        )
    checkpoint = load_pruned(path, job.backbone.device)
    if (
        checkpoint.structure.fingerprint != job.structure.fingerprint
        or checkpoint.extra.get("keep") != job.keep
    ):
        raise ZooError(
            f"prune: {path}: expected a model of structure {job.structure.fingerprint} with keep {job.keep}, "
            f"got {checkpoint.structure.fingerprint} with keep {checkpoint.extra.get('keep')}"
        )
    return checkpoint.model, checkpoint.mask


def _start_one_shot(job: _Job) -> tuple[nn.Module, Mask]:
    with job.cost.timed():
        dense = job.backbone.copy_model()
        set_head(dense, class_mean_head(job.features, job.data.train_labels, job.data.num_classes))
        trainer = Trainer(dense, job.data, job.backbone.preprocessing, job.recipe, seed=job.seed)
    scores = scoring_batches(trainer, job.structure, job.schedule, job.cost, seed=job.seed)
    with job.cost.timed():
        mask = Mask.from_scores(
            job.structure, scores, job.keep, job.align, global_=job.schedule.global_ranking
        )
        return small_model(job.backbone, job.structure, mask), mask


def _start_random(job: _Job) -> tuple[nn.Module, Mask]:
    with job.cost.timed():
        mask = Mask.random(job.structure, job.keep, job.seed, job.align)
        return small_model(job.backbone, job.structure, mask), mask


def _start_dense(job: _Job) -> tuple[nn.Module, Mask]:
    return job.backbone.copy_model(), Mask.full(job.structure)


_STARTS: dict[str, Callable[[_Job], tuple[nn.Module, Mask]]] = {
    "mvp": _start_mvp,
    "universal": _start_universal,
    "one_shot": _start_one_shot,
    "random": _start_random,
    "dense": _start_dense,
}
METHODS = (*_STARTS, "ifp")


def prune(
    model: nn.Module | Backbone,
    task: Task | TaskData,
    *,
    zoo: Zoo | None = None,
    keep: float = 0.3,
    neighbours: int = 5,
    steps: int = 60,
    method: str = "mvp",
    scope: str | None = None,
    align: int = 8,
    recipe: Recipe | None = None,
    schedule: Schedule | None = None,
    vote: VoteOptions | None = None,
    seed: int = 0,
    evaluate_at: Sequence[int] = (),
    on_step: OnStep | None = None,
    resume: Path | None = None,
) -> Result:
    """Make a small model for one task.

    Args:
        model: the dense pre-trained model (timm ResNet or ViT/DeiT), or a ``Backbone`` that also says how it sees
            images. It is not changed.
        task: the classes and their images.
        zoo: pruned models of earlier tasks; needed by "mvp" and "universal". An entry of the task's own name never
            votes.
        keep: share of each layer's units that stays, in (0, 1].
        neighbours: number of voters (short for ``vote=VoteOptions(neighbours=…)``).
        steps: fine-tuning steps J. For "ifp": the steps after the last removal.
        method: "mvp" (vote, merge, fine-tune), "universal" (one pruned model of all tasks, fine-tuned), "one_shot"
            (score once, cut once), "random" (control), "ifp" (iterative pruning from scratch; for heads it is IHP),
            "dense" (nothing cut).
        scope: which units are cut; ResNet "inner" or "all", ViT "heads", "mlp" or "heads+mlp".
        align: kept counts of filters and neurons are rounded to multiples of this.
        recipe: how weights are trained; default by model family.
        schedule: of iterative pruning, and the criterion of "one_shot".
        seed: of batches, augmentation, sampling. The same seed on the same machine gives the same result.
        evaluate_at: steps at which ``history`` gets a point; costs a pass over the task's images each, outside the
            clock.
        on_step: called after each training step with (done, all).
        resume: a file by which a long "ifp" run survives an interruption (see ``prune_iteratively``).

    Raises:
        ValueError: keep, neighbours, steps or method out of range; a task with one class.
        ZooError: no zoo, an empty one, or one of another backbone. UnsupportedModelError: a model that cannot be cut.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"prune: keep: expected a ratio in (0, 1], got {keep}")
    if steps < 0:
        raise ValueError(f"prune: steps: expected at least 0, got {steps}")
    if method not in METHODS:
        raise ValueError(f"prune: method: expected one of {', '.join(METHODS)}, got {method!r}")
    backbone = Backbone.wrap(model)
    data = task.split() if isinstance(task, Task) else task
    if data.num_classes < 2:
        raise ValueError(f"prune: task {task.name!r}: expected at least 2 classes, got {data.num_classes}")
    structure = find_structure(backbone.model, scope)
    recipe = recipe or Recipe.for_model(backbone.model)
    cost = Cost()
    with cost.timed():
        features = extract_features(
            backbone.model, data.train_images, backbone.preprocessing, recipe.precision
        )
    job = _Job(
        backbone,
        data,
        structure,
        features,
        zoo,
        keep,
        steps,
        align,
        seed,
        recipe,
        schedule or Schedule(),
        vote or VoteOptions(neighbours=neighbours),
        task.name,
        cost,
    )
    dense_pass = len(features) * job.image_flops
    if method == "mvp":  # proxy-LEEP compares by these features; elsewhere only class means come from them
        cost.similarity_flops += dense_pass
    else:
        cost.refit_flops += dense_pass
    history = _History(job, evaluate_at)
    if method == "ifp":
        small, mask = _iterate(job, history, on_step, resume)
    else:
        small, mask = _STARTS[method](job)
        _fine_tune(job, small, history, on_step)
    trained = evaluate(small, data, backbone.preprocessing, recipe.precision)
    classifier = small.get_classifier()  # type: ignore[operator]
    means = class_means(features, data.train_labels, data.num_classes)
    tensors = {
        "class_means": means,
        "temperature": torch.tensor(fit_temperature(features, data.train_labels, means)),
        "head_weight": classifier.weight.detach().float().clone(),
        "head_bias": classifier.bias.detach().float().clone(),
    }
    with cost.timed():
        fit_head(small, data, backbone.preprocessing, "ridge", recipe.precision)
    cost.refit_flops += len(features) * count_flops(
        small, (3, backbone.preprocessing.size, backbone.preprocessing.size)
    )
    return Result(
        model=small.eval(),
        mask=mask,
        structure=structure,
        task=task,
        method=method,
        keep=keep,
        accuracy=evaluate(small, data, backbone.preprocessing, recipe.precision),
        trained_accuracy=trained,
        cost=cost,
        preprocessing=backbone.preprocessing,
        history=history.points,
        neighbours=job.neighbours,
        tensors=tensors,
    )


def _fine_tune(job: _Job, small: nn.Module, history: _History, on_step: OnStep | None) -> None:
    preprocessing, data, precision = job.backbone.preprocessing, job.data, job.recipe.precision
    image_flops = count_flops(small, (3, preprocessing.size, preprocessing.size))
    with job.cost.timed():
        seen = reestimate_statistics(
            small, data.train_images, preprocessing, seed=job.seed, precision=precision
        )
        fit_head(small, data, preprocessing, "class_mean", precision)
        job.cost.refit_flops += (seen + len(data.train_labels)) * image_flops
        trainer = Trainer(small, data, preprocessing, job.recipe, seed=job.seed, cost=job.cost)
    history.record(small, 0)

    def stepped(done: int) -> None:
        history.record(small, done)
        if on_step is not None:
            on_step(done, job.steps)

    trainer.run(job.steps, "cosine", stepped)


def _iterate(
    job: _Job, history: _History, on_step: OnStep | None, resume: Path | None
) -> tuple[nn.Module, Mask]:
    schedule = replace(job.schedule, final_steps=job.steps)
    total = planned_steps(job.structure, job.keep, job.align, schedule)

    def stepped(model: nn.Module, done: int) -> None:
        history.record(model, done)
        if on_step is not None:
            on_step(done, total)

    return prune_iteratively(
        job.backbone,
        job.data,
        scope=job.structure.scope,
        keep=job.keep,
        schedule=schedule,
        recipe=job.recipe,
        align=job.align,
        seed=job.seed,
        cost=job.cost,
        features=job.features,
        on_step=stepped,
        resume=resume,
    )


class _History:
    """Accuracy at chosen steps. Looks at a model without changing it: a refitted head is only tried, not put on."""

    def __init__(self, job: _Job, steps: Sequence[int]) -> None:
        self._job, self._steps, self.points = job, frozenset(steps), list[Point]()

    def record(self, model: nn.Module, step: int) -> None:
        if step not in self._steps:
            return
        job = self._job
        preprocessing, precision, data = job.backbone.preprocessing, job.recipe.precision, job.data
        train = extract_features(model, data.train_images, preprocessing, precision)
        test = extract_features(model, data.test_images, preprocessing, precision)
        ridge = ridge_head(train, data.train_labels, data.num_classes)
        classifier = model.get_classifier()  # type: ignore[operator]
        with torch.no_grad():
            trained = accuracy_of(classifier(test.to(classifier.weight.device)).cpu(), data.test_labels)
        self.points.append(Point(step, trained, accuracy_of(ridge(test), data.test_labels)))


def universal_path(zoo: Zoo) -> Path:
    """Where a zoo keeps the universal pruned model of its tasks."""
    return Path(zoo.path) / "universal.safetensors"
