"""One call of ``prune``, and the steps that its methods are made of: ask the neighbours, vote, merge, score."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.data.tasks import TaskData, few_of_each
from mvp_ext.model.checkpoint import PrunedCheckpoint, PrunedState
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import expand_state
from mvp_ext.pruning.iterative import scoring_batches
from mvp_ext.pruning.scores import Scores
from mvp_ext.pruning.settings import Settings, VoteOptions
from mvp_ext.pruning.vote import (
    merge_voters,
    normalised_scores,
    small_model,
    vote_mask,
    voter_weights,
    weight_prior,
)
from mvp_ext.train.backbone import Backbone, BackboneIdentity, extract_features, set_head
from mvp_ext.train.cost import Cost
from mvp_ext.train.heads import class_mean_head
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.trainer import Trainer
from mvp_ext.zoo.neighbours import Neighbour, Target, nearest_entries
from mvp_ext.zoo.shared import START, is_clustered
from mvp_ext.zoo.zoo import Zoo, ZooError

# Of all classes together, to find neighbours and to score units: a dense pass over 1000 was half of a task's cost.
SAMPLE_IMAGES = 320
# At least, for what a zoo says of classes.
DESCRIBED_OF_A_CLASS = 4

# Voters that weigh less change nothing that matters, and reading each takes milliseconds.
LEAST_SHARE = 0.02


@dataclass(kw_only=True)
class Job:
    """One call of ``prune``: its inputs, checked, and what methods need of them. ``cost`` is filled as the work goes.

    Attributes:
        settings: with nothing left open: scope and recipe are there.
        steps: fine-tuning steps; None: not known before there is a start.
        neighbours: what the result says of the voters; a method that asks some puts them there.
        known_features: the dense backbone's on all training images, f32 [n, F], and the seconds that they took.
        choice: what the result says of what was chosen for the task, JSON values; who chooses puts it there.
        targets: soft labels of the training images, f32 [n, k], that the last head is fitted to; None: their labels. A
            method that knows more of the classes than these images show puts them there.
        told: share of the images whose targets are such ones, in [0, 1].
    """

    backbone: Backbone
    data: TaskData
    structure: Structure
    settings: Settings
    recipe: Recipe
    zoo: Zoo | None
    steps: int | None
    vote: VoteOptions
    task_name: str
    cost: Cost
    neighbours: list[tuple[str, float]] = field(default_factory=list)
    known_features: tuple[Tensor, float] | None = None
    choice: dict[str, Any] | None = None
    targets: Tensor | None = None
    told: float = 0.0
    _zoo_is_ours: bool = False
    _start: PrunedCheckpoint | None = None
    _described: tuple[Tensor, Tensor] | None = None
    _features: Tensor | None = None
    _sample: tuple[Tensor, Tensor] | None = None
    _scores: Scores | None = None

    def features(self) -> Tensor:
        """The dense backbone's on all training images, f32 [n, F]; the first call books their pass."""
        if self._features is None:
            self._features = self._extract(None, "refit_flops")
        return self._features

    def features_of(self, index: Tensor) -> Tensor:
        """The same of some, f32 [m, F], by their numbers, int64 [m]; books their pass unless all have been paid for."""
        return self._extract(index, "refit_flops") if self._features is None else self._features[index]

    def sampled_features(self, spent_on: str = "refit_flops") -> tuple[Tensor, Tensor]:
        """The same of a few images of each class, f32 [m, F], with their labels, int64 [m]: enough to find the task's
        neighbours and to score units, at a fraction of the pass. All of them where they have been paid for.
        """
        if self._features is not None:
            return self._features, self.data.train_labels
        if self._sample is None:
            index = few_of_each(self.data.train_labels, SAMPLE_IMAGES, self.settings.seed)
            self._sample = self._extract(index, spent_on), self.data.train_labels[index]
        return self._sample

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

    def described(self) -> tuple[Tensor, Tensor]:
        """Features f32 [m, F] and labels int64 [m] by which the zoo compares tasks: of a clustered one, its universal
        model's.
        """
        if self.zoo is None or not is_clustered(self.zoo):
            return self.sampled_features("similarity_flops")
        if self._described is None:
            count = max(SAMPLE_IMAGES, DESCRIBED_OF_A_CLASS * self.data.num_classes)
            index = few_of_each(self.data.train_labels, count, self.settings.seed)
            with self.cost.timed():
                start = self.start(self.zoo)
            assert start is not None
            self._described = self.features_by(start.model, index), self.data.train_labels[index]
        return self._described

    def features_by(self, model: nn.Module, index: Tensor) -> Tensor:
        """Those of another model on some of the training images, f32 [m, F]; books their pass as one for similarity."""
        size = self.backbone.preprocessing.size
        with self.cost.timed():
            images = self.data.train_images[index]
            features = extract_features(model, images, self.backbone.preprocessing, self.recipe.precision)
        self.cost.similarity_flops += len(index) * count_flops(model, (3, size, size))
        return features

    def description(self) -> tuple[Tensor, Tensor]:
        """Features and labels of images that describe the task to a zoo; unbooked, for they make no model."""
        if self.zoo is not None and is_clustered(self.zoo):
            return replace(self, cost=Cost()).described()
        if self.known_features is not None:
            return self.known_features[0], self.data.train_labels
        unbooked = replace(self, cost=Cost())
        return unbooked.sampled_features()

    @property
    def image_flops(self) -> int:
        size = self.backbone.preprocessing.size
        return count_flops(self.backbone.model, (3, size, size))

    def start(self, zoo: Zoo) -> PrunedCheckpoint | None:
        """What the zoo's entries started from, read once; None where that was the dense model. Not to be changed."""
        if self._start is None and (stored := zoo.shared(START)) is not None:
            self._start = stored.load(self.backbone.device)
        return self._start

    def need_zoo(self, method: str) -> Zoo:
        if self.zoo is None:
            raise ZooError(
                f"prune: method {method!r} needs a zoo; got none. Build one with build_zoo or `mvp-ext zoo build`"
            )
        if not self._zoo_is_ours:
            # Entries of other dense weights have the same shapes: they would merge into nonsense.
            with self.cost.timed():
                self.zoo.check(BackboneIdentity.of(self.backbone.model, self.structure))
            self._zoo_is_ours = True
        return self.zoo


def find_neighbours(job: Job, zoo: Zoo) -> list[Neighbour]:
    """The task's nearest entries, by ``job.vote``; those whose vote would weigh next to nothing are not read."""
    features, labels = job.described()
    target = Target(job.backbone, job.structure, job.data, features, labels)
    search = partial(
        nearest_entries,
        zoo,
        target,
        similarity=job.vote.similarity,
        shortlist=job.vote.shortlist,
        images=job.vote.images,
        seed=job.settings.seed,
        cost=job.cost,
        exclude=(job.task_name,),
    )
    count = job.vote.neighbours
    if job.vote.similarity == "proxy_leep" and job.vote.weighting is not None:
        ranked = search(n=count, read_weights=False)
        shares = voter_weights(ranked, job.vote.weighting) / len(ranked)
        count = max(1, int((shares >= LEAST_SHARE).sum()))
        neighbours = _with_weights(job, ranked[:count]) or search(n=count)
    else:
        neighbours = search(n=count)
    job.neighbours = [(n.entry.name, n.similarity) for n in neighbours]
    return neighbours


def _with_weights(job: Job, nearest: Sequence[Neighbour]) -> list[Neighbour]:
    """These with their weights; none of them where one is damaged, so that the whole zoo has to be ranked again."""
    with job.cost.timed():
        try:
            return [replace(neighbour, stored=neighbour.read()) for neighbour in nearest]
        except ZooError:
            return []


def voted_mask(job: Job, neighbours: Sequence[Neighbour]) -> Mask:
    """What these neighbours vote for, with the target's own score where ``job.vote`` wants it."""
    own = normalised_scores(score_target(job), job.structure) if job.vote.needs_scores else None
    with job.cost.timed():
        prior = own if job.vote.prior == "taylor" else weight_prior(job.backbone.model, job.structure)
        return vote_mask(
            [n.entry.mask for n in neighbours],
            job.structure,
            keep=job.settings.keep,
            weights=voter_weights(neighbours, job.vote.weighting),
            prior=prior,
            rule=job.vote.rule,
            temperature=job.vote.temperature,
            align=job.settings.align,
            seed=job.settings.seed,
            score=job.vote.score_weight * own if own is not None and job.vote.score_weight else None,
        )


def merged_model(job: Job, zoo: Zoo, neighbours: Sequence[Neighbour], mask: Mask) -> nn.Module:
    """The sub-network of ``mask`` with the weights that these neighbours share.

    Where none has an element it is the pre-trained one, or that of the model which the zoo's entries started from.
    """
    with job.cost.timed():
        weights = voter_weights(neighbours, job.vote.weighting)
        states, masks = [n.read().state for n in neighbours], [n.entry.mask for n in neighbours]
        start = job.start(zoo)
        if start is not None and all(each == start.mask for each in (mask, *masks)):
            return _averaged(start.model, states, weights)
        base: Mapping[str, Tensor] = job.backbone.model.state_dict()
        if start is not None:
            wide = expand_state(start.model.state_dict(), start.structure, start.mask, base)
            # All but the head.
            base = {n: wide[n] if wide[n].shape == t.shape else t for n, t in base.items()}
        merged = merge_voters(base, states, masks, job.structure, mask, weights)
        return small_model(job.backbone, job.structure, mask, merged)


def model_for_features(
    stored: PrunedState, start: PrunedCheckpoint | None, device: torch.device
) -> nn.Module:
    """An entry's, but for its head. Where it has the units of the zoo's start it is a copy of that with the entry's
    weights: building a model takes longer than to run it on a task's images."""
    if start is not None and stored.mask == start.mask:
        return _averaged(start.model, [stored.state], torch.ones(1))
    return stored.build().to(device)


@torch.no_grad()
def _averaged(start: nn.Module, states: Sequence[Mapping[str, Tensor]], weights: Tensor) -> nn.Module:
    """A model of the same shapes as all voters: the mean of their weights, where they all have a tensor."""
    model = copy.deepcopy(start)
    shares = (weights.double() / weights.double().sum()).tolist()
    for name, tensor in model.state_dict().items():
        theirs = [state.get(name) for state in states]
        if tensor.is_floating_point() and all(t is not None and t.shape == tensor.shape for t in theirs):
            mean = sum(share * t.double() for share, t in zip(shares, theirs, strict=True))  # type: ignore[union-attr]
            tensor.copy_(mean)
    return model


def score_target(job: Job) -> Scores:
    """Every unit of the dense model scored on the target's images, by the schedule's criterion; once a job."""
    if job._scores is not None:
        return job._scores
    features, labels = job.sampled_features()
    with job.cost.timed():
        dense = job.backbone.copy_model()
        set_head(dense, class_mean_head(features, labels, job.data.num_classes))
        trainer = Trainer(dense, job.data, job.backbone.preprocessing, job.recipe, seed=job.settings.seed)
    job._scores = scoring_batches(
        trainer, job.structure, job.settings.schedule, job.cost, seed=job.settings.seed
    )
    return job._scores
