"""The arms: how each makes its start, what it needs that is made once, and how its learning rate is chosen.

A start is a mask and weights for it. Every arm then goes the same way (``mvp_ext.prune``): statistics re-estimated,
class-mean head, J steps, ridge head.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.app.peers import import_torch_pruning
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.iterative import scoring_batches
from mvp_ext.pruning.job import Job, find_neighbours, merged_model, score_target, voted_mask
from mvp_ext.pruning.scores import Scores
from mvp_ext.pruning.settings import REFINED_WEIGHTING, VoteOptions
from mvp_ext.pruning.vote import small_model
from mvp_ext.train.backbone import set_head
from mvp_ext.train.heads import class_mean_head
from mvp_ext.train.trainer import Trainer
from mvp_ext.zoo.neighbours import Neighbour
from mvp_ext.zoo.zoo import Zoo

from .config import Factors
from .elastic import cut_elastic
from .similarity import MEASURES
from .worlds import PreparedWorld

EQUAL_RATE_CONTROL = "universal, refined's rate"
# Whose cost the iterative arms' budgets are multiples of.
REFERENCE_ARM = "mvp"


@dataclass(frozen=True)
class StudyArm:
    """One arm.

    Attributes:
        about: what it is, for the report.
        start: makes the start; None for arms that prune iteratively (``ifp_cost``).
        zoo: kind of the zoo whose entries vote; "" where none do: N, pick and similarity then do not repeat the arm.
        universal: kind of the universal model that it starts from. elastic: whether it is cut from the elastic weights.
        vote: further ``VoteOptions``. criterion: by which units are scored.
        ifp_cost: cost of an iterative run as a multiple of MVP's (inf: a zoo entry's whole schedule).
        oracle: the task's own iterative mask has to be there.
        rate_of: the arm whose learning rate it takes; "" = it has its own.
        dense: nothing is cut, so keep ratios do not matter to it.
    """

    name: str
    about: str
    start: Callable[[Run, Job], tuple[nn.Module, Mask]] | None = None
    zoo: str = ""
    universal: str = ""
    elastic: bool = False
    vote: Mapping[str, Any] = field(default_factory=dict)
    criterion: str = "taylor"
    ifp_cost: float | None = None
    oracle: bool = False
    rate_of: str = ""
    dense: bool = False

    @property
    def votes(self) -> bool:
        return bool(self.zoo)

    @property
    def costly(self) -> bool:
        return self.ifp_cost is not None and self.ifp_cost >= 3


@dataclass
class Run:
    """One arm on one task: what its start is made of. ``index``: of the task in its split."""

    world: PreparedWorld
    arm: StudyArm
    split: str
    index: int
    seed: int
    factors: Factors
    _neighbours: list[Neighbour] | None = None

    @property
    def vote(self) -> VoteOptions:
        name = self.factors.similarity
        return VoteOptions(
            neighbours=self.factors.neighbours, similarity=MEASURES.get(name, name), **self.arm.vote
        )

    @property
    def zoo(self) -> Zoo:
        """Whose entries vote. Elastic weights serve every keep ratio, with the masks that they were trained under."""
        keep = self.world.config.keep if self.arm.elastic else self.factors.keep
        return self.world.zoo(self.arm.zoo, keep)

    def neighbours(self, job: Job) -> list[Neighbour]:
        """The nearest entries, or (controls) random or the farthest ones; asked once."""
        if self._neighbours is None:
            nearest = self.factors.pick == "nearest"
            self._neighbours = find_neighbours(job, self.zoo) if nearest else self._pick(job)
        return self._neighbours

    def _pick(self, job: Job) -> list[Neighbour]:
        vote = job.vote
        job.vote = replace(vote, neighbours=10**6, similarity="proxy_leep")
        ranked = find_neighbours(job, self.zoo)
        job.vote = vote
        count = min(vote.neighbours, len(ranked))
        if self.factors.pick == "farthest":
            chosen = ranked[-count:]
        elif self.factors.pick == "random":
            chosen = random.Random(job.settings.seed).sample(ranked, count)
        else:
            raise ValueError(f"pick: expected nearest, random or farthest, got {self.factors.pick!r}")
        job.neighbours = [(n.entry.name, n.similarity) for n in chosen]
        return chosen


Start = Callable[[Run, Job], tuple[nn.Module, Mask]]
MaskOf = Callable[[Run, Job], Mask]

# ---- masks


def _voted(run: Run, job: Job) -> Mask:
    return voted_mask(job, run.neighbours(job))


def _random(run: Run, job: Job) -> Mask:
    settings = job.settings
    return Mask.random(job.structure, settings.keep, settings.seed, settings.align)


def _scored(run: Run, job: Job) -> Mask:
    schedule = replace(job.settings.schedule, criterion=run.arm.criterion)
    job.settings = replace(job.settings, schedule=schedule)
    return _best(job, score_target(job))


def _own(run: Run, job: Job) -> Mask:
    """What iterative pruning of this very task ended with."""
    return Mask.load(run.world.own_mask_path(run.split, run.index, run.seed, run.factors.keep))


def _pooled(run: Run, job: Job) -> Mask:
    """By the scores on images of all the zoo's classes: the same for every task."""
    pooled = run.world.pooled().split()
    pool = replace(job, data=pooled, known_features=None, _features=None, _sample=None, _scores=None)
    features, labels = pool.sampled_features()
    with job.cost.timed():
        dense = job.backbone.copy_model()
        set_head(dense, class_mean_head(features, labels, pooled.num_classes))
        trainer = Trainer(dense, pooled, job.backbone.preprocessing, job.recipe, seed=0)
    schedule = replace(job.settings.schedule, score_batches=8)
    return _best(job, scoring_batches(trainer, job.structure, schedule, job.cost))


def _peer(run: Run, job: Job) -> Mask:
    return _best(job, torch_pruning_scores(job))


def _best(job: Job, scores: Scores) -> Mask:
    return Mask.from_scores(job.structure, scores, job.settings.keep, job.settings.align)


# ---- weights for a mask


def _averaged(mask_of: MaskOf) -> Start:
    """What the voters share."""

    def start(run: Run, job: Job) -> tuple[nn.Module, Mask]:
        mask = mask_of(run, job)
        return merged_model(job, run.zoo, run.neighbours(job), mask), mask

    return start


def _pretrained(mask_of: MaskOf) -> Start:
    def start(run: Run, job: Job) -> tuple[nn.Module, Mask]:
        mask = mask_of(run, job)
        with job.cost.timed():
            return small_model(job.backbone, job.structure, mask), mask

    return start


def _elastic(mask_of: MaskOf) -> Start:
    def start(run: Run, job: Job) -> tuple[nn.Module, Mask]:
        mask = mask_of(run, job)
        return cut_elastic(run.world.elastic_path, job, mask), mask

    return start


def _fresh(mask_of: MaskOf) -> Start:
    """Random ones."""

    def start(run: Run, job: Job) -> tuple[nn.Module, Mask]:
        small, mask = _pretrained(mask_of)(run, job)
        reset_weights(small, job.settings.seed)
        return small, mask

    return start


def reset_weights(model: nn.Module, seed: int) -> None:
    """Every layer's as it draws them itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]


def _universal(run: Run, job: Job) -> tuple[nn.Module, Mask]:
    with job.cost.timed():
        stored = run.world.universal(run.arm.universal, run.factors.keep)
    return stored.model, stored.mask


def _universal_cut(run: Run, job: Job) -> tuple[nn.Module, Mask]:
    """A wider universal model, cut once more by the target's own score."""
    with job.cost.timed():
        stored = run.world.universal(run.arm.universal, run.factors.keep)
    scores = score_target(job)
    with job.cost.timed():
        own = {name: scores[name].where(stored.mask.layers[name], -torch.inf) for name in job.structure.names}
        mask = _best(job, own)
        return small_model(job.backbone, job.structure, mask, _cut_out(stored, mask, job.structure)), mask


def _cut_out(stored: PrunedCheckpoint, mask: Mask, structure: Structure) -> dict[str, Tensor]:
    """The weights of a pruned model at a sub-mask of its own; without its head, unless that is cut too."""
    inner = Mask({name: bits[stored.mask.layers[name]] for name, bits in mask.layers.items()})
    state = prune_model(stored.model, inner).state_dict()
    head = {id(p) for p in stored.model.get_classifier().parameters()}  # type: ignore[operator]
    of_head = {name for name, p in stored.model.named_parameters() if id(p) in head}
    left_out = of_head - mask.index_in(structure).keys()
    return {name: value for name, value in state.items() if name not in left_out}


def _dense(run: Run, job: Job) -> tuple[nn.Module, Mask]:
    return job.backbone.copy_model(), Mask.full(job.structure)


def torch_pruning_scores(job: Job) -> Scores:
    """Torch-Pruning's grouped Taylor importance of a ResNet's filters, on as many batches as our own score sees."""
    tp = import_torch_pruning()
    features, labels = job.sampled_features()
    with job.cost.timed():
        dense = job.backbone.copy_model()
        set_head(dense, class_mean_head(features, labels, job.data.num_classes))
        trainer = Trainer(dense, job.data, job.backbone.preprocessing, job.recipe, seed=job.settings.seed)
        size = job.backbone.preprocessing.size
        images = 0
        dense.eval()
        for _ in range(job.settings.schedule.score_batches):
            batch, labels = trainer.next_batch()
            nn.functional.cross_entropy(dense(batch), labels).backward()
            images += len(labels)
        example = torch.zeros(1, 3, size, size, device=job.backbone.device)
        graph = tp.DependencyGraph().build_dependency(dense, example_inputs=example)
        importance = tp.importance.GroupTaylorImportance()
        scores = {}
        for layer in job.structure:
            module = dense.get_submodule(layer.slices[0].tensor.rpartition(".")[0])
            group = graph.get_pruning_group(module, tp.prune_conv_out_channels, idxs=list(range(layer.units)))
            scores[layer.name] = importance(group).detach().float().cpu()
    job.cost.score_flops += 3 * images * job.image_flops
    return scores


# ---- the arms


def _mvp(name: str, about: str, zoo: str, **vote: Any) -> StudyArm:
    return StudyArm(name, about, _averaged(_voted), zoo=zoo, vote=vote)


def _one_shot(criterion: str) -> StudyArm:
    about = f"units scored once by {criterion}, cut once"
    return StudyArm(f"one-shot {criterion}", about, _pretrained(_scored), criterion=criterion)


def _iterative(times: int) -> StudyArm:
    about = f"iterative pruning, distilled, at {times} × MVP's FLOPs"
    return StudyArm(f"iterative {times}×", about, ifp_cost=float(times))


# In the order of the report.
_TABLE = (
    # The vote and its variants.
    _mvp("mvp", "vote (topk) and averaged weights of distilled voters", "distilled"),
    _mvp("mvp plain", "the same with voters healed without distillation: plain MVP", "plain"),
    _mvp("mvp sample", "units drawn from softmax(votes)", "distilled", rule="sample"),
    _mvp("mvp + score", "vote + the target's own Taylor score, λ = 1", "distilled", score_weight=1.0),
    _mvp(
        "mvp, score as prior", "ties of the vote broken by the own Taylor score", "distilled", prior="taylor"
    ),
    _mvp("mvp specialised", "voters start from the wider universal model", "specialised"),
    _mvp("mvp specialised + score", "and the own Taylor score, λ = 1", "specialised", score_weight=1.0),
    _mvp("mvp refined", "voters refine a universal model of their own size: their weights vote", "refined"),
    _mvp(
        "mvp refined, weighted",
        f"the same, voters weighted by softmax(similarity / {REFINED_WEIGHTING})",
        "refined",
        weighting=REFINED_WEIGHTING,
    ),
    StudyArm(
        "random mask, averaged",
        "a random mask with the voters' averaged weights",
        _averaged(_random),
        zoo="distilled",
    ),
    StudyArm(
        "voted mask, pre-trained",
        "the vote's mask with the pre-trained weights",
        _pretrained(_voted),
        zoo="distilled",
    ),
    StudyArm(
        "one-shot mask, averaged",
        "one-shot Taylor's mask with averaged weights",
        _averaged(_scored),
        zoo="distilled",
    ),
    StudyArm(
        "own mask, averaged",
        "oracle: the task's own iterative mask with averaged weights",
        _averaged(_own),
        zoo="distilled",
        oracle=True,
        rate_of="mvp",
    ),
    StudyArm(
        "own mask, pre-trained",
        "oracle: the task's own iterative mask with the pre-trained weights",
        _pretrained(_own),
        oracle=True,
        rate_of="voted mask, pre-trained",
    ),
    # What is healed once for all tasks.
    StudyArm(
        "universal",
        "one model of all zoo classes, distilled, at the zoo's whole cost",
        _universal,
        universal="whole",
    ),
    StudyArm("universal, one entry's cost", "the same at one entry's cost", _universal, universal="entry"),
    StudyArm("universal, plain", "at the zoo's whole cost, not distilled", _universal, universal="plain"),
    StudyArm(
        EQUAL_RATE_CONTROL,
        "universal with the learning rate of the refined arm, so that no difference between them is the rate's",
        _universal,
        universal="whole",
        rate_of="mvp refined, weighted",
    ),
    StudyArm(
        "universal cut by score",
        "the wider universal model cut by the target's own Taylor score",
        _universal_cut,
        universal="start",
    ),
    StudyArm("elastic", "one set of weights, cut by the vote", _elastic(_voted), zoo="plain", elastic=True),
    StudyArm(
        "elastic + score",
        "cut by the vote + the own Taylor score, λ = 1",
        _elastic(_voted),
        zoo="plain",
        elastic=True,
        vote={"score_weight": 1.0},
    ),
    StudyArm("elastic, one-shot mask", "cut by the own Taylor score alone", _elastic(_scored), elastic=True),
    StudyArm("elastic, random mask", "cut at random", _elastic(_random), elastic=True),
    # Without anything made before.
    _one_shot("taylor"),
    _one_shot("taylor2"),
    _one_shot("activation"),
    _one_shot("weight_taylor"),
    _one_shot("l1"),
    _one_shot("l2"),
    _one_shot("fpgm"),
    _one_shot("synflow"),
    StudyArm("random sub-network", "a random mask with the pre-trained weights", _pretrained(_random)),
    StudyArm(
        "task-independent one-shot",
        "Taylor scores of all zoo classes pooled: one mask for every task",
        _pretrained(_pooled),
    ),
    StudyArm("from scratch", "the small shapes with fresh random weights", _fresh(_random)),
    StudyArm(
        "Torch-Pruning Taylor",
        "outside check: Torch-Pruning's own Taylor importance, pre-trained weights",
        _pretrained(_peer),
    ),
    StudyArm("dense fine-tuned", "nothing cut: the ceiling", _dense, dense=True),
    _iterative(1),
    _iterative(3),
    _iterative(10),
    StudyArm(
        "iterative, full",
        "iterative pruning, distilled, with a zoo entry's whole schedule",
        ifp_cost=float("inf"),
    ),
)
ARMS = {arm.name: arm for arm in _TABLE}
