"""The methods of ``prune``: what each starts from, a small model and its mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mvp_ext.model.mask import Mask
from mvp_ext.pruning.job import (
    Job,
    find_neighbours,
    merged_model,
    model_for_features,
    score_target,
    voted_mask,
)
from mvp_ext.pruning.vote import small_model
from mvp_ext.train.heads import ClassStatistics, soft_labels
from mvp_ext.zoo.known import KnownClasses, known_classes
from mvp_ext.zoo.shared import CLUSTERS, START, UNIVERSAL, is_clustered, is_refined
from mvp_ext.zoo.zoo import Zoo, ZooError

# What an expert knows of its classes, in its own features: tensors beside its weights (``ClassStatistics``).
STATISTICS = ("own_means", "own_scatter")
Method = Callable[[Job], tuple[nn.Module, Mask]]


def method_for(zoo: Zoo | None) -> str:
    """What "auto" is: "clustered" or "refined" where that is what the zoo is, else "mvp"."""
    if zoo is not None and is_clustered(zoo):
        return "clustered"
    return "refined" if zoo is not None and is_refined(zoo) else "mvp"


def _mvp(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("mvp")
    neighbours = find_neighbours(job, zoo)
    mask = voted_mask(job, neighbours)
    return merged_model(job, zoo, neighbours, mask), mask


def _refined(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("refined")
    if not is_refined(zoo):
        raise ZooError(
            f"prune: method 'refined' needs a zoo whose entries refine a universal model, which {zoo.path} is not: "
            "make one with build_refined_zoo or `mvp-ext zoo build`, or use method 'mvp'"
        )
    return _mvp(job)


def _clustered(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("clustered")
    if not is_clustered(zoo):
        raise ZooError(
            f"prune: method 'clustered' needs a zoo of experts, which {zoo.path} is not: make one with "
            "build_clustered_zoo or `mvp-ext zoo build`, or use method 'mvp'"
        )
    features, labels = job.described()
    with job.cost.timed():
        # A result that was added later votes, but has no images that the zoo's tasks had not.
        experts = zoo.facts()[CLUSTERS]["made_of"]
        means = [each for each in zoo.class_means(job.structure.fingerprint) if each.name in experts]
        known = known_classes(means, features, labels)
    job.targets = _said_by_experts(job, zoo, known)
    job.choice = {"known_share": known.share, "known_by_expert": known.by_entry, "told_by_experts": job.told}
    return _mvp(job)


def _said_by_experts(job: Job, zoo: Zoo, known: KnownClasses) -> Tensor | None:
    """Soft labels of the training images, f32 [n, k]: among the classes that an expert knows they have a share of what
    it says of the image, for it has seen more images of them than the task brings. None where no expert knows two.

    Classes that only look alike are told by the labels: an expert of others errs more than what can be learned of these
    images alone, and is not heard (``soft_labels``).
    """
    labels = job.data.train_labels
    targets = torch.nn.functional.one_hot(labels, job.data.num_classes).float()
    told = 0
    for name, found in known.found.items():
        if len(found) < 2:
            continue
        with job.cost.timed():
            try:
                stored = zoo[name].read()
            except ZooError:
                # Whoever asks for its vote tells of it.
                continue
            means, scatter = (stored.extra.get(key) for key in STATISTICS)
            # An expert of an older version.
            if means is None or scatter is None:
                continue
            classes = torch.tensor(sorted(found))
            head = ClassStatistics(means, scatter).head([found[c] for c in classes.tolist()])
            model = model_for_features(stored, job.start(zoo), job.backbone.device)
            index = torch.isin(labels, classes).nonzero().flatten()
        features = job.features_by(model, index)
        with job.cost.timed():
            soft = soft_labels(head(features), features, torch.searchsorted(classes, labels[index]))
            if soft is not None:
                targets[index[:, None], classes] = soft
                told += len(index)
    job.told = told / len(labels)
    return targets if told else None


def _universal(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("universal")
    model = zoo.shared(UNIVERSAL) or (zoo.shared(START) if is_refined(zoo) else None)
    if model is None:
        raise ZooError(
            f"prune: method 'universal' needs a universal model, which {zoo.path} lacks; make it with build_universal "
            "or `zoo build --universal`"
        )
    if model.structure_fingerprint != job.structure.fingerprint:
        raise ZooError(
            f"prune: {model.path}: expected a model of structure {job.structure.fingerprint}, "
            f"got {model.structure_fingerprint}"
        )
    keep = job.settings.keep
    if model.extra.get("keep") != keep:
        raise ZooError(
            f"prune: {model.path}: expected a model with keep {keep}, got one with keep {model.extra.get('keep')}"
        )
    checkpoint = model.load(job.backbone.device)
    return checkpoint.model, checkpoint.mask


def _one_shot(job: Job) -> tuple[nn.Module, Mask]:
    scores, settings = score_target(job), job.settings
    with job.cost.timed():
        ranking = settings.schedule.global_ranking
        mask = Mask.from_scores(job.structure, scores, settings.keep, settings.align, global_=ranking)
        return small_model(job.backbone, job.structure, mask), mask


def _random(job: Job) -> tuple[nn.Module, Mask]:
    settings = job.settings
    with job.cost.timed():
        mask = Mask.random(job.structure, settings.keep, settings.seed, settings.align)
        return small_model(job.backbone, job.structure, mask), mask


def _dense(job: Job) -> tuple[nn.Module, Mask]:
    return job.backbone.copy_model(), Mask.full(job.structure)


METHODS: dict[str, Method] = {
    "clustered": _clustered,
    "refined": _refined,
    "mvp": _mvp,
    "universal": _universal,
    "one_shot": _one_shot,
    "random": _random,
    "dense": _dense,
}
# "ifp", iterative pruning from scratch, trains as it prunes: it is a way of its own in ``prune``.
METHOD_NAMES = (*METHODS, "ifp")
