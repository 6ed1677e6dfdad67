"""Iterative pruning from scratch (IFP for filters, IHP for heads): score, remove a few, train, repeat."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from mvp_ext.model.budget import kept_counts
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.model.structure import Structure, find_structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.backbone import Backbone, extract_features, set_head
from mvp_ext.pruning.cost import BACKWARD_FACTOR, Cost
from mvp_ext.pruning.heads import class_mean_head
from mvp_ext.pruning.scores import Scores, score_units
from mvp_ext.pruning.tasks import TaskData
from mvp_ext.pruning.training import Recipe, Teacher, Trainer, reestimate_statistics


@dataclass(frozen=True)
class Schedule:
    """How iterative pruning proceeds.

    Attributes:
        share: share of the remaining units removed a round, in (0, 1).
        steps_per_round: fine-tuning steps after each removal, at the full learning rate.
        final_steps: steps after the last removal, with a cosine schedule.
        criterion: how units are scored (``scores.CRITERIA``).
        score_batches: training batches a scoring looks at.
        global_ranking: rank units across layers (scores divided by their layer's L2 norm) instead of within each.
        distill: heal with the dense model's features beside the labels.
    """

    share: float = 0.1
    steps_per_round: int = 10
    final_steps: int = 200
    criterion: str = "taylor"
    score_batches: int = 2
    global_ranking: bool = False
    distill: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"Schedule: share: expected a value in (0, 1), got {self.share}")

    def rounds(self, keep: float) -> int:
        """R = ceil(ln keep / ln(1 − share)); 0 where nothing is removed."""
        return max(0, math.ceil(math.log(keep) / math.log1p(-self.share) - 1e-9))

    def steps(self, keep: float) -> int:
        """All optimizer steps of one run."""
        return self.rounds(keep) * self.steps_per_round + self.final_steps


def scoring_batches(
    trainer: Trainer, structure: Structure, schedule: Schedule, cost: Cost, seed: int = 0
) -> Scores:
    """Score the trainer's model on its next training batches and book what that cost."""
    size = trainer.preprocessing.size
    with cost.timed():
        batches = [trainer.next_batch() for _ in range(schedule.score_batches)]
        scores = score_units(
            trainer.model,
            structure,
            schedule.criterion,
            batches,
            seed=seed,
            image_shape=(3, size, size),
            precision=trainer.recipe.precision,
        )
    images = sum(len(labels) for _, labels in batches)
    cost.score_flops += BACKWARD_FACTOR * images * count_flops(trainer.model, (3, size, size))
    return scores


def prune_iteratively(
    backbone: Backbone,
    data: TaskData,
    *,
    scope: str | None,
    keep: float,
    schedule: Schedule,
    recipe: Recipe,
    align: int = 8,
    seed: int = 0,
    cost: Cost | None = None,
    features: Tensor | None = None,
    on_step: Callable[[nn.Module, int], None] | None = None,
) -> tuple[nn.Module, Mask]:
    """A small model for one task, made from the dense one alone.

    Between rounds the model is cut to its real, smaller shapes with the optimizer's state kept, so later rounds are
    cheaper than earlier ones.

    Args:
        backbone: the dense model; left as it is.
        keep: share of each layer's units that stays, in (0, 1]. align: kept counts are rounded to multiples of it.
        features: the backbone's features on ``data.train_images``, if at hand.
        on_step: called with (model, steps done so far) after each step, outside the clock.

    Returns:
        The small model, with a trained (not refitted) classifier and re-estimated statistics, and its mask.
    """
    cost = cost if cost is not None else Cost()
    model = backbone.copy_model()
    structure = find_structure(model, scope)
    mask = Mask.full(structure)
    preprocessing = backbone.preprocessing
    with cost.timed():
        if features is None:
            features = extract_features(model, data.train_images, preprocessing, recipe.precision)
            size = preprocessing.size
            cost.refit_flops += len(features) * count_flops(model, (3, size, size))
        set_head(model, class_mean_head(features, data.train_labels, data.num_classes))
        teacher = Teacher.from_features(backbone, features) if schedule.distill else None
        trainer = Trainer(model, data, preprocessing, recipe, seed=seed, teacher=teacher, cost=cost)
    done = 0

    def stepped(_: int) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(model, done)

    rounds = schedule.rounds(keep)
    for number in range(1, rounds + 1):
        ratio = keep if number == rounds else (1.0 - schedule.share) ** number
        current = find_structure(model, scope)
        scores = scoring_batches(trainer, current, schedule, cost, seed=seed + number)
        with cost.timed():
            if schedule.global_ranking:
                share = min(1.0, ratio * structure.total_units / current.total_units)
                inner = Mask.from_scores(current, scores, share, align, global_=True)
            else:
                inner = Mask.from_scores(current, scores, kept_counts(structure, ratio, align))
            prune_model(model, inner, structure=current, optimizer=trainer.optimizer)
            mask = Mask.compose(mask, inner)
        trainer.run(schedule.steps_per_round, "constant", stepped)
    trainer.run(schedule.final_steps, "cosine", stepped)
    with cost.timed():
        size = preprocessing.size
        seen = reestimate_statistics(
            model, data.train_images, preprocessing, seed=seed, precision=recipe.precision
        )
    cost.refit_flops += seen * count_flops(model, (3, size, size))
    return model, mask
