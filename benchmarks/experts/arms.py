"""What is compared, on one task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from study.arms import torch_pruning_scores
from torch import nn

from mvp_ext.data.tasks import Task
from mvp_ext.model.mask import Mask
from mvp_ext.pruning.job import Job
from mvp_ext.pruning.methods import METHODS
from mvp_ext.pruning.prune import RunOptions, prune
from mvp_ext.pruning.settings import REFINED_WEIGHTING, VoteOptions
from mvp_ext.pruning.vote import small_model
from mvp_ext.train.backbone import extract_features
from mvp_ext.train.evaluate import accuracy_of
from mvp_ext.train.heads import ridge_head, soft_labels

from .worlds import Prepared


def _universal_that_knows(prepared: Prepared, job: Job) -> tuple[nn.Module, Mask]:
    """The universal model, which says what it knows as the experts do, and is told which classes those are."""
    small, mask = METHODS["universal"](job)
    names, model, statistics = prepared.known_to_universal
    labels = job.data.train_labels
    known = {c: names.index(name) for c, name in enumerate(job.data.class_names) if name in names}
    if len(known) >= 2:
        classes = torch.tensor(sorted(known))
        index = torch.isin(labels, classes).nonzero().flatten()
        features = job.features_by(model, index)
        said = statistics.head([known[c] for c in classes.tolist()])(features)
        soft = soft_labels(said, features, torch.searchsorted(classes, labels[index]))
        if soft is not None:
            job.targets = nn.functional.one_hot(labels, job.data.num_classes).float()
            job.targets[index[:, None], classes] = soft
    return small, mask


def _base(prepared: Prepared, job: Job) -> tuple[nn.Module, Mask]:
    start = job.start(prepared.zoo("clustered"))
    assert start is not None
    return copy.deepcopy(start.model), start.mask


def _torch_pruning(prepared: Prepared, job: Job) -> tuple[nn.Module, Mask]:
    """Cut once by Torch-Pruning's own importance."""
    mask = Mask.from_scores(job.structure, torch_pruning_scores(job), job.settings.keep, job.settings.align)
    with job.cost.timed():
        return small_model(job.backbone, job.structure, mask), mask


# Of a class, in a task.
IMAGES = (10, 50)
SPLITS = ("known", "hidden", "new")
# Arms of a part are a unit of their own, of the first world's first seed; those of no part are run everywhere.
PARTS = STEPS, CONTROLS, LONGER, SHARES, PEERS = "steps", "controls", "longer", "shares", "peers"
# The backbone's, where it was trained on the task's classes: what nobody needs a vote for.
DENSE, OWN_HEAD = "dense, ridge head", "dense, its own head"
_WEIGHTED = VoteOptions(similarity="proxy_leep", weighting=REFINED_WEIGHTING)
_MANY = IMAGES[-1:]
_RECIPE = "universal, experts' recipe"


@dataclass(frozen=True)
class Arm:
    """``zoo``: what is made once for it; ``steps``: at which J it is run, and with how many ``images`` of a class.

    ``method`` is of ``prune``, or takes what is prepared and a job. Several may have a name: more J of it.
    """

    name: str
    zoo: str | None
    method: Any
    vote: VoteOptions | None = None
    steps: tuple[Any, ...] = (20,)
    images: tuple[int, ...] = IMAGES
    part: str = ""


ARMS = (
    Arm("default", "clustered", "clustered", steps=(0, 20, "auto")),
    Arm("universal", "universal", "universal", steps=(0, 20)),
    Arm("universal, head of what it knows", "universal", _universal_that_knows, steps=(0, 20)),
    Arm("default", "clustered", "clustered", None, (40, 80), _MANY, STEPS),
    Arm("universal", "universal", "universal", None, (40, 80), _MANY, STEPS),
    Arm("experts merged, labels alone", "clustered", "mvp", _WEIGHTED, (0, 20), part=CONTROLS),
    Arm("base of the default", "clustered", _base, None, (20,), _MANY, CONTROLS),
    Arm(_RECIPE, _RECIPE, "universal", None, (0, 20), part=CONTROLS),
    Arm("own masks", "own masks", "clustered", None, (0, 20), part=CONTROLS),
    Arm("refined", "refined", "refined", _WEIGHTED, (20,), _MANY, CONTROLS),
    Arm("one-shot Taylor", None, "one_shot", None, (20,), _MANY, CONTROLS),
    Arm("random", None, "random", None, (20,), _MANY, CONTROLS),
    Arm("default, 4 × the zoo's steps", "clustered, 4 ×", "clustered", None, (0, 20), part=LONGER),
    Arm("universal, 4 × the zoo's steps", "universal, 4 ×", "universal", None, (0, 20), part=LONGER),
    Arm(
        "default, 0.8 of its steps in the base",
        "clustered, share 0.8",
        "clustered",
        None,
        (0, 20),
        part=SHARES,
    ),
    Arm("universal, from random weights", "from random weights", "universal", None, (0, 20), part=LONGER),
    Arm("Torch-Pruning", None, _torch_pruning, None, (20,), _MANY, PEERS),
    Arm("iterative, from the dense model", None, "ifp", None, (20,), _MANY, PEERS),
    Arm("dense, fine-tuned", None, "dense", None, (20,), _MANY, PEERS),
)
NAMES = (DENSE, OWN_HEAD, *dict.fromkeys(arm.name for arm in ARMS))
# As journals and tables have them.
J = ("0", "20", "40", "80", "auto")


def parts_of(prepared: Prepared) -> tuple[str, ...]:
    """Those that are run in a world under a training seed."""
    more = PARTS if prepared.parts is None else prepared.parts
    return ("", *more) if prepared.is_first else ("",)


def arms_of(part: str, images: int) -> list[Arm]:
    return [arm for arm in ARMS if arm.part == part and images in arm.images]


def run_task(prepared: Prepared, task: Task, images: int, arms: Sequence[Arm]) -> dict[str, Any]:
    """Accuracy and cost of each arm, and of heads on the dense model."""
    task = replace(task, max_train_per_class=images)
    backbone, data = prepared.backbone, task.split()
    train = extract_features(backbone.model, data.train_images, backbone.preprocessing)
    test = extract_features(backbone.model, data.test_images, backbone.preprocessing)
    head = ridge_head(train, data.train_labels, data.num_classes)
    rows: dict[str, Any] = {DENSE: {"0": {"accuracy": accuracy_of(head(test), data.test_labels)}}}
    if (own := prepared.own_head(task)) is not None:
        rows[OWN_HEAD] = {"0": {"accuracy": accuracy_of(own(test), data.test_labels)}}
    # Every arm's class means are of the dense model's pass; its seconds are nobody's.
    known = RunOptions(features=(train, 0.0))
    for arm in arms:
        method = arm.method if isinstance(arm.method, str) else partial(arm.method, prepared)
        if not isinstance(method, str):
            method.__name__ = arm.name  # type: ignore[attr-defined]
        for steps in arm.steps:
            result = prune(
                backbone,
                task,
                None if arm.zoo is None else prepared.zoo(arm.zoo),
                replace(prepared.settings, seed=prepared.seed),
                method=method,
                steps=steps,
                vote=arm.vote,
                run=known,
            )
            rows.setdefault(arm.name, {})[str(steps)] = {
                "accuracy": result.accuracy,
                "seconds": result.cost.seconds,
                "flops": result.cost.flops,
                "steps": result.cost.steps,
                "choice": result.choice,
                "neighbours": result.neighbours[:3],
            }
    return rows
