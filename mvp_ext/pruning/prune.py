"""From a dense backbone and a task to a small model. Every method starts differently and then goes the same way:

    start (mask, weights) → statistics → class-mean head → fine-tune J steps → ridge head

so that methods are compared by what they start from, not by how their heads were made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mvp_ext.model.checkpoint import PrunedCheckpoint, load_pruned, read_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.model.structure import Structure, find_structure
from mvp_ext.model.surgery import expand_state, prune_model
from mvp_ext.pruning.backbone import Backbone, extract_features, set_head
from mvp_ext.pruning.cost import Cost
from mvp_ext.pruning.heads import class_mean_head, class_means, fit_temperature, ridge_head
from mvp_ext.pruning.iterative import Schedule, planned_steps, prune_iteratively, scoring_batches
from mvp_ext.pruning.result import Point, Result
from mvp_ext.pruning.scores import Scores
from mvp_ext.pruning.tasks import Task, TaskData, few_of_each
from mvp_ext.pruning.training import Recipe, Trainer, accuracy_of, evaluate, fit_head, reestimate_statistics
from mvp_ext.pruning.vote import (
    Neighbour,
    VoteOptions,
    merge_voters,
    nearest_entries,
    normalised_scores,
    small_model,
    vote_mask,
    voter_weights,
    weight_prior,
)
from mvp_ext.pruning.zoo import Zoo, ZooError
from mvp_ext.pruning.zoo_entry import BackboneIdentity

GLANCE_IMAGES = 320  # of all classes together: a dense pass over 1000 images was half of a task's cost

OnStep = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass
class Job:
    """One call of ``prune``: its inputs, checked, and what methods need of them. ``cost`` is filled as the work goes.

    ``neighbours`` is what the result says of the voters; a method that asks some puts them there.
    """

    backbone: Backbone
    data: TaskData
    structure: Structure
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
    known_features: tuple[Tensor, float] | None = None  # and the seconds that their pass took
    _features: Tensor | None = None
    _glance: tuple[Tensor, Tensor] | None = None
    _scores: Scores | None = None

    def features(self) -> Tensor:
        """The dense backbone's on all training images, f32 [n, F]; the first call books their pass."""
        if self._features is None:
            self._features = self._extract(None, "refit_flops")
        return self._features

    def glance(self, spent_on: str = "refit_flops") -> tuple[Tensor, Tensor]:
        """The same of a few images of each class, f32 [m, F], with their labels, int64 [m]: enough to find the task's
        neighbours and to score units, at a fraction of the pass. All of them where they have been paid for.
        """
        if self._features is not None:
            return self._features, self.data.train_labels
        if self._glance is None:
            index = few_of_each(self.data.train_labels, GLANCE_IMAGES, self.seed)
            self._glance = self._extract(index, spent_on), self.data.train_labels[index]
        return self._glance

    def _extract(self, index: Tensor | None, spent_on: str) -> Tensor:
        images = self.data.train_images if index is None else self.data.train_images[index]
        setattr(self.cost, spent_on, getattr(self.cost, spent_on) + len(images) * self.image_flops)
        if self.known_features is not None:
            known, seconds = self.known_features
            self.cost.seconds += seconds * len(images) / len(known)
            return known if index is None else known[index]
        with self.cost.timed():
            return extract_features(
                self.backbone.model, images, self.backbone.preprocessing, self.recipe.precision
            )

    def description(self) -> tuple[Tensor, Tensor]:
        """Features and labels of images that describe the task to a zoo; unbooked, for they make no model."""
        if self.known_features is not None:
            return self.known_features[0], self.data.train_labels
        unbooked = replace(self, cost=Cost())
        return unbooked.glance()

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


def ask_neighbours(job: Job, zoo: Zoo) -> list[Neighbour]:
    """The task's nearest entries, by ``job.vote``."""
    features, labels = job.glance("similarity_flops")
    neighbours = nearest_entries(
        zoo,
        job.structure,
        job.backbone,
        job.data,
        features,
        job.vote,
        labels=labels,
        cost=job.cost,
        seed=job.seed,
        exclude=(job.task_name,),
    )
    job.neighbours = [(n.entry.name, n.similarity) for n in neighbours]
    return neighbours


def voted_mask(job: Job, neighbours: Sequence[Neighbour]) -> Mask:
    """What these neighbours vote for, with the target's own score where ``job.vote`` wants it."""
    own = normalised_scores(own_scores(job), job.structure) if job.vote.needs_scores else None
    with job.cost.timed():
        prior = own if job.vote.prior == "taylor" else weight_prior(job.backbone.model, job.structure)
        return vote_mask(
            [n.entry.mask for n in neighbours],
            job.structure,
            keep=job.keep,
            weights=voter_weights(neighbours, job.vote.weighting),
            prior=prior,
            rule=job.vote.rule,
            temperature=job.vote.temperature,
            align=job.align,
            seed=job.seed,
            score=job.vote.own_score * own if own is not None and job.vote.own_score else None,
        )


def merged_model(job: Job, zoo: Zoo, neighbours: Sequence[Neighbour], mask: Mask) -> nn.Module:
    """The sub-network of ``mask`` with the weights that these neighbours share.

    Where none has an element it is the pre-trained one, or that of the model which the zoo's entries started from.
    """
    with job.cost.timed():
        base: Mapping[str, Tensor] = job.backbone.model.state_dict()
        if start_path(zoo).exists():
            start = load_pruned(start_path(zoo), job.backbone.device)
            wide = expand_state(start.model.state_dict(), start.structure, start.mask, base)
            base = {
                n: wide[n] if wide[n].shape == t.shape else t for n, t in base.items()
            }  # all but the head
        weights = voter_weights(neighbours, job.vote.weighting)
        states = [n.entry.read().state for n in neighbours]
        merged = merge_voters(base, states, [n.entry.mask for n in neighbours], job.structure, mask, weights)
        return small_model(job.backbone, job.structure, mask, merged)


def _start_mvp(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("mvp")
    neighbours = ask_neighbours(job, zoo)
    mask = voted_mask(job, neighbours)
    return merged_model(job, zoo, neighbours, mask), mask


def _start_refined(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("refined")
    if not is_refined(zoo):
        raise ZooError(
            f"prune: method 'refined' needs a zoo whose entries refine a universal model, which {zoo.path} is not: "
            "make one with build_refined_zoo or `mvp-ext zoo build`, or use method 'mvp'"
        )
    return _start_mvp(job)


def _start_elastic(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("elastic")
    path = elastic_path(zoo)
    if not path.exists():
        raise ZooError(
            f"prune: method 'elastic' needs {path}; make it with build_elastic or `zoo build --elastic`"
        )
    mask = voted_mask(job, ask_neighbours(job, zoo))
    with job.cost.timed():
        checkpoint = _load_shared(job, path)
        return prune_model(checkpoint.model, mask, structure=job.structure), mask


def _load_shared(job: Job, path: Path) -> PrunedCheckpoint:
    checkpoint = load_pruned(path, job.backbone.device)
    if checkpoint.structure.fingerprint != job.structure.fingerprint:
        raise ZooError(
            f"prune: {path}: expected a model of structure {job.structure.fingerprint}, "
            f"got {checkpoint.structure.fingerprint}"
        )
    return checkpoint


def _start_universal(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("universal")
    path = start_path(zoo) if is_refined(zoo) and not universal_path(zoo).exists() else universal_path(zoo)
    if not path.exists():
        raise ZooError(
            f"prune: method 'universal' needs {path}; make it with build_universal or `zoo build --universal`"
        )
    checkpoint = _load_shared(job, path)
    if checkpoint.extra.get("keep") != job.keep:
        raise ZooError(
            f"prune: {path}: expected a model with keep {job.keep}, got one with keep {checkpoint.extra.get('keep')}"
        )
    return checkpoint.model, checkpoint.mask


def own_scores(job: Job) -> Scores:
    """Every unit of the dense model scored on the target's images, by ``job.schedule.criterion``; once a job."""
    if job._scores is not None:
        return job._scores
    features, labels = job.glance()
    with job.cost.timed():
        dense = job.backbone.copy_model()
        set_head(dense, class_mean_head(features, labels, job.data.num_classes))
        trainer = Trainer(dense, job.data, job.backbone.preprocessing, job.recipe, seed=job.seed)
    job._scores = scoring_batches(trainer, job.structure, job.schedule, job.cost, seed=job.seed)
    return job._scores


def _start_one_shot(job: Job) -> tuple[nn.Module, Mask]:
    scores = own_scores(job)
    with job.cost.timed():
        mask = Mask.from_scores(
            job.structure, scores, job.keep, job.align, global_=job.schedule.global_ranking
        )
        return small_model(job.backbone, job.structure, mask), mask


def _start_random(job: Job) -> tuple[nn.Module, Mask]:
    with job.cost.timed():
        mask = Mask.random(job.structure, job.keep, job.seed, job.align)
        return small_model(job.backbone, job.structure, mask), mask


def _start_dense(job: Job) -> tuple[nn.Module, Mask]:
    return job.backbone.copy_model(), Mask.full(job.structure)


Start = Callable[[Job], tuple[nn.Module, Mask]]
_STARTS: dict[str, Start] = {
    "refined": _start_refined,
    "mvp": _start_mvp,
    "universal": _start_universal,
    "elastic": _start_elastic,
    "one_shot": _start_one_shot,
    "random": _start_random,
    "dense": _start_dense,
}
METHODS = (*_STARTS, "ifp")
REFINED_WEIGHTING = (
    0.1  # nats: voters that refine one model need no company, but should be of the task's kind
)


def method_for(zoo: Zoo | None) -> str:
    """What ``prune`` does unless it is told: "refined" where the zoo's entries refine a universal model, else "mvp"."""
    return "refined" if zoo is not None and is_refined(zoo) else "mvp"


def is_refined(zoo: Zoo) -> bool:
    """Whether ``build_refined_zoo`` made it: what its entries start from says for which keep ratio it was made."""
    return start_path(zoo).exists() and "keep" in read_pruned(start_path(zoo)).extra


def vote_for(method: str, neighbours: int = 5, similarity: str = "leep") -> VoteOptions:
    """A method's vote: equal voters, for "refined" softmax(similarity / 0.1)."""
    weighting = REFINED_WEIGHTING if method == "refined" else None
    return VoteOptions(neighbours=neighbours, similarity=similarity, weighting=weighting)


def prune(
    model: nn.Module | Backbone,
    task: Task | TaskData,
    *,
    zoo: Zoo | None = None,
    keep: float = 0.3,
    neighbours: int = 5,
    steps: int = 60,
    method: str | Start = "auto",
    scope: str | None = None,
    align: int = 8,
    recipe: Recipe | None = None,
    schedule: Schedule | None = None,
    vote: VoteOptions | None = None,
    seed: int = 0,
    evaluate_at: Sequence[int] = (),
    on_step: OnStep | None = None,
    resume: Path | None = None,
    start: PrunedCheckpoint | None = None,
    features: tuple[Tensor, float] | None = None,
) -> Result:
    """Make a small model for one task.

    Args:
        model: the dense pre-trained model (timm ResNet or ViT/DeiT), or a ``Backbone`` that also says how it sees
            images. It is not changed.
        task: the classes and their images.
        zoo: pruned models of earlier tasks; needed by "refined", "mvp", "universal" and "elastic". An entry of the
            task's own name never votes.
        keep: share of each layer's units that stays, in (0, 1].
        neighbours: number of voters; ``vote`` says more, and then this is not looked at.
        steps: fine-tuning steps J. For "ifp": the steps after the last removal.
        method: "refined" (the nearest entries of a zoo that refines a universal model share their weights, the nearer
            the more), "mvp" (equal voters: vote, merge, fine-tune), "auto" (``method_for``: "refined" where the zoo is
            such a one, else "mvp"), "universal" (one pruned model of all tasks, fine-tuned), "elastic" (the vote cuts
            the zoo's elastic weights), "one_shot" (score once, cut once), "random" (control), "ifp" (iterative pruning
            from scratch; for heads it is IHP), "dense" (nothing cut). Or a function of the :class:`Job` that returns a
            small model and its mask: it then goes the same way as the others.
        scope: which units are cut; ResNet "inner" or "all", ViT "heads", "mlp" or "heads+mlp".
        align: kept counts of filters and neurons are rounded to multiples of this.
        recipe: how weights are trained; default by model family.
        schedule: of iterative pruning, and the criterion of "one_shot".
        seed: of batches, augmentation, sampling. The same seed on the same machine gives the same result.
        evaluate_at: steps at which ``history`` gets a point; costs a pass over the task's images each, outside the
            clock.
        on_step: called after each training step with (done, all).
        resume: a file by which a long "ifp" run survives an interruption (see ``prune_iteratively``).
        start: a pruned model of this backbone that "ifp" goes on from.
        features: the dense backbone's on the task's training images, f32 [n, F], if at hand, and the seconds that
            their pass took: both are booked where the method needs it, as if it had been made now.

    Raises:
        ValueError: keep, neighbours, steps or method out of range; a task with one class.
        ZooError: no zoo, an empty one, or one of another backbone. UnsupportedModelError: a model that cannot be cut.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"prune: keep: expected a ratio in (0, 1], got {keep}")
    if steps < 0:
        raise ValueError(f"prune: steps: expected at least 0, got {steps}")
    if isinstance(method, str) and method not in ("auto", *METHODS):
        raise ValueError(f"prune: method: expected one of auto, {', '.join(METHODS)}, got {method!r}")
    if method == "auto":
        method = method_for(zoo)
    backbone = Backbone.wrap(model)
    data = task.split() if isinstance(task, Task) else task
    if data.num_classes < 2:
        raise ValueError(f"prune: task {task.name!r}: expected at least 2 classes, got {data.num_classes}")
    structure = find_structure(backbone.model, scope)
    recipe = recipe or Recipe.for_model(backbone.model)
    cost = Cost()
    job = Job(
        backbone,
        data,
        structure,
        zoo,
        keep,
        steps,
        align,
        seed,
        recipe,
        schedule or Schedule(),
        vote or vote_for(method if isinstance(method, str) else "mvp", neighbours),
        task.name,
        cost,
        known_features=features,
    )
    history = _History(job, evaluate_at)
    if method == "ifp":
        small, mask = _iterate(job, history, on_step, resume, start)
    else:
        small, mask = (_STARTS[method] if isinstance(method, str) else method)(job)
        _fine_tune(job, small, history, on_step)
    trained = evaluate(small, data, backbone.preprocessing, recipe.precision)
    classifier = small.get_classifier()  # type: ignore[operator]
    described, labels = job.description()
    means = class_means(described, labels, data.num_classes)
    tensors = {
        "class_means": means,
        "temperature": torch.tensor(fit_temperature(described, labels, means)),
        "head_weight": classifier.weight.detach().float().clone(),
        "head_bias": classifier.bias.detach().float().clone(),
    }
    with cost.timed():
        fit_head(small, data, backbone.preprocessing, "ridge", recipe.precision)
    cost.refit_flops += len(data.train_labels) * count_flops(
        small, (3, backbone.preprocessing.size, backbone.preprocessing.size)
    )
    return Result(
        model=small.eval(),
        mask=mask,
        structure=structure,
        task=task,
        method=method if isinstance(method, str) else method.__name__,
        keep=keep,
        accuracy=evaluate(small, data, backbone.preprocessing, recipe.precision),
        trained_accuracy=trained,
        cost=cost,
        preprocessing=backbone.preprocessing,
        history=history.points,
        neighbours=job.neighbours,
        tensors=tensors,
    )


def _fine_tune(job: Job, small: nn.Module, history: _History, on_step: OnStep | None) -> None:
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
    job: Job,
    history: _History,
    on_step: OnStep | None,
    resume: Path | None,
    start: PrunedCheckpoint | None,
) -> tuple[nn.Module, Mask]:
    schedule = replace(job.schedule, final_steps=job.steps)
    first = None if start is None else start.mask
    total = planned_steps(job.structure, job.keep, job.align, schedule, first)

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
        features=job.features(),
        on_step=stepped,
        resume=resume,
        start=start,
    )


class _History:
    """Accuracy at chosen steps. Looks at a model without changing it: a refitted head is only tried, not put on."""

    def __init__(self, job: Job, steps: Sequence[int]) -> None:
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


def elastic_path(zoo: Zoo) -> Path:
    """Where a zoo keeps the elastic backbone of its tasks."""
    return Path(zoo.path) / "elastic.safetensors"


def start_path(zoo: Zoo) -> Path:
    """Where a zoo keeps the model that its entries started from, if that was not the dense one."""
    return Path(zoo.path) / "start.safetensors"
