"""Options that several commands share, and what turns them into a backbone, images and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from mvp_ext.data.images import ImageData, load_data
from mvp_ext.data.tasks import Task, sample_tasks
from mvp_ext.pruning.iterative import Schedule
from mvp_ext.train.backbone import Backbone, load_backbone
from mvp_ext.train.recipe import Recipe

MODEL, DATA, PRUNING, RUN = "Model", "Images and tasks", "Pruning", "Run"

# ---- the model
Model = Annotated[
    str,
    typer.Option(
        help="timm's name of a ResNet, ViT or DeiT, or a file that `pretrain` wrote.", rich_help_panel=MODEL
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Its weights: a safetensors state dict (any float type).", rich_help_panel=MODEL),
]
Pretrained = Annotated[
    bool, typer.Option(help="timm's own weights (network or cache).", rich_help_panel=MODEL)
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Side of the model's input in pixels. Default: the model's own.", rich_help_panel=MODEL
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(help="Normalisation, like 0.51,0.49,0.44. Default: the model's own.", rich_help_panel=MODEL),
]
Std = Annotated[str | None, typer.Option(help="Normalisation, like 0.27,0.26,0.28.", rich_help_panel=MODEL)]

# ---- images and tasks
Data = Annotated[
    str,
    typer.Option(
        help="digits; a folder class/image.png; an .npz, several joined by commas, or a folder of them; cifar100.",
        rich_help_panel=DATA,
    ),
]
ClassesPerTask = Annotated[int, typer.Option(help="Classes of each sampled task.", rich_help_panel=DATA)]
TaskSeed = Annotated[int, typer.Option(help="Seed of the draw of tasks.", rich_help_panel=DATA)]
MaxTrain = Annotated[
    int | None, typer.Option(help="At most so many training images a class.", rich_help_panel=DATA)
]
ZooPath = Annotated[Path, typer.Option("--zoo", help="Directory of the zoo.")]

# ---- pruning
Keep = Annotated[float, typer.Option(help="Share of each layer's units that stays.", rich_help_panel=PRUNING)]
Scope = Annotated[
    str | None,
    typer.Option(
        help="ResNet: inner (default), all. ViT: heads (default), mlp, heads+mlp.", rich_help_panel=PRUNING
    ),
]
Align = Annotated[
    int,
    typer.Option(help="Round kept filters and neurons to multiples of this.", rich_help_panel=PRUNING),
]
Neighbours = Annotated[int, typer.Option(help="Voters.", rich_help_panel=PRUNING)]
Similarity = Annotated[
    str, typer.Option(help="leep, proxy_leep, nce, logme or h_score.", rich_help_panel=PRUNING)
]
StepsPerRound = Annotated[
    int, typer.Option(help="Iterative pruning: steps after each removal.", rich_help_panel=PRUNING)
]
Share = Annotated[
    float, typer.Option(help="Iterative pruning: share removed a round.", rich_help_panel=PRUNING)
]
Criterion = Annotated[
    str,
    typer.Option(
        help="Score of units: taylor, taylor2, activation, weight_taylor, l1, l2, fpgm, synflow, random.",
        rich_help_panel=PRUNING,
    ),
]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate. Default: the family's.", rich_help_panel=PRUNING)
]

# ---- the run
Seed = Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=RUN)]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1 or auto: the GPU if torch sees one.", rich_help_panel=RUN)
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of torch.", rich_help_panel=RUN, min=1)]


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def device_of(name: str) -> torch.device:
    """ValueError where torch does not have the device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda, cuda:N or auto, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def backbone_of(
    model: str,
    weights: Path | None,
    pretrained: bool,
    image_size: int | None,
    mean: str | None = None,
    std: str | None = None,
    *,
    device: str = "cpu",
    need_weights: bool = True,
) -> Backbone:
    """The dense model of the options, on the device. ValueError where nothing says which weights, unless any do."""
    saved = Path(model).suffix == ".safetensors"
    if need_weights and not (saved or weights or pretrained):
        raise ValueError(
            f"model {model!r}: which weights? Give --weights FILE, --pretrained, or as --model a file that "
            "`mvp-ext pretrain` wrote"
        )
    if saved and (weights or pretrained):
        raise ValueError(
            f"model {model!r} is a file with its own weights: leave --weights and --pretrained out"
        )
    place = device_of(device)  # first: an error should not wait for the weights
    backbone = load_backbone(
        model,
        weights=weights,
        pretrained=pretrained,
        image_size=image_size,
        mean=_numbers("mean", mean),
        std=_numbers("std", std),
    )
    return backbone.to(place)


def data_of(source: str) -> ImageData:
    return load_data(source)


def tasks_of(
    data: ImageData,
    count: int,
    classes_per_task: int,
    seed: int,
    prefix: str,
    max_train: int | None = None,
    exclude: list[Task] | None = None,
) -> list[Task]:
    return sample_tasks(
        data, count, classes_per_task, seed, prefix, exclude=exclude or (), max_train_per_class=max_train
    )


def schedule_of(steps: int, steps_per_round: int, share: float, criterion: str) -> Schedule:
    return Schedule(share=share, steps_per_round=steps_per_round, final_steps=steps, criterion=criterion)


def recipe_of(backbone: Backbone, learning_rate: float | None) -> Recipe:
    family = Recipe.for_model(backbone.model)
    return family if learning_rate is None else family.with_rate(learning_rate)


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise ValueError(f"--{name}: expected three numbers like 0.5,0.5,0.5, got {text!r}")
    return numbers
