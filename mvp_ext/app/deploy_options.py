"""Options of the commands that take small models to where they are used: `bench`, `predict`, `export`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from typer import Option

from mvp_ext.app.bench import Grid
from mvp_ext.app.data_options import Cache, load_images
from mvp_ext.app.options import DATA, MODEL, MODEL_NAMES, PRUNING, RUN, ModelOptions
from mvp_ext.app.outputs import check_output
from mvp_ext.data.tasks import Task, TaskData
from mvp_ext.deploy.formats import FORMATS
from mvp_ext.deploy.metadata import PRECISIONS
from mvp_ext.deploy.runtimes import RUNTIMES
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.create import create_model
from mvp_ext.model.ends import in_channels
from mvp_ext.model.prediction import PREDICT_BATCH
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.pruning.settings import Settings
from mvp_ext.train.backbone import Backbone

EXPORT = "Export"
_Name = TypeVar("_Name", bound=str)


@dataclass(frozen=True)
class BenchModelOptions(ModelOptions):
    """Which dense model; beside pruned files it may be theirs."""

    model: Annotated[
        str,
        Option(
            help=f"{MODEL_NAMES}, hf:FOLDER, or a file that `pretrain` wrote. Default: what the first "
            f"--pruned was cut from, or {ModelOptions.model}.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = ""

    def beside(
        self, pruned: Mapping[Path, PrunedCheckpoint], arguments: Mapping[str, Any] | None
    ) -> Backbone:
        """The dense model, for images of the size that the pruned ones take; on the CPU.

        Args:
            pruned: the files' models.
            arguments: of ``create_model``, for the first one's dense model.

        Raises:
            ValueError: they take images of different sizes, or --image-size is another one, or no pictures.
        """
        seen = {
            path: small.card.preprocessing or Preprocessing.of(small.model) for path, small in pruned.items()
        }
        for path, small in pruned.items():
            if (channels := in_channels(small.model)) not in (None, 3):
                raise ValueError(
                    f"bench: {path.name}: expected a model of images of 3 channels, got {channels}"
                )
        sizes = {path.name: preprocessing.size for path, preprocessing in seen.items()}
        if self.image_size is not None:
            sizes["--image-size"] = self.image_size
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"bench: expected one size of images for all models, got {listed}")
        if arguments is not None and not (self.model or self.weights or self.pretrained):
            return Backbone(create_model(**arguments).eval(), next(iter(seen.values())))
        name = self.model or (ModelOptions.model if arguments is None else arguments["name"])
        named = replace(self, model=name, image_size=next(iter(sizes.values()), None))
        return named.backbone(torch.device("cpu"), need_weights=False)


@dataclass(frozen=True)
class BenchOptions:
    """What `bench` times, and in what."""

    keep: Annotated[
        list[float] | None,
        Option(
            help="Keep ratios (repeatable). Default: 0.5, or none beside --pruned.", rich_help_panel=PRUNING
        ),
    ] = None
    scope: Annotated[
        str | None, Option(help="As of `prune`. Default: the family's.", rich_help_panel=PRUNING)
    ] = None
    align: Annotated[int, Option(help="As of `prune`.", rich_help_panel=PRUNING)] = Settings.align
    seed: Annotated[int, Option(help="Of what is kept.", rich_help_panel=PRUNING)] = Settings.seed
    pruned: Annotated[
        list[Path] | None,
        Option(
            help="Also a saved pruned model (repeatable). Without --model, the first one's dense model (any weights) "
            "is compared; the size of images is the file's."
        ),
    ] = None
    against_torch_pruning: Annotated[bool, Option(help="Also the same shapes made by Torch-Pruning.")] = False
    runtime: Annotated[
        list[str] | None,
        Option(help=f"Of {', '.join(RUNTIMES)}: some, joined by commas, or repeated. Default: eager."),
    ] = None
    precision: Annotated[
        list[str] | None,
        Option(help=f"Of {', '.join(PRECISIONS)}: some, joined by commas, or repeated. Default: float32."),
    ] = None
    threads: Annotated[
        list[str] | None,
        Option(help="Numbers of CPU threads, joined by commas, or repeated.", rich_help_panel=RUN),
    ] = None
    batch: Annotated[list[int] | None, Option(help="Batch sizes (repeatable). Default: 1 and 32.")] = None
    seconds: Annotated[float, Option(help="Time for the slowest model, at each setting.")] = 2.0
    channels_last: Annotated[
        bool, Option(help="Time eager mode and torch.compile in the channels_last layout.")
    ] = False
    memory: Annotated[
        bool, Option(help="Also peak memory, each in a process of its own (seconds for each).")
    ] = False
    budget: Annotated[
        float | None,
        Option(help="Seconds after which nothing more is begun; what is slow is left out first."),
    ] = None
    data: Annotated[
        list[str] | None,
        Option(
            help="Images, as of `prune`: int8 is calibrated on those of the pruned model's classes, and accuracy "
            "measured. Without it int8 is calibrated on noise, for its speed alone.",
            rich_help_panel=DATA,
        ),
    ] = None
    cache: Cache = "auto"

    def task(self, pruned: Iterable[PrunedCheckpoint]) -> TaskData | None:
        """The images of the first pruned model's classes; None without --data."""
        if not self.data:
            return None
        card = next((small.card for small in pruned if small.class_names), None)
        if card is None:
            raise ValueError(
                "bench: --data: expected a --pruned file that says which classes its outputs are"
            )
        return Task.of(card.task or "task", load_images(self.data, self.cache), card.class_names).split()

    def grid(self) -> Grid:
        """In what is timed; ValueError for a name or number that there is not."""
        runtimes = _some_of("runtime", self.runtime or ["eager"], RUNTIMES)
        precisions = _some_of("precision", self.precision or ["float32"], PRECISIONS)
        threads: tuple[int | None, ...] = (None,)
        if self.threads:
            texts = _split(self.threads)
            if not all(text.isdigit() and int(text) for text in texts):
                raise ValueError(f"--threads: expected numbers like 1,2, got {','.join(texts)!r}")
            threads = tuple(int(text) for text in texts)
        batches = tuple(sorted(set(self.batch or (1, 32))))
        if batches[0] < 1:
            raise ValueError(f"--batch: expected at least 1, got {batches[0]}")
        return Grid(
            runtimes,
            precisions,
            batches,
            threads,
            seconds=self.seconds,
            channels_last=self.channels_last,
            memory=self.memory,
            budget=self.budget,
        )


@dataclass(frozen=True)
class PredictOptions:
    """What `predict` tells, and where to."""

    task: Annotated[str | None, Option(help="Of a bundle: this task alone. Default: all.")] = None
    top: Annotated[int, Option(help="Most probable classes of each image.", min=1)] = 3
    json: Annotated[Path | None, Option(help="Write what is told here, as JSON.", rich_help_panel=RUN)] = None
    csv: Annotated[
        Path | None,
        Option(
            help="Write a line an image here, with the probabilities of all classes.", rich_help_panel=RUN
        ),
    ] = None
    confusion: Annotated[
        Path | None,
        Option(
            help="Of labelled folders: write a figure of what is taken for what here, as PNG.",
            rich_help_panel=RUN,
        ),
    ] = None
    batch: Annotated[int, Option(help="Images a pass.", rich_help_panel=RUN, min=1)] = PREDICT_BATCH

    def check_outputs(self) -> None:
        """ValueError or OSError where a file could not be written."""
        for option, path in (("--json", self.json), ("--csv", self.csv), ("--confusion", self.confusion)):
            if path is not None:
                check_output(option, path)


@dataclass(frozen=True)
class ExportOptions:
    """What `export` writes."""

    to: Annotated[
        str | None, Option(help=f"{', '.join(FORMATS)}. Default: as --out ends.", rich_help_panel=EXPORT)
    ] = None
    out: Annotated[
        Path | None,
        Option(help="The file. Default: beside the model, with the format's suffix.", rich_help_panel=EXPORT),
    ] = None
    precision: Annotated[
        str, Option(help=f"{', '.join(PRECISIONS)}. int8 needs --data.", rich_help_panel=EXPORT)
    ] = "float32"
    preprocess: Annotated[
        bool,
        Option(
            help="Put resizing and normalisation into the file: it takes bytes [B, H, W, 3] of any size.",
            rich_help_panel=EXPORT,
        ),
    ] = False
    softmax: Annotated[bool, Option(help="Put a softmax behind the outputs.", rich_help_panel=EXPORT)] = False
    force: Annotated[
        bool, Option("--force", help="Replace a file that is there.", rich_help_panel=EXPORT)
    ] = False
    data: Annotated[
        list[str] | None,
        Option(
            help="As of `prune`: images of the model's classes to check the file on. Default: noise.",
            rich_help_panel=DATA,
        ),
    ] = None
    cache: Cache = "auto"

    def path(self, model: Path) -> Path:
        """Where the file goes; ValueError where neither option says the format, or one is there."""
        if self.out is None and self.to is None:
            raise ValueError(f"export: which format? Give --to {'|'.join(FORMATS)}, or --out with its suffix")
        # An unknown format is for `export` to name.
        suffix = FORMATS[self.to].suffix if self.to in FORMATS else ""
        path = self.out or model.with_suffix(suffix)
        check_output("--out", path, replace=self.force)
        return path

    def task(self, card: ModelCard) -> TaskData | None:
        """The images of the model's classes; None without --data."""
        if not self.data:
            return None
        if not card.class_names:
            raise ValueError("export: --data: the model does not say which classes its outputs are")
        return Task.of(card.task or "task", load_images(self.data, self.cache), card.class_names).split()


def _split(given: list[str]) -> list[str]:
    """Parts, each once, of texts that are joined by commas."""
    return list(dict.fromkeys(part.strip() for text in given for part in text.split(",")))


def _some_of(name: str, given: list[str], known: tuple[_Name, ...]) -> tuple[_Name, ...]:
    texts = _split(given)
    for text in texts:
        if text not in known:
            raise ValueError(f"--{name}: expected some of {', '.join(known)}, got {text!r}")
    return tuple(each for text in texts for each in known if each == text)
