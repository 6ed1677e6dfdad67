"""The main job on embedded real images: pre-train a backbone, build a zoo, compare on tasks new to the zoo."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mvp_ext.app.comparison import Comparison, arms_of, compare
from mvp_ext.app.console import say
from mvp_ext.app.progress import progress_bar
from mvp_ext.app.results import seconds_text
from mvp_ext.data.images import ImageData, load_data
from mvp_ext.data.tasks import sample_tasks
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.pruning.build import build_refined_zoo, build_universal, build_zoo, planned_zoo_steps
from mvp_ext.pruning.iterative import planned_steps
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions
from mvp_ext.storage import write_atomic
from mvp_ext.train.backbone import Backbone, load_backbone
from mvp_ext.train.pretrain import pretrain
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.zoo import Zoo


@dataclass(frozen=True)
class DemoSize:
    """How much of everything; the defaults take a few minutes on two cores."""

    model: str = "resnet18"
    image_size: int = 32
    pretrain_steps: int = 60
    zoo_tasks: int = 10
    held_out_tasks: int = 5
    batch_size: int = 32
    classes_per_task: int = 5
    # Few images a class: with all of them every arm is at the top.
    max_train: int | None = 20
    keep: float = 0.1
    steps: int = 20
    neighbours: int = 5
    seconds: float = 1.0
    schedule: Schedule = field(
        default_factory=lambda: Schedule(share=0.25, steps_per_round=3, final_steps=40)
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


def run_demo(size: DemoSize, out: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything, into the folder ``out`` (backbone, zoo, finished runs); what is there already is used again.

    Returns:
        Results in the format of ``results.py``.

    Raises:
        ValueError: ``out`` holds a demo of another size or seed, whose parts must not be mixed with this one's.
    """
    _check_folder(size, out)
    data = load_data("digits")
    backbone = _backbone(size, data, out, device)
    zoo, unrefined = Zoo(out / "zoo"), Zoo(out / "unrefined-zoo")
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
    recipe = replace(Recipe.for_model(backbone.model), batch_size=size.batch_size)
    settings = Settings(keep=size.keep, schedule=size.schedule, recipe=recipe, seed=size.seed)
    structure = find_structure(backbone.model, settings.scope)
    first, each = planned_zoo_steps(structure, settings, len(tasks))
    refined = first + each * len(tasks)
    alone = planned_steps(structure, settings) * len(tasks)
    with progress_bar("2. zoo", 2 * refined + alone) as progress:
        build_refined_zoo(backbone, tasks, zoo, settings, progress=progress)
        build_universal(backbone, tasks, zoo, settings, progress=progress)
        build_zoo(backbone, tasks, unrefined, settings, progress=progress)
    vote = VoteOptions(neighbours=size.neighbours)
    options = Comparison(settings=settings, steps=size.steps, vote=vote, seconds=size.seconds)
    steps = sum(options.all_steps(arm, structure) for arm in arms_of(zoo, options, unrefined))
    with progress_bar("3. held-out tasks", steps * len(held_out)) as progress:
        return compare(
            backbone,
            held_out,
            zoo,
            options,
            unrefined=unrefined,
            title="Meta-Vote Pruning on handwritten digits",
            notes=(
                "The backbone was pre-trained on the same ten classes; no class here is new to it.",
                "All tasks are draws of the same ten digits: the zoo refines one model. Experts, which `zoo build` "
                "makes where tasks are of several kinds, have nothing to be experts of here.",
                "The tasks are few and small, so standard errors are rough.",
            ),
            journal=out / "runs.jsonl",
            progress=progress,
        )


def _check_folder(size: DemoSize, out: Path) -> None:
    path, asked = out / "demo.json", json.loads(json.dumps(asdict(size)))
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = None
    except (ValueError, RecursionError) as error:
        # What a killed or full disk left says nothing, and must not stop every demo to come.
        say(f"{path}: damaged ({error}); written again")
        known = None
    if known is None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{json.dumps(asked, indent=1)}\n".encode())
    elif known != asked:
        raise ValueError(
            f"{out} holds a demo of another size or seed: give another --out, or remove that folder"
        )


def _backbone(size: DemoSize, data: ImageData, out: Path, device: torch.device | str) -> Backbone:
    path = out / "backbone.safetensors"
    if path.exists():
        return load_backbone(path).to(device)
    # The weights that training starts from.
    torch.manual_seed(size.seed)
    model = create_model(size.model, num_classes=len(data.classes)).to(device)
    with progress_bar("1. pre-training") as progress:
        backbone, accuracy, cost = pretrain(
            model,
            data,
            steps=size.pretrain_steps,
            image_size=size.image_size,
            seed=size.seed,
            on_step=lambda done, total: progress(size.model, done, total),
        )
    backbone.save(path)
    say(f"backbone: {100 * accuracy:.1f} % on all ten digits after {seconds_text(cost.seconds)}")
    return backbone
