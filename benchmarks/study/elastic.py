"""An elastic backbone: one set of dense-shape weights that works under many masks and keep ratios.

Each step cuts the weights at the real, small shapes of a few masks, distils the dense model's features into each cut,
and puts the gradients back where they were cut from. In the way of slimmable networks (Yu et al. 2019: the smallest and
the largest width in every step, the sandwich rule), but over sets of units instead of widths.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.data.images import content_hash
from mvp_ext.data.tasks import Task, TaskData
from mvp_ext.model.checkpoint import load_pruned, save_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import expand_state, prune_model
from mvp_ext.pruning.build import pooled_task
from mvp_ext.pruning.job import Job
from mvp_ext.pruning.vote import vote_mask, weight_prior
from mvp_ext.train.backbone import Backbone, BackboneIdentity, extract_features, set_head
from mvp_ext.train.cost import Cost
from mvp_ext.train.heads import class_mean_head
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.resume import RunFile
from mvp_ext.train.trainer import Teacher, Trainer


@dataclass(frozen=True)
class ElasticOptions:
    """Which cuts an elastic backbone is trained for.

    Attributes:
        smallest, largest: keep ratios are drawn between these, evenly on a logarithmic scale.
        draws: masks a step. From two on, the first two have the smallest and the largest ratio (sandwich rule).
        voted: share of the masks that are a vote of some of the zoo's entries; the others are random.
        voters: how many entries vote.
        align: kept counts of filters and neurons are rounded to multiples of this.
    """

    smallest: float = 0.05
    largest: float = 0.3
    draws: int = 1
    voted: float = 0.5
    voters: int = 5
    align: int = 8

    def __post_init__(self) -> None:
        if not 0.0 < self.smallest <= self.largest <= 1.0:
            raise ValueError(
                f"ElasticOptions: expected 0 < smallest ≤ largest ≤ 1, got {self.smallest} and {self.largest}"
            )
        if self.draws < 1 or self.voters < 1 or not 0.0 <= self.voted <= 1.0:
            raise ValueError(
                "ElasticOptions: expected at least one draw and voter and a share of votes in [0, 1], "
                f"got {self.draws}, {self.voters} and {self.voted}"
            )


def build_elastic(
    backbone: Backbone,
    tasks: Sequence[Task],
    path: Path,
    *,
    steps: int,
    masks: Sequence[Mask] = (),
    options: ElasticOptions | None = None,
    scope: str | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Cost | None:
    """One set of dense-shape weights for all classes of the tasks, from which any vote at any ratio can be cut.

    Trained by ``train_elastic``, whose arguments these are, and written to ``path``. None if it is there already; what
    was interrupted goes on.
    """
    if path.exists():
        return None
    structure = find_structure(backbone.model, scope)
    pooled = pooled_task(tasks, "elastic", seed)
    trained, cost = train_elastic(
        backbone,
        pooled.split(),
        structure,
        steps=steps,
        masks=masks,
        options=options,
        recipe=recipe,
        seed=seed,
        on_step=progress,
        resume=path.with_suffix(".partial"),
    )
    extra = {"classes": list(pooled.classes), "cost": cost.to_dict()}
    save_pruned(trained, path, mask=Mask.full(structure), structure=structure, extra=extra)
    return cost


def cut_elastic(path: Path, job: Job, mask: Mask) -> nn.Module:
    """The small model of ``mask``, cut from the elastic weights in ``path``."""
    with job.cost.timed():
        stored = load_pruned(path, job.backbone.device)
        return prune_model(stored.model, mask, structure=job.structure)


def train_elastic(
    backbone: Backbone,
    data: TaskData,
    structure: Structure,
    *,
    steps: int,
    options: ElasticOptions | None = None,
    masks: Sequence[Mask] = (),
    recipe: Recipe | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    resume: Path | None = None,
) -> tuple[nn.Module, Cost]:
    """Weights at the dense model's shapes, trained so that sub-networks cut from them need little healing.

    The dense model is the teacher and the start. Normalisation statistics of the result are the dense model's: whoever
    cuts it re-estimates them.

    Args:
        data: all classes that it should serve, pooled.
        structure: what is cut, of the dense model. masks: of the zoo's entries; empty: all masks are random.
        resume: a file that a killed run of the same arguments goes on from, with the same numbers; removed at the end.

    Returns:
        The elastic model, with a classifier of ``data``'s classes, and the cost.
    """
    options, recipe = options or ElasticOptions(), recipe or Recipe.for_model(backbone.model)
    cost = Cost()
    with cost.timed():
        features = extract_features(
            backbone.model, data.train_images, backbone.preprocessing, recipe.precision
        )
        teacher = Teacher.from_features(backbone, features)
        cost.refit_flops += len(features) * teacher.flops
        model = backbone.copy_model()
        set_head(model, class_mean_head(features, data.train_labels, data.num_classes))
        draw = _Draw(backbone.model, structure, options, tuple(masks), seed)
    run = RunFile(
        resume,
        {
            "backbone": BackboneIdentity.of(backbone.model, structure).to_meta(),
            "images": content_hash([data.train_images, data.train_labels], data.class_names),
            "masks": content_hash([mask.to_vector() for mask in masks], ()),
            "others": [asdict(options), asdict(recipe), steps, seed, asdict(backbone.preprocessing)],
        },
    )
    trainer = _ElasticTrainer(model, data, backbone, recipe, draw, seed=seed, teacher=teacher, cost=cost)
    saved = run.load()
    if saved is not None:
        saved.restore(trainer)

    def stepped(now: int) -> None:
        run.save_if_due(trainer, now)
        if on_step is not None:
            on_step(now, steps)

    trainer.run(steps, "cosine", stepped, done=0 if saved is None else saved.done)
    run.remove()
    return model.eval(), cost


@dataclass(frozen=True)
class _Draw:
    """The masks of each step: a function of the seed and the step alone, so that a run can go on anywhere."""

    model: nn.Module
    structure: Structure
    options: ElasticOptions
    masks: tuple[Mask, ...]
    seed: int

    def __call__(self, step: int) -> list[Mask]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return [self._one(number, generator) for number in range(self.options.draws)]

    def _one(self, number: int, generator: torch.Generator) -> Mask:
        options = self.options
        share, kind = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if options.draws > 1 and number < 2:
            share = float(number)
        low, high = math.log(options.smallest), math.log(options.largest)
        keep = math.exp(low + share * (high - low))
        seed = int(torch.randint(2**31, (1,), generator=generator))
        if not self.masks or kind >= options.voted:
            return Mask.random(self.structure, keep, seed, options.align)
        chosen = torch.randperm(len(self.masks), generator=generator)[: options.voters].tolist()
        prior = weight_prior(self.model, self.structure)
        voters = [self.masks[i] for i in chosen]
        return vote_mask(voters, self.structure, keep=keep, prior=prior, align=options.align)


class _ElasticTrainer(Trainer):
    """Trains dense-shape weights through cuts of them. A step's loss is the mean over its masks."""

    def __init__(
        self,
        model: nn.Module,
        data: TaskData,
        backbone: Backbone,
        recipe: Recipe,
        draw: _Draw,
        **options: Any,
    ) -> None:
        super().__init__(model, data, backbone.preprocessing, recipe, **options)
        self._draw = draw
        # Kept counts → FLOPs of one image: few shapes come again and again.
        self._flops_of: dict[tuple[int, ...], int] = {}

    def _backward(self, batch: Tensor, labels: Tensor, step: int) -> float:
        masks = self._draw(step)
        parameters = dict(self.model.named_parameters())
        total, flops = 0.0, 0
        for mask in masks:
            cut = prune_model(copy.deepcopy(self.model), mask, structure=self._draw.structure)
            loss = self._loss(cut, batch, labels) / len(masks)
            loss.backward()
            total += float(loss.detach())
            state = cut.state_dict()
            for name, parameter in cut.named_parameters():
                state[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients = expand_state(state, self._draw.structure, mask)
            for name, parameter in parameters.items():
                gradient = gradients[name]
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            shape = tuple(mask.kept.values())
            if shape not in self._flops_of:
                self._flops_of[shape] = self._count_flops(cut)
            flops += self._flops_of[shape]
        self._image_flops = flops
        return total
