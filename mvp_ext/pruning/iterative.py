"""Iterative pruning from scratch (IFP for filters, IHP for heads): score, remove a few, train, repeat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from mvp_ext.data.images import content_hash
from mvp_ext.data.tasks import TaskData
from mvp_ext.model.borrowed import own_random_numbers, with_gradients
from mvp_ext.model.budget import kept_counts
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.ends import classifiers
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.scores import Scores, score_units
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.train import parallel
from mvp_ext.train.backbone import Backbone, BackboneIdentity, extract_features, set_head
from mvp_ext.train.cost import BACKWARD_FACTOR, Cost
from mvp_ext.train.heads import class_mean_head
from mvp_ext.train.refit import fit_head, reestimate_statistics
from mvp_ext.train.resume import RunFile
from mvp_ext.train.trainer import Teacher, Trainer


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
            precision=trainer.precision,
        )
    images = sum(len(labels) for _, labels in batches) * parallel.world()
    cost.score_flops += BACKWARD_FACTOR * images * count_flops(trainer.model, (3, size, size))
    return scores


@own_random_numbers()
@with_gradients()
def prune_iteratively(
    backbone: Backbone,
    data: TaskData,
    settings: Settings,
    *,
    cost: Cost | None = None,
    features: Tensor | None = None,
    on_step: Callable[[nn.Module, int], None] | None = None,
    resume: Path | None = None,
    start: PrunedCheckpoint | None = None,
) -> tuple[nn.Module, Mask]:
    """A small model for one task, made from the dense one alone, or from a pruned one that is given.

    Between rounds the model is cut to its real, smaller shapes with the optimizer's state kept, so later rounds are
    cheaper than earlier ones.

    Args:
        backbone: the dense model; left as it is.
        settings: what is cut, how much of it stays, in which rounds; how weights are trained.
        features: the backbone's features on ``data.train_images``, if at hand.
        on_step: called with (model, steps done so far) after each step, outside the clock.
        resume: a file for the state of an interrupted run (of its final steps); the same call goes on from it with the
            numbers of an uninterrupted one (see ``resume.py``).
        start: a pruned model of this backbone to go on from instead of the dense one (that stays the teacher). Only
            what it still has can be kept; where it has no more units than ``keep`` asks for, it is only trained.

    Returns:
        The small model, with a trained (not refitted) classifier, and its mask.
    """
    cost = cost if cost is not None else Cost()
    schedule, recipe, seed = settings.schedule, settings.recipe_for(backbone.model), settings.seed
    preprocessing, size = backbone.preprocessing, backbone.preprocessing.size
    structure = find_structure(backbone.model, settings.scope)
    with cost.timed():
        if features is None:
            features = extract_features(backbone.model, data.train_images, preprocessing, recipe.precision)
            cost.refit_flops += len(features) * count_flops(backbone.model, (3, size, size))
        teacher = Teacher.from_features(backbone, features) if schedule.distill else None
    done = 0

    def stepped(_: int) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(trainer.model, done)

    run = RunFile(
        resume,
        {
            "backbone": BackboneIdentity.of(backbone.model, structure).to_meta(),
            "images": content_hash([data.train_images, data.train_labels], data.class_names),
            "schedule": asdict(schedule),
            "recipe": asdict(recipe),
            "others": [settings.keep, settings.align, seed, asdict(preprocessing)],
            "start": None
            if start is None
            else content_hash(start.model.state_dict().values(), structure.names),
        },
    )
    saved = run.load()
    final_done = 0
    with cost.timed():
        if start is not None and saved is None:
            start.mask.check(structure)
            model, mask = copy.deepcopy(start.model).to(backbone.device), start.mask
            seen = reestimate_statistics(
                model, data.train_images, preprocessing, seed=seed, precision=recipe.precision
            )
            fit_head(model, data, preprocessing, "class_mean", recipe.precision)
            cost.refit_flops += (seen + len(features)) * count_flops(model, (3, size, size))
        else:
            model, mask = backbone.copy_model(), Mask.full(structure)
            set_head(model, class_mean_head(features, data.train_labels, data.num_classes))
        if saved is not None:
            mask = Mask.from_bytes(bytes.fromhex(saved.values["mask"]))
            prune_model(model, mask, structure=structure)
        trainer = Trainer(model, data, preprocessing, recipe, seed=seed, teacher=teacher, cost=cost)
        if teacher is not None:
            teacher.kept = kept_features(backbone.model, structure, mask)
    if saved is not None:
        saved.restore(trainer)
        final_done, done = saved.done, int(saved.values["steps"])
    else:
        for number, ratio in enumerate(round_ratios(structure, settings, mask), 1):
            current = find_structure(model, structure.scope)
            inner = _choose(trainer, current, structure, ratio, settings, cost, seed + number)
            with cost.timed():
                prune_model(model, inner, structure=current, optimizer=trainer.optimizer)
                mask = Mask.compose(mask, inner)
                if teacher is not None:
                    teacher.kept = kept_features(backbone.model, structure, mask)
            trainer.run(schedule.steps_per_round, "constant", stepped)

    # The same at every final step, and dear to make.
    final_mask = mask.to_bytes().hex()

    def stepped_finally(final: int) -> None:
        stepped(final)
        run.save_if_due(trainer, final, steps=done, mask=final_mask)

    trainer.run(schedule.final_steps, "cosine", stepped_finally, done=final_done)
    run.remove()
    return model, mask


def round_ratios(structure: Structure, settings: Settings, first: Mask | None = None) -> list[float]:
    """The share kept after each round. Rounds that would remove nothing (few heads, coarse alignment) are left out.

    ``first``: what is there at the beginning; default all.
    """
    schedule, keep = settings.schedule, settings.keep
    whole = 1.0 if first is None else first.keep
    rounds = schedule.rounds(keep, whole)
    ratios = [whole * (1.0 - schedule.share) ** number for number in range(1, rounds)] + [keep] * (rounds > 0)
    if schedule.global_ranking:
        return ratios
    have = structure.units_per_layer if first is None else tuple(first.kept[n] for n in structure.names)
    counts = [have]
    for ratio in ratios:
        counts.append(tuple(map(min, counts[-1], kept_counts(structure, ratio, settings.align))))
    return [
        ratio for ratio, before, after in zip(ratios, counts, counts[1:], strict=False) if before != after
    ]


def planned_steps(structure: Structure, settings: Settings, first: Mask | None = None) -> int:
    """All optimizer steps of one iterative run; ``first`` as for ``round_ratios``."""
    rounds = len(round_ratios(structure, settings, first))
    return rounds * settings.schedule.steps_per_round + settings.schedule.final_steps


def kept_features(dense: nn.Module, structure: Structure, mask: Mask) -> Tensor | None:
    """Which of the features that its classifier reads a model cut by ``mask`` still has, int64; None: all."""
    read = {id(classifier.weight) for classifier in classifiers(dense)}
    index = mask.index_in(structure)
    return next((index[n][1] for n, p in dense.named_parameters() if n in index and id(p) in read), None)


def _choose(
    trainer: Trainer,
    current: Structure,
    dense: Structure,
    ratio: float,
    settings: Settings,
    cost: Cost,
    seed: int,
) -> Mask:
    """The mask of one round, of the model as it is now (``current``), that leaves ``ratio`` of the dense units."""
    scores = scoring_batches(trainer, current, settings.schedule, cost, seed=seed)
    if not settings.schedule.global_ranking:
        counts = kept_counts(dense, ratio, settings.align)
        return Mask.from_scores(current, scores, tuple(map(min, current.units_per_layer, counts)))
    share = min(1.0, ratio * dense.total_units / current.total_units)
    return Mask.from_scores(current, scores, share, settings.align, global_=True)
