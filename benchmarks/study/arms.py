"""The arms: how each makes its start, what it needs that is made once, and how its learning rate is chosen.

Every arm then goes the same way (``mvp_ext.prune``): statistics re-estimated, class-mean head, J steps, ridge head.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.iterative import scoring_batches
from mvp_ext.pruning.job import Job, ask_neighbours, merged_model, own_scores, voted_mask
from mvp_ext.pruning.methods import REFINED_WEIGHTING
from mvp_ext.pruning.scores import CRITERIA, Scores
from mvp_ext.pruning.vote import Neighbour, VoteOptions, small_model
from mvp_ext.train.backbone import set_head
from mvp_ext.train.heads import class_mean_head
from mvp_ext.train.trainer import Trainer
from mvp_ext.zoo.zoo import Zoo

from .worlds import WorldAtWork

Made = tuple[nn.Module, Mask]


@dataclass(frozen=True)
class Point:
    """Where an arm is run: the values of all factors."""

    steps: int
    keep: float
    neighbours: int
    pick: str = "nearest"
    similarity: str = "proxy_leep"


@dataclass(frozen=True)
class Run:
    """One arm on one task: what its start is made of. ``index``: of the task in its split."""

    world: WorldAtWork
    split: str
    index: int
    seed: int
    point: Point


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        about: what it is, for the report.
        start: makes the start; None for arms that prune iteratively (``ifp_cost``) or cut nothing ("dense").
        needs: what is made once for all targets: "zoo distilled", "universal whole", "elastic", …
        votes: whether N, pick and similarity matter to it; otherwise those factors do not repeat it.
        ifp_cost: cost of an iterative run as a multiple of MVP's (inf: a zoo entry's whole schedule).
        oracle: the task's own iterative mask has to be there.
        rate_of: the arm whose learning rate it takes; "" = it has its own.
        dense: nothing is cut, so keep ratios do not matter to it.
    """

    name: str
    about: str
    start: Callable[[Run, Job], Made] | None = None
    needs: tuple[str, ...] = ()
    votes: bool = False
    ifp_cost: float | None = None
    oracle: bool = False
    rate_of: str = ""
    dense: bool = False

    @property
    def costly(self) -> bool:
        return self.ifp_cost is not None and self.ifp_cost >= 3


ARMS: dict[str, Arm] = {}


def _arm(name: str, about: str, *needs: str, **options: Any) -> Callable[..., Any]:
    def register(start: Callable[[Run, Job], Made]) -> Callable[[Run, Job], Made]:
        ARMS[name] = Arm(name, about, start, needs, **options)
        return start

    return register


EQUAL_RATE_CONTROL = "universal, refined's rate"

# ---- the vote and its variants


def _vote(job: Job, run: Run) -> VoteOptions:
    return VoteOptions(neighbours=run.point.neighbours, similarity=run.point.similarity)


def _neighbours(run: Run, job: Job, zoo: Zoo) -> list[Neighbour]:
    """The nearest entries, or (controls) random or the farthest ones; ranked by the run's similarity."""
    job.vote = _vote(job, run)
    if run.point.pick == "nearest":
        return ask_neighbours(job, zoo)
    job.vote = replace(job.vote, neighbours=10**6, similarity="proxy_leep")
    ranked = ask_neighbours(job, zoo)
    job.vote = _vote(job, run)
    chosen = {
        "farthest": lambda: ranked[-run.point.neighbours :],
        "random": lambda: random.Random(job.seed).sample(ranked, min(run.point.neighbours, len(ranked))),
    }[run.point.pick]()
    job.neighbours = [(n.entry.name, n.similarity) for n in chosen]
    return chosen


def _mvp(kind: str, **vote: Any) -> Callable[[Run, Job], Made]:
    def start(run: Run, job: Job) -> Made:
        zoo = run.world.zoo(kind, run.point.keep)
        neighbours = _neighbours(run, job, zoo)
        job.vote = replace(job.vote, **vote)
        mask = voted_mask(job, neighbours)
        return merged_model(job, zoo, neighbours, mask), mask

    return start


for _name, _about, _kind, _options in (
    ("mvp", "vote (topk) and averaged weights of distilled voters", "distilled", {}),
    ("mvp plain", "the same with voters healed without distillation: plain MVP", "plain", {}),
    ("mvp sample", "units drawn from softmax(votes)", "distilled", {"rule": "sample"}),
    ("mvp + score", "vote + the target's own Taylor score, λ = 1", "distilled", {"own_score": 1.0}),
    (
        "mvp, score as prior",
        "ties of the vote broken by the own Taylor score",
        "distilled",
        {"prior": "taylor"},
    ),
    ("mvp specialised", "voters start from the wider universal model", "specialised", {}),
    ("mvp specialised + score", "and the own Taylor score, λ = 1", "specialised", {"own_score": 1.0}),
    ("mvp refined", "voters refine a universal model of their own size: their weights vote", "refined", {}),
    (
        "mvp refined, weighted",
        f"the same, voters weighted by softmax(similarity / {REFINED_WEIGHTING})",
        "refined",
        {"weighting": REFINED_WEIGHTING},
    ),
):
    _arm(_name, _about, f"zoo {_kind}", votes=True)(_mvp(_kind, **_options))


@_arm("random mask, averaged", "a random mask with the voters' averaged weights", "zoo distilled", votes=True)
def _random_averaged(run: Run, job: Job) -> Made:
    zoo = run.world.zoo("distilled", run.point.keep)
    mask = Mask.random(job.structure, job.keep, job.seed, job.align)
    return merged_model(job, zoo, _neighbours(run, job, zoo), mask), mask


@_arm("voted mask, pre-trained", "the vote's mask with the pre-trained weights", "zoo distilled", votes=True)
def _voted_pretrained(run: Run, job: Job) -> Made:
    mask = voted_mask(job, _neighbours(run, job, run.world.zoo("distilled", run.point.keep)))
    return small_model(job.backbone, job.structure, mask), mask


@_arm("one-shot mask, averaged", "one-shot Taylor's mask with averaged weights", "zoo distilled", votes=True)
def _one_shot_averaged(run: Run, job: Job) -> Made:
    zoo = run.world.zoo("distilled", run.point.keep)
    mask = _scored_mask(job, own_scores(job))
    return merged_model(job, zoo, _neighbours(run, job, zoo), mask), mask


@_arm(
    "own mask, averaged",
    "oracle: the task's own iterative mask with averaged weights",
    "zoo distilled",
    votes=True,
    oracle=True,
    rate_of="mvp",
)
def _own_averaged(run: Run, job: Job) -> Made:
    zoo = run.world.zoo("distilled", run.point.keep)
    mask = Mask.load(run.world.own_mask_path(run.split, run.index, run.seed, run.point.keep))
    return merged_model(job, zoo, _neighbours(run, job, zoo), mask), mask


@_arm(
    "own mask, pre-trained",
    "oracle: the task's own iterative mask with the pre-trained weights",
    oracle=True,
    rate_of="voted mask, pre-trained",
)
def _own_pretrained(run: Run, job: Job) -> Made:
    mask = Mask.load(run.world.own_mask_path(run.split, run.index, run.seed, run.point.keep))
    return small_model(job.backbone, job.structure, mask), mask


# ---- what is healed once for all tasks


def _universal(kind: str) -> Callable[[Run, Job], Made]:
    def start(run: Run, job: Job) -> Made:
        with job.cost.timed():
            stored = run.world.universal(kind, run.point.keep)
        return stored.model, stored.mask

    return start


for _name, _about, _kind in (
    ("universal", "one model of all zoo classes, distilled, at the zoo's whole cost", "whole"),
    ("universal, one entry's cost", "the same at one entry's cost", "entry"),
    ("universal, plain", "at the zoo's whole cost, not distilled", "plain"),
):
    _arm(_name, _about, f"universal {_kind}")(_universal(_kind))
_arm(
    EQUAL_RATE_CONTROL,
    "universal with the learning rate of the refined arm, so that no difference between them is the rate's",
    "universal whole",
    rate_of="mvp refined, weighted",
)(_universal("whole"))


@_arm(
    "universal cut by score",
    "the wider universal model cut by the target's own Taylor score",
    "universal start",
)
def _universal_cut(run: Run, job: Job) -> Made:
    with job.cost.timed():
        stored = run.world.universal("start", run.point.keep)
    scores = own_scores(job)
    with job.cost.timed():
        own = {name: scores[name].where(stored.mask.layers[name], -torch.inf) for name in job.structure.names}
        mask = _scored_mask(job, own)
        return small_model(job.backbone, job.structure, mask, _cut_out(stored, mask, job.structure)), mask


def _cut_out(stored: Any, mask: Mask, structure: Structure) -> dict[str, Tensor]:
    """The weights of a pruned model at a sub-mask of its own."""
    inner = Mask({name: bits[stored.mask.layers[name]] for name, bits in mask.layers.items()})
    state = prune_model(stored.model, inner).state_dict()
    known = mask.index_in(structure).keys()
    return {name: value for name, value in state.items() if name in known or not _is_head(stored.model, name)}


def _is_head(model: Any, name: str) -> bool:
    classifier = model.get_classifier()
    return any(model.state_dict(keep_vars=True)[name] is p for p in classifier.parameters())


def _elastic(mask_of: Callable[[Run, Job], Mask]) -> Callable[[Run, Job], Made]:
    def start(run: Run, job: Job) -> Made:
        mask = mask_of(run, job)
        with job.cost.timed():
            stored = run.world.elastic(run.world.config.keep)  # one set of weights for every ratio
            return prune_model(stored.model, mask, structure=job.structure), mask

    return start


def _elastic_vote(own_score: float) -> Callable[[Run, Job], Mask]:
    def mask_of(run: Run, job: Job) -> Mask:
        neighbours = _neighbours(run, job, run.world.zoo("plain", run.world.config.keep))
        job.vote = replace(job.vote, own_score=own_score)
        return voted_mask(job, neighbours)

    return mask_of


_arm("elastic", "one set of weights, cut by the vote", "elastic", votes=True)(_elastic(_elastic_vote(0.0)))
_arm("elastic + score", "cut by the vote + the own Taylor score, λ = 1", "elastic", votes=True)(
    _elastic(_elastic_vote(1.0))
)
_arm("elastic, one-shot mask", "cut by the own Taylor score alone", "elastic")(
    _elastic(lambda run, job: _scored_mask(job, own_scores(job)))
)
_arm("elastic, random mask", "cut at random", "elastic")(
    _elastic(lambda run, job: Mask.random(job.structure, job.keep, job.seed, job.align))
)


# ---- without anything made before


def _scored_mask(job: Job, scores: Scores) -> Mask:
    return Mask.from_scores(job.structure, scores, job.keep, job.align)


def _one_shot(criterion: str) -> Callable[[Run, Job], Made]:
    def start(run: Run, job: Job) -> Made:
        job.schedule = replace(job.schedule, criterion=criterion)
        mask = _scored_mask(job, own_scores(job))
        return small_model(job.backbone, job.structure, mask), mask

    return start


for _criterion in CRITERIA:
    if _criterion != "random":
        _arm(f"one-shot {_criterion}", f"units scored once by {_criterion}, cut once")(_one_shot(_criterion))


@_arm("random sub-network", "a random mask with the pre-trained weights")
def _random(run: Run, job: Job) -> Made:
    with job.cost.timed():
        mask = Mask.random(job.structure, job.keep, job.seed, job.align)
        return small_model(job.backbone, job.structure, mask), mask


@_arm("task-independent one-shot", "Taylor scores of all zoo classes pooled: one mask for every task")
def _task_independent(run: Run, job: Job) -> Made:
    pooled = run.world.pooled().split()
    pool = replace(job, data=pooled, known_features=None, _features=None, _glance=None, _scores=None)
    features, labels = pool.glance()
    with job.cost.timed():
        dense = job.backbone.copy_model()
        set_head(dense, class_mean_head(features, labels, pooled.num_classes))
        trainer = Trainer(dense, pooled, job.backbone.preprocessing, job.recipe, seed=0)
    scores = scoring_batches(trainer, job.structure, replace(job.schedule, score_batches=8), job.cost)
    with job.cost.timed():
        mask = _scored_mask(job, scores)
        return small_model(job.backbone, job.structure, mask), mask


@_arm("from scratch", "the small shapes with fresh random weights")
def _from_scratch(run: Run, job: Job) -> Made:
    mask = Mask.random(job.structure, job.keep, job.seed, job.align)
    small = small_model(job.backbone, job.structure, mask)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        for module in small.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
    return small, mask


@_arm("Torch-Pruning Taylor", "outside check: Torch-Pruning's own Taylor importance, pre-trained weights")
def _torch_pruning(run: Run, job: Job) -> Made:
    mask = _scored_mask(job, torch_pruning_scores(job))
    return small_model(job.backbone, job.structure, mask), mask


def torch_pruning_scores(job: Job) -> Scores:
    """Torch-Pruning's grouped Taylor importance of a ResNet's filters, on as many batches as our own score sees."""
    from mvp_ext.app.peers import import_torch_pruning as torch_pruning

    tp = torch_pruning()
    features, labels = job.glance()
    with job.cost.timed():
        dense = job.backbone.copy_model()
        set_head(dense, class_mean_head(features, labels, job.data.num_classes))
        trainer = Trainer(dense, job.data, job.backbone.preprocessing, job.recipe, seed=job.seed)
        size = job.backbone.preprocessing.size
        images = []
        dense.eval()
        for _ in range(job.schedule.score_batches):
            batch, labels = trainer.next_batch()
            nn.functional.cross_entropy(dense(batch), labels).backward()
            images.append(len(labels))
        example = torch.zeros(1, 3, size, size, device=job.backbone.device)
        graph = tp.DependencyGraph().build_dependency(dense, example_inputs=example)
        importance = tp.importance.GroupTaylorImportance()
        scores = {}
        for layer in job.structure:
            module = dense.get_submodule(layer.slices[0].tensor.rpartition(".")[0])
            group = graph.get_pruning_group(module, tp.prune_conv_out_channels, idxs=list(range(layer.units)))
            scores[layer.name] = importance(group).detach().float().cpu()
    job.cost.score_flops += 3 * sum(images) * job.image_flops
    return scores


@_arm("dense fine-tuned", "nothing cut: the ceiling", dense=True)
def _dense(run: Run, job: Job) -> Made:
    return job.backbone.copy_model(), Mask.full(job.structure)


for _times in (1, 3, 10):
    ARMS[f"iterative {_times}×"] = Arm(
        f"iterative {_times}×",
        f"iterative pruning, distilled, at {_times} × MVP's FLOPs",
        ifp_cost=float(_times),
    )
ARMS["iterative, full"] = Arm(
    "iterative, full",
    "iterative pruning, distilled, with a zoo entry's whole schedule",
    ifp_cost=float("inf"),
)
