"""The command line's options, each declared once: groups of them are dataclasses, which a command takes as parameters.

    @app.command()
    @grouped
    def prune(out: Out, model: ModelOptions, settings: SettingsOptions) -> None: ...

``grouped`` shows typer the fields of the groups as options of the command, and gives the command its groups back.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from typer import Option

from mvp_ext.app.comparison import NAMES, Comparison
from mvp_ext.app.console import console
from mvp_ext.cluster.workers import Workers, ray_workers
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.pruning.methods import METHOD_NAMES
from mvp_ext.pruning.scores import CRITERIA
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions
from mvp_ext.train import parallel
from mvp_ext.train.backbone import Backbone, load_backbone
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.similarity import SIMILARITIES
from mvp_ext.zoo.zoo import Zoo

MODEL, DATA, PRUNING, RUN = "Model", "Images and tasks", "Pruning", "Run"
MODEL_NAMES = "timm's name of a model, torchvision:NAME"

Out = Annotated[Path, Option(help="Where the result goes.", rich_help_panel=RUN)]
Force = Annotated[bool, Option("--force", help="Replace a file that is there.", rich_help_panel=RUN)]
ZooPath = Annotated[Path, Option("--zoo", help="Directory of the zoo.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer whose parameters that are dataclasses are replaced by the fields of these."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        group = groups[parameter.name]
        types = get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=types[field.name],
                )
            )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in keyword_only}
    return run


@dataclass(frozen=True)
class PlaceOptions:
    """Where a command computes."""

    device: Annotated[
        str, Option(help="cpu, cuda, cuda:1 or auto: the GPU if torch sees one.", rich_help_panel=RUN)
    ] = "auto"

    def begin(self) -> torch.device:
        """The device. ValueError where torch does not have it."""
        if _processes() > 1:
            raise ValueError(
                "torchrun: `pretrain` and `zoo build` share their work among processes, no other command"
            )
        return self._place()

    def _place(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"--device: expected cpu, cuda, cuda:N or auto, got {self.device!r}") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
        return device


@dataclass(frozen=True)
class DeviceOptions(PlaceOptions):
    """Where a command computes, and with how many threads."""

    threads: Annotated[int | None, Option(help="CPU threads of torch.", rich_help_panel=RUN, min=1)] = None

    def _place(self) -> torch.device:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return super()._place()


@dataclass(frozen=True)
class ExecutionOptions(DeviceOptions):
    """Where and how a command runs that draws at random."""

    seed: Annotated[int, Option(help="Of everything random.", rich_help_panel=RUN)] = Settings.seed

    def begin_together(self) -> torch.device:
        """As ``begin``; a process that torchrun started takes its part in the command's work, and its GPU for it.

        Only the first of them goes on to print.
        """
        if _processes() == 1:
            return self.begin()
        device = self._place()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        # For as long as there is a command.
        stack = ExitStack()
        stack.enter_context(parallel.data_parallel(device))
        atexit.register(stack.close)
        console.quiet = parallel.rank() > 0
        return device


@dataclass(frozen=True)
class ModelOptions:
    """Which dense model."""

    model: Annotated[
        str,
        Option(
            help=f"{MODEL_NAMES}, hf:FOLDER (transformers' format), or a file that `pretrain` wrote.",
            rich_help_panel=MODEL,
        ),
    ] = "resnet18"
    weights: Annotated[
        Path | None,
        Option(help="Its weights: a safetensors state dict (any float type).", rich_help_panel=MODEL),
    ] = None
    pretrained: Annotated[
        bool, Option(help="timm's or torchvision's own weights (network or cache).", rich_help_panel=MODEL)
    ] = False
    image_size: Annotated[
        int | None,
        Option(help="Side of the model's input in pixels. Default: the model's own.", rich_help_panel=MODEL),
    ] = None
    mean: Annotated[
        str | None,
        Option(
            help="Normalisation, like 0.51,0.49,0.44. Default: the model's own.",
            rich_help_panel=MODEL,
        ),
    ] = None
    std: Annotated[str | None, Option(help="Normalisation, like 0.27,0.26,0.28.", rich_help_panel=MODEL)] = (
        None
    )

    def backbone(
        self, device: torch.device, *, need_weights: bool = True, seen: Preprocessing | None = None
    ) -> Backbone:
        """The dense model, on the device. ValueError where nothing says which weights, unless any will do.

        It sees images as ``seen`` (a zoo's or a file's) says, but for what was given on the command line.
        """
        folder = self.model.startswith("hf:")
        saved = folder or Path(self.model).suffix == ".safetensors"
        if need_weights and not (saved or self.weights or self.pretrained):
            raise ValueError(
                f"model {self.model!r}: which weights? Give --weights FILE, --pretrained, or as --model a file that "
                "`mvp-ext pretrain` wrote"
            )
        if saved and (self.weights or self.pretrained):
            kind = "folder" if folder else "file"
            raise ValueError(
                f"model {self.model!r} is a {kind} with its own weights: leave --weights and --pretrained out"
            )
        # A file says how it sees images; whether that is what the zoo says is found when they meet.
        seen = None if saved else seen
        backbone = load_backbone(
            self.model,
            weights=self.weights,
            pretrained=self.pretrained,
            image_size=self.image_size or (None if seen is None else seen.size),
            mean=_numbers("mean", self.mean) or (None if seen is None else seen.mean),
            std=_numbers("std", self.std) or (None if seen is None else seen.std),
        ).to(device)
        if need_weights:
            backbone.check()
        return backbone


@dataclass(frozen=True)
class CutOptions:
    """What is cut. None: as the zoo says, and where there is none, ``Settings``' default."""

    keep: Annotated[
        float | None,
        Option(
            help=f"Share of each layer's units that stays. Default: the zoo's, or {Settings.keep:g}.",
            rich_help_panel=PRUNING,
        ),
    ] = None
    scope: Annotated[
        str | None,
        Option(
            help="ResNet: inner, all, stream. ViT: heads, mlp, heads+mlp. Default: the zoo's, or the model's first.",
            rich_help_panel=PRUNING,
        ),
    ] = None
    align: Annotated[
        int | None,
        Option(
            help=f"Round kept filters and neurons to multiples of this. Default: the zoo's, or {Settings.align}.",
            rich_help_panel=PRUNING,
        ),
    ] = None
    criterion: Annotated[
        str | None,
        Option(
            help=f"Score of units: {', '.join(CRITERIA)}. Default: the zoo's, or {Schedule.criterion}.",
            rich_help_panel=PRUNING,
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        Option(help="Peak learning rate. Default: the zoo's, or the family's.", rich_help_panel=PRUNING),
    ] = None

    def settings(self, zoo: Zoo | None, backbone: Backbone, seed: int) -> Settings:
        """The zoo's settings, with what was given on the command line in their place."""
        settings = Settings.of_zoo(zoo)
        given = {"keep": self.keep, "scope": self.scope, "align": self.align}
        settings = replace(settings, seed=seed, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        if self.criterion is not None:
            settings = replace(settings, schedule=replace(settings.schedule, criterion=self.criterion))
        if self.learning_rate is not None:
            recipe = settings.recipe_for(backbone.model)
            settings = replace(settings, recipe=recipe.with_rate(self.learning_rate))
        return settings


@dataclass(frozen=True)
class ScheduleOptions:
    """How iterative pruning proceeds, beside its last steps."""

    steps_per_round: Annotated[
        int | None,
        Option(
            help=f"Iterative pruning: steps after each removal. Default: the zoo's, or {Schedule.steps_per_round}.",
            rich_help_panel=PRUNING,
        ),
    ] = None
    share: Annotated[
        float | None,
        Option(
            help=f"Iterative pruning: share removed a round. Default: the zoo's, or {Schedule.share:g}.",
            rich_help_panel=PRUNING,
        ),
    ] = None

    def applied(self, settings: Settings, final_steps: int) -> Settings:
        """``settings`` with this schedule."""
        given = {"steps_per_round": self.steps_per_round, "share": self.share, "final_steps": final_steps}
        schedule = replace(settings.schedule, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        return replace(settings, schedule=schedule)


@dataclass(frozen=True)
class NeighbourOptions:
    """Who votes."""

    neighbours: Annotated[int, Option(help="Voters.", rich_help_panel=PRUNING)] = VoteOptions.neighbours
    similarity: Annotated[
        str,
        Option(
            help=f"Of tasks: auto (by what the zoo is), {', '.join(SIMILARITIES)}.", rich_help_panel=PRUNING
        ),
    ] = "auto"

    def vote(self) -> VoteOptions:
        return VoteOptions(neighbours=self.neighbours, similarity=self.similarity)


@dataclass(frozen=True)
class MethodOptions:
    """How `prune` makes a small model."""

    method: Annotated[
        str,
        Option(
            help=f"auto (clustered or refined where the zoo is, else mvp), {', '.join(METHOD_NAMES)}.",
            rich_help_panel=PRUNING,
        ),
    ] = "auto"
    steps: Annotated[
        str, Option(help="Fine-tuning steps, or auto: as many as the task needs.", rich_help_panel=PRUNING)
    ] = "auto"

    @property
    def number_of_steps(self) -> int | Literal["auto"]:
        if self.steps == "auto":
            return "auto"
        if not self.steps.isdecimal():
            raise ValueError(f"--steps: expected a number or auto, got {self.steps!r}")
        return int(self.steps)


@dataclass(frozen=True)
class PruneOutputOptions:
    """Where `prune`'s result goes."""

    out: Out = Path("small.safetensors")
    force: Force = False
    add: Annotated[bool, Option(help="Add the result to the zoo.")] = False


@dataclass(frozen=True)
class BuildOptions:
    """What `zoo build` makes."""

    tasks: Annotated[int, Option(help="How many tasks.", rich_help_panel=DATA)] = 24
    steps: Annotated[int, Option(help="Steps after the last removal.", rich_help_panel=PRUNING)] = (
        Schedule.final_steps
    )
    refine: Annotated[
        bool | None,
        Option(
            help="An entry for each task: it refines one pruned model of all, or is pruned from the dense model. "
            "Default: experts where the tasks are of several kinds, else --refine.",
            rich_help_panel=PRUNING,
        ),
    ] = None
    clusters: Annotated[
        str | None,
        Option(
            help="An expert for each kind of tasks instead of an entry a task: so many, or auto.",
            rich_help_panel=PRUNING,
        ),
    ] = None
    universal: Annotated[
        bool | None,
        Option(
            help="Also one pruned model of all tasks at the zoo's whole cost, a control. Default: with --no-refine."
        ),
    ] = None
    universal_steps: Annotated[
        int | None, Option(help="Its optimizer steps. Default: as many as the whole zoo took.")
    ] = None

    @property
    def experts(self) -> int | None:
        """How many; None: from the data."""
        if self.clusters is not None and self.refine is not None:
            raise ValueError(
                "--clusters makes experts of kinds of tasks, --refine and --no-refine an entry for each task"
            )
        if self.clusters in (None, "auto"):
            return None
        if not self.clusters.isdecimal():
            raise ValueError(f"--clusters: expected a number or auto, got {self.clusters!r}")
        return int(self.clusters)

    @property
    def with_universal(self) -> bool:
        return self.refine is False if self.universal is None else self.universal


@dataclass(frozen=True)
class WorkerOptions:
    """Who makes a zoo's entries."""

    workers: Annotated[
        int,
        Option(
            help="How many tasks are computed at once, by workers of Ray on this machine.",
            rich_help_panel=RUN,
            min=1,
        ),
    ] = 1
    ray: Annotated[
        str | None,
        Option(
            "--ray",
            metavar="ADDRESS",
            help="Or by all workers of a Ray that runs: host:6379, or auto on one of its machines.",
            rich_help_panel=RUN,
        ),
    ] = None
    cpus_per_task: Annotated[
        int | None,
        Option(
            help="Cores and threads of each worker's task. Default: an equal share of this machine's, with --ray 1.",
            rich_help_panel=RUN,
            min=1,
        ),
    ] = None
    gpus_per_task: Annotated[
        float, Option(help="GPUs of each worker's task, or a share of one.", rich_help_panel=RUN, min=0.0)
    ] = 0.0

    def begin(self) -> AbstractContextManager[Workers | None]:
        """The workers, for a while; None of this process alone. ValueError where the options contradict each other."""
        if self.workers == 1 and self.ray is None:
            if self.cpus_per_task is not None or self.gpus_per_task:
                raise ValueError(
                    "--cpus-per-task and --gpus-per-task are of workers: expected --workers N or --ray ADDRESS, got "
                    "neither"
                )
            return nullcontext()
        if _processes() > 1:
            raise ValueError(
                "torchrun: expected its processes alone, got --workers or --ray, too: make the universal model with "
                "the one, then the entries with the other"
            )
        if self.workers > 1 and self.ray is not None:
            raise ValueError(
                f"--workers {self.workers} --ray {self.ray}: expected one of them: what runs at {self.ray} "
                "says how many workers it has"
            )
        return ray_workers(
            self.workers if self.ray is None else None,
            address=self.ray,
            cpus_per_task=self.cpus_per_task,
            gpus_per_task=self.gpus_per_task,
        )


@dataclass(frozen=True)
class CompareOptions:
    """What `compare` compares."""

    tasks: Annotated[int, Option(help="Held-out tasks.", rich_help_panel=DATA)] = 6
    steps: Annotated[int, Option(help="Fine-tuning steps of each arm.", rich_help_panel=PRUNING)] = 60
    final_steps: Annotated[
        int, Option(help="Iterative pruning: steps after the last removal.", rich_help_panel=PRUNING)
    ] = Schedule.final_steps
    arm: Annotated[
        list[str] | None,
        Option(help=f"Methods (repeatable): {', '.join(NAMES)}. Default: what suits the zoo, and controls."),
    ] = None
    rate: Annotated[
        list[str] | None, Option(help="Learning rate of one method, like mvp=0.02 (repeatable).")
    ] = None
    seconds: Annotated[float, Option(help="Time for each latency.")] = Comparison.seconds
    out: Out = Path("runs/compare")

    def comparison(self, settings: Settings, vote: VoteOptions) -> Comparison:
        return Comparison(
            settings=settings,
            steps=self.steps,
            vote=vote,
            arms=tuple(self.arm or ()),
            rates=dict(map(_rate, self.rate or ())),
            seconds=self.seconds,
        )


def pretraining_recipe(family: Recipe, learning_rate: float | None, batch_size: int | None) -> Recipe | None:
    """The family's recipe with what was given in its place; None where nothing was: ``pretrain`` has its own."""
    if learning_rate is None and batch_size is None:
        return None
    rate = learning_rate or family.learning_rate * (10 if family.optimizer == "sgd" else 3)
    return replace(family, learning_rate=rate, batch_size=batch_size or family.batch_size)


def _processes() -> int:
    """How many processes torchrun started for this command."""
    return int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


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


def _rate(text: str) -> tuple[str, float]:
    method, _, value = text.partition("=")
    try:
        if method in NAMES:
            return method, float(value)
    except ValueError:
        pass
    raise ValueError(f"--rate: expected METHOD=RATE with METHOD one of {', '.join(NAMES)}, got {text!r}")
