"""The methods of ``prune``: what each starts from, a small model and its mask."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mvp_ext.model.checkpoint import PrunedCheckpoint, load_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.pruning.job import Job, find_neighbours, merged_model, score_target, voted_mask
from mvp_ext.pruning.vote import small_model
from mvp_ext.zoo.shared import is_refined, start_path, universal_path
from mvp_ext.zoo.zoo import Zoo, ZooError

Method = Callable[[Job], tuple[nn.Module, Mask]]


def method_for(zoo: Zoo | None) -> str:
    """What "auto" is: "refined" where the zoo's entries refine a universal model, else "mvp"."""
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


def _universal(job: Job) -> tuple[nn.Module, Mask]:
    zoo = job.need_zoo("universal")
    path = start_path(zoo) if is_refined(zoo) and not universal_path(zoo).exists() else universal_path(zoo)
    if not path.exists():
        raise ZooError(
            f"prune: method 'universal' needs {path}; make it with build_universal or `zoo build --universal`"
        )
    checkpoint: PrunedCheckpoint = load_pruned(path, job.backbone.device)
    if checkpoint.structure.fingerprint != job.structure.fingerprint:
        raise ZooError(
            f"prune: {path}: expected a model of structure {job.structure.fingerprint}, "
            f"got {checkpoint.structure.fingerprint}"
        )
    keep = job.settings.keep
    if checkpoint.extra.get("keep") != keep:
        raise ZooError(
            f"prune: {path}: expected a model with keep {keep}, got one with keep {checkpoint.extra.get('keep')}"
        )
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
    "refined": _refined,
    "mvp": _mvp,
    "universal": _universal,
    "one_shot": _one_shot,
    "random": _random,
    "dense": _dense,
}
# "ifp", iterative pruning from scratch, trains as it prunes: it is a way of its own in ``prune``.
METHOD_NAMES = (*METHODS, "ifp")
