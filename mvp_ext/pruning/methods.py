"""What each method of ``prune`` starts from, and which method and vote it takes unless it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from mvp_ext.model.checkpoint import PrunedCheckpoint, load_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.pruning.job import Job, ask_neighbours, merged_model, own_scores, voted_mask
from mvp_ext.pruning.vote import VoteOptions, small_model
from mvp_ext.zoo.shared import is_refined, start_path, universal_path
from mvp_ext.zoo.zoo import Zoo, ZooError


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
STARTS: dict[str, Start] = {
    "refined": _start_refined,
    "mvp": _start_mvp,
    "universal": _start_universal,
    "one_shot": _start_one_shot,
    "random": _start_random,
    "dense": _start_dense,
}
METHODS = (*STARTS, "ifp")
REFINED_WEIGHTING = (
    0.1  # nats: voters that refine one model need no company, but should be of the task's kind
)


def method_for(zoo: Zoo | None) -> str:
    """What ``prune`` does unless it is told: "refined" where the zoo's entries refine a universal model, else "mvp"."""
    return "refined" if zoo is not None and is_refined(zoo) else "mvp"


def vote_for(method: str, neighbours: int = 5, similarity: str = "leep") -> VoteOptions:
    """A method's vote: equal voters, for "refined" softmax(similarity / 0.1)."""
    weighting = REFINED_WEIGHTING if method == "refined" else None
    return VoteOptions(neighbours=neighbours, similarity=similarity, weighting=weighting)
