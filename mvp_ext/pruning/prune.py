"""From a dense backbone and a task to a small model. Every method starts differently and then goes the same way:

    start (mask, weights) → statistics → class-mean head → fine-tune J steps → ridge head

so that methods are compared by what they start from, not by how their heads were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mvp_ext.data.batches import shuffled_indices
from mvp_ext.data.tasks import Task, TaskData
from mvp_ext.model.borrowed import own_random_numbers, with_gradients
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.ends import built_for, classifiers, linear_weight
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.pruning.iterative import kept_features, planned_steps, prune_iteratively
from mvp_ext.pruning.job import Job
from mvp_ext.pruning.methods import METHOD_NAMES, METHODS, Method, method_for
from mvp_ext.pruning.result import Point, Result
from mvp_ext.pruning.settings import Settings, VoteOptions
from mvp_ext.train.backbone import Backbone, classify, extract_features, set_head
from mvp_ext.train.cost import Cost
from mvp_ext.train.evaluate import accuracy_of, evaluate
from mvp_ext.train.heads import class_mean_head, class_means, fit_temperature, left_out_error, ridge_head
from mvp_ext.train.refit import fit_head, reestimate_statistics
from mvp_ext.train.trainer import HeadTeacher, Trainer
from mvp_ext.zoo.zoo import Zoo

# Steps bring nothing that could be measured where the start errs less often, of images left out, or where experts have
# told so much of the images.
LEAST_ERROR, MOST_TOLD, MOST_STEPS = 0.02, 0.5, 40
# (steps done, steps in all)
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class RunOptions:
    """How one call of ``prune`` runs: what is looked at, what is at hand, where it goes on.

    Attributes:
        evaluate_at: steps at which ``history`` gets a point; costs a pass over the task's images each, outside the
            clock.
        on_step: called after each training step with (done, all).
        resume: a file by which a long "ifp" run survives an interruption (see ``prune_iteratively``).
        start: a pruned model of this backbone that "ifp" goes on from.
        features: the dense backbone's on the task's training images, f32 [n, F], if at hand, and the seconds that
            their pass took: both are booked where the method needs it, as if it had been made now.
    """

    evaluate_at: Sequence[int] = ()
    on_step: OnStep | None = None
    resume: Path | None = None
    start: PrunedCheckpoint | None = None
    features: tuple[Tensor, float] | None = None


@own_random_numbers()
@with_gradients()
def prune(
    model: nn.Module | Backbone,
    task: Task | TaskData,
    zoo: Zoo | None = None,
    settings: Settings | None = None,
    *,
    method: str | Method = "auto",
    steps: int | Literal["auto"] = "auto",
    vote: VoteOptions | None = None,
    run: RunOptions | None = None,
) -> Result:
    """Make a small model for one task.

    Args:
        model: the dense pre-trained model (timm ResNet or transformer), or a ``Backbone`` that also says how it sees
            images. It is not changed. What requires no gradient in it is not trained in the small model either.
        task: the classes and their images.
        zoo: pruned models of earlier tasks; needed by "clustered", "refined", "mvp" and "universal". An entry of the
            task's own name never votes. It says how images are seen, unless ``model`` is a ``Backbone``.
        settings: what is cut, how much of it stays, how weights are trained. Default: those of the zoo.
        method: "clustered" (the experts of a clustered zoo share their weights, the nearer the more, and say what they
            know of the task's classes), "refined" (so do the nearest entries of a zoo that refines a universal model,
            without a word), "mvp" (equal voters: vote, merge, fine-tune), "auto" ("clustered" or "refined" where the
            zoo is such a one, else "mvp"), "universal" (one pruned model of all tasks, fine-tuned), "one_shot" (score
            once, cut once), "random" (control), "ifp" (iterative pruning from scratch; for heads it is IHP), "dense"
            (nothing cut). Or a function of the ``Job`` that returns a small model and its mask: it then goes the same
            way as the others.
        steps: fine-tuning steps J. "auto": as many as the task needs (``steps_for``), which ``choice`` of the result
            tells. For "ifp": the steps after the last removal, by "auto" the schedule's ``final_steps``. Where
            ``settings.recipe`` distils, they also learn what a head on the dense backbone's features says of the
            images (``HeadTeacher``), for a pass of that over those that are drawn; "dense" does not.
        vote: how many neighbours vote, and how they are found and weighted.
        run: callbacks, points of measurement, and what is at hand.

    Raises:
        ValueError: steps or method out of range; a task with one class; a scope that the model does not have; a model
            whose like cannot be trained for tasks (``Backbone.check``).
        ZooError: no zoo, an empty one, or one of another backbone. UnsupportedModelError: a model that cannot be cut.
    """
    if steps != "auto" and (isinstance(steps, str) or steps < 0):
        raise ValueError(f"prune: steps: expected 'auto' or at least 0, got {steps!r}")
    if isinstance(method, str) and method not in ("auto", *METHOD_NAMES):
        raise ValueError(f"prune: method: expected one of auto, {', '.join(METHOD_NAMES)}, got {method!r}")
    if method == "auto":
        method = method_for(zoo)
    run = run or RunOptions()
    backbone = seen_by(zoo, model)
    settings = settings or Settings.of_zoo(zoo)
    structure = find_structure(backbone.model, settings.scope)
    data = task.split() if isinstance(task, Task) else task
    if data.num_classes < 2:
        raise ValueError(f"prune: task {task.name!r}: expected at least 2 classes, got {data.num_classes}")
    recipe = settings.recipe_for(backbone.model)
    name = method if isinstance(method, str) else method.__name__
    cost = Cost()
    job = Job(
        backbone=backbone,
        data=data,
        structure=structure,
        settings=settings,
        recipe=recipe,
        zoo=zoo,
        steps=None if steps == "auto" else steps,
        vote=(vote or VoteOptions()).for_method(name),
        task_name=task.name,
        cost=cost,
        known_features=run.features,
    )
    history = _History(job, run.evaluate_at)
    if method == "ifp":
        small, mask = _prune_iteratively(job, history, run)
    else:
        small, mask = (METHODS[method] if isinstance(method, str) else method)(job)
        _fine_tune(job, small, mask, history, run.on_step)
    trained = evaluate(small, data, backbone.preprocessing, recipe.precision).accuracy
    classifier = classifiers(small)[0]
    assert classifier.bias is not None
    described, labels = job.description()
    means = class_means(described, labels, data.num_classes)
    tensors = {
        "class_means": means,
        "temperature": torch.tensor(fit_temperature(described, labels, means)),
        "head_weight": linear_weight(classifier).detach().float().clone(),
        "head_bias": classifier.bias.detach().float().clone(),
    }
    with cost.timed():
        fit_head(small, data, backbone.preprocessing, "ridge", recipe.precision, job.targets)
    cost.refit_flops += len(data.train_labels) * count_flops(
        small, (3, backbone.preprocessing.size, backbone.preprocessing.size)
    )
    backbone.preprocessing.declare(small, data.class_names)
    # As whoever gets the model runs it: in its own type, whatever it was trained in.
    quality = evaluate(small, data, backbone.preprocessing, "float32")
    return Result(
        model=small.eval(),
        mask=mask,
        structure=structure,
        task=task,
        method=name,
        keep=settings.keep,
        accuracy=quality.accuracy,
        expected_calibration_error=quality.expected_calibration_error,
        mean_confidence=quality.mean_confidence,
        class_accuracy=quality.class_accuracy,
        trained_accuracy=trained,
        cost=cost,
        preprocessing=backbone.preprocessing,
        history=history.points,
        neighbours=job.neighbours,
        tensors=tensors,
        choice=job.choice,
    )


def seen_by(zoo: Zoo | None, model: nn.Module | Backbone) -> Backbone:
    """The backbone that sees images as the zoo's models do, checked.

    Raises:
        ZooError: ``model`` is a ``Backbone`` that sees them otherwise, or a ViT built for another size.
        ValueError: as of ``Backbone.check``.
    """
    backbone = _seen_by(zoo, model)
    backbone.check()
    return backbone


def _seen_by(zoo: Zoo | None, model: nn.Module | Backbone) -> Backbone:
    backbone = Backbone.wrap(model)
    known = None if zoo is None else zoo.preprocessing
    if zoo is None or known is None:
        return backbone
    # A convolutional model takes any size, and what timm declares is nobody's wish.
    if backbone is not model and built_for(backbone.model) is None:
        return replace(backbone, preprocessing=known)
    if backbone is not model and backbone.preprocessing.size == known.size:
        return replace(backbone, preprocessing=known)
    zoo.check_preprocessing(backbone.preprocessing)
    return backbone


def _fine_tune(job: Job, small: nn.Module, mask: Mask, history: _History, on_step: OnStep | None) -> None:
    preprocessing, data, precision = job.backbone.preprocessing, job.data, job.recipe.precision
    image_flops = count_flops(small, (3, preprocessing.size, preprocessing.size))
    with job.cost.timed():
        seen = reestimate_statistics(
            small, data.train_images, preprocessing, seed=job.settings.seed, precision=precision
        )
        features = extract_features(small, data.train_images, preprocessing, precision)
        set_head(small, class_mean_head(features, data.train_labels, data.num_classes))
        job.cost.refit_flops += (seen + len(data.train_labels)) * image_flops
        if job.steps is None:
            error = left_out_error(features, data.train_labels, data.num_classes)
            job.steps = steps_for(error, job.told)
            job.choice = {**(job.choice or {}), "left_out_error": error, "steps": job.steps}
        trainer = Trainer(small, data, preprocessing, job.recipe, seed=job.settings.seed, cost=job.cost)
    if job.recipe.distillation > 0 and job.steps > 0 and mask != Mask.full(job.structure):
        trainer.teacher = _head_teacher(job, mask, job.steps)
    history.record(small, 0)

    steps = job.steps

    def stepped(done: int) -> None:
        history.record(small, done)
        if on_step is not None:
            on_step(done, steps)

    trainer.run(steps, "cosine", stepped)


def steps_for(error: float, told: float = 0.0) -> int:
    """Steps that pay for a task.

    Args:
        error: of the start, images left out (``left_out_error``), in [0, 1].
        told: share of the images that experts have labelled (``Job.told``).
    """
    return 0 if error < LEAST_ERROR or told >= MOST_TOLD else MOST_STEPS


def _head_teacher(job: Job, mask: Mask, steps: int) -> HeadTeacher | None:
    """Of the images that the steps will draw; None where those are of one class."""
    data, recipe, seed = job.data, job.recipe, job.settings.seed
    drawn = shuffled_indices(len(data.train_labels), recipe.batch_size, steps, seed)
    index = torch.cat(list(drawn)).unique()
    # A class of which nothing is drawn has no part in the head.
    classes, labels = data.train_labels[index].unique(return_inverse=True)
    if len(classes) < 2:
        return None
    features = job.features_of(index)
    with job.cost.timed():
        kept = kept_features(job.backbone.model, job.structure, mask)
        if kept is not None:
            features = features[:, kept]
        return HeadTeacher(features, labels, len(classes), index)


def _prune_iteratively(job: Job, history: _History, run: RunOptions) -> tuple[nn.Module, Mask]:
    settings = job.settings
    if job.steps is not None:
        settings = replace(settings, schedule=replace(settings.schedule, final_steps=job.steps))
    total = planned_steps(job.structure, settings, None if run.start is None else run.start.mask)

    def stepped(model: nn.Module, done: int) -> None:
        history.record(model, done)
        if run.on_step is not None:
            run.on_step(done, total)

    return prune_iteratively(
        job.backbone,
        job.data,
        settings,
        cost=job.cost,
        features=job.features(),
        on_step=stepped,
        resume=run.resume,
        start=run.start,
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
        with torch.no_grad():
            trained = accuracy_of(classify(model, test).cpu(), data.test_labels)
        self.points.append(Point(step, trained, accuracy_of(ridge(test), data.test_labels)))
