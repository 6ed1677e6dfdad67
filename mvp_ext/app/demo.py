"""The main job on embedded real images: pre-train a backbone, build a zoo, compare on tasks new to the zoo."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mvp_ext.app.comparison import Comparison, Progress, compare
from mvp_ext.app.console import say
from mvp_ext.app.results import seconds_text
from mvp_ext.model.timm_compat import create_model
from mvp_ext.pruning.backbone import Backbone, load_backbone
from mvp_ext.pruning.build import build_universal, build_zoo
from mvp_ext.pruning.data import ImageData, load_data
from mvp_ext.pruning.iterative import Schedule
from mvp_ext.pruning.pretrain import pretrain
from mvp_ext.pruning.tasks import sample_tasks
from mvp_ext.pruning.zoo import Zoo

Bar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class DemoSize:
    """How much of everything; the defaults take a few minutes on two cores."""

    model: str = "resnet18"
    image_size: int = 32
    pretrain_steps: int = 120
    zoo_tasks: int = 10
    held_out_tasks: int = 5
    classes_per_task: int = 5
    max_train: int | None = 20
    keep: float = 0.2
    steps: int = 30
    neighbours: int = 5
    seconds: float = 1.0
    schedule: Schedule = field(
        default_factory=lambda: Schedule(share=0.25, steps_per_round=5, final_steps=60)
    )
    seed: int = 0


FULL = DemoSize()
QUICK = DemoSize(
    pretrain_steps=30,
    zoo_tasks=3,
    held_out_tasks=2,
    steps=6,
    neighbours=2,
    seconds=0.2,
    schedule=Schedule(share=0.5, steps_per_round=2, final_steps=6),
)


def run_demo(size: DemoSize, out: Path, *, bar: Bar) -> dict[str, Any]:
    """Everything, into the folder ``out`` (backbone, zoo, finished runs); what is there already is used again.

    Returns:
        Results in the format of ``results.py``.
    """
    data = load_data("digits")
    backbone = _backbone(size, data, out, bar)
    zoo = Zoo(out / "zoo")
    tasks = sample_tasks(data, size.zoo_tasks, size.classes_per_task, size.seed, "zoo")
    held_out = sample_tasks(
        data,
        size.held_out_tasks,
        size.classes_per_task,
        size.seed + 1000,
        "held-out",
        exclude=tasks,
        max_train_per_class=size.max_train,
    )
    with bar("2. zoo") as progress:
        common: dict[str, Any] = {"keep": size.keep, "schedule": size.schedule, "seed": size.seed}
        build_zoo(backbone, tasks, zoo, progress=progress, **common)
        build_universal(backbone, tasks, zoo, progress=progress, **common)
    options = Comparison(
        keep=size.keep,
        steps=size.steps,
        neighbours=size.neighbours,
        schedule=size.schedule,
        seconds=size.seconds,
        seed=size.seed,
    )
    with bar("3. held-out tasks") as progress:
        return compare(
            backbone,
            held_out,
            zoo,
            options,
            title="Meta-Vote Pruning on handwritten digits",
            notes=(
                "The backbone was pre-trained on the same ten classes; no class here is new to it.",
                "The tasks are few and small, so standard errors are rough.",
            ),
            journal=out / "runs.jsonl",
            progress=progress,
        )


def _backbone(size: DemoSize, data: ImageData, out: Path, bar: Bar) -> Backbone:
    path = out / f"backbone-{size.model}-{size.image_size}-{size.pretrain_steps}-{size.seed}.safetensors"
    if path.exists():
        return load_backbone(path)
    torch.manual_seed(size.seed)  # the weights that training starts from
    model = create_model(size.model, num_classes=len(data.classes))
    with bar("1. pre-training") as progress:
        backbone, accuracy, cost = pretrain(
            model,
            data,
            steps=size.pretrain_steps,
            image_size=size.image_size,
            seed=size.seed,
            on_step=lambda done, total: progress(size.model, done, total),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    backbone.save(path)
    say(f"backbone: {100 * accuracy:.1f} % on all ten digits after {seconds_text(cost.seconds)}")
    return backbone
