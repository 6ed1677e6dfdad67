"""What a small model says of image files: names, probabilities and, where folders name classes, how often right."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mvp_ext._version import __version__
from mvp_ext.app.tables import Side, Table
from mvp_ext.data.sources import FoundImage
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.prediction import Predictions
from mvp_ext.storage import write_atomic
from mvp_ext.train.evaluate import Quality

# Beyond so many classes a confusion matrix is no longer read in a terminal: the most frequent confusions are listed.
SHOWN_CLASSES = 20
LISTED_CONFUSIONS = 10


class Predictor(Protocol):
    """A pruned model, or an exported file."""

    @property
    def card(self) -> ModelCard: ...

    def predict(self, images: Any, *, batch: int) -> Predictions: ...


@dataclass(frozen=True)
class Answers:
    """What was said of the images that could be read.

    Attributes:
        images: those, in the order of ``predictions``.
        damaged: the others, each with the reason.
    """

    images: list[FoundImage]
    predictions: Predictions
    damaged: dict[Path, str] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.predictions.class_names

    @property
    def labelled(self) -> list[int]:
        """Positions of the images whose folder is named as a class."""
        known = set(self.class_names)
        return [at for at, image in enumerate(self.images) if image.folder in known]

    @property
    def labels(self) -> Tensor:
        """int64: of those images."""
        number = {name: at for at, name in enumerate(self.class_names)}
        return torch.tensor([number[str(self.images[at].folder)] for at in self.labelled], dtype=torch.int64)

    @property
    def quality(self) -> Quality:
        """Of those images, at least one."""
        return Quality.of(self.predictions.probabilities[self.labelled].log(), self.labels)

    def confusion(self) -> Tensor:
        """int64 [k, k]: how many images of class i were called j."""
        k = len(self.class_names)
        answers = self.predictions.probabilities[self.labelled].argmax(1)
        return torch.bincount(self.labels * k + answers, minlength=k * k).view(k, k)


def open_predictor(path: Path, device: torch.device) -> Predictor:
    """A file of ``prune`` or of ``export``, by its suffix."""
    if path.suffix in (".onnx", ".xml", ".pt2"):
        from mvp_ext.deploy.exported import load_exported

        return load_exported(path, threads=torch.get_num_threads())
    return load_pruned(path, device)


def classify(
    model: Predictor,
    images: Sequence[FoundImage],
    *,
    batch: int,
    on_damaged: Callable[[Path, str], None],
    progress: Callable[[int, int], None],
) -> Answers:
    """Ask the model of each image that can be read.

    Args:
        batch: images a pass.
        on_damaged: called with the path of each other one and the reason, as it is met.
        progress: called with (images done, of all) after each pass.
    """
    see = model.card.need_preprocessing("predict")
    read: list[FoundImage] = []
    parts: list[Predictions] = []
    damaged: dict[Path, str] = {}
    left, done = iter(images), 0
    while chunk := list(islice(left, batch)):
        pixels = []
        for image in chunk:
            try:
                pixels.append(see.bytes_of(image.path))
                read.append(image)
            # Pillow's decoders raise almost anything on damaged bytes.
            except Exception as error:
                damaged[image.path] = str(error) or type(error).__name__
                on_damaged(image.path, damaged[image.path])
        if pixels:
            parts.append(model.predict(torch.stack(pixels), batch=batch))
        done += len(chunk)
        progress(done, len(images))
    if not parts:
        raise ValueError(f"predict: none of {len(images)} images could be read, first {next(iter(damaged))}")
    return Answers(
        read, Predictions(torch.cat([p.probabilities for p in parts]), parts[0].class_names), damaged
    )


def answers_table(answers: Answers, top: int) -> Table:
    """One row an image: its most probable classes."""
    shown = answers.predictions.top(top)
    columns: list[tuple[str, Side]] = [("image", "left")]
    for rank in range(len(shown[0])):
        columns += [("class" if rank == 0 else f"{rank + 1}.", "left"), ("probability (%)", "right")]
    rows = [
        (str(image.path), *(cell for name, chance in row for cell in (name, f"{100 * chance:.1f}")))
        for image, row in zip(answers.images, shown, strict=True)
    ]
    return Table(columns, rows)


def accuracy_table(answers: Answers) -> Table:
    """One row a class: of its images, how many were called so."""
    confusion = answers.confusion()
    rows = []
    for name, row, right in zip(answers.class_names, confusion, confusion.diagonal(), strict=True):
        count = int(row.sum())
        rows.append((name, str(count), "" if count == 0 else f"{100 * int(right) / count:.1f}"))
    rows.append(("all", str(len(answers.labelled)), f"{100 * answers.quality.accuracy:.1f}"))
    return Table((("class", "left"), ("images", "right"), ("accuracy (%)", "right")), rows)


def confusion_table(answers: Answers) -> Table:
    """Rows: what an image shows. Columns: what it was called. Of many classes the most frequent confusions alone."""
    names, confusion = answers.class_names, answers.confusion()
    if len(names) <= SHOWN_CLASSES:
        columns: list[tuple[str, Side]] = [("shows", "left"), *((name, "right") for name in names)]
        rows = [
            (name, *(str(count) if count else "·" for count in row))
            for name, row in zip(names, confusion.tolist(), strict=True)
        ]
        return Table(columns, rows, "called …")
    wrong = confusion.clone().fill_diagonal_(0)
    counts, places = wrong.flatten().topk(min(LISTED_CONFUSIONS, int((wrong > 0).sum())))
    pairs = [divmod(place, len(names)) for place in places.tolist()]
    rows = [(names[i], names[j], str(count)) for (i, j), count in zip(pairs, counts.tolist(), strict=True)]
    return Table(
        (("shows", "left"), ("called", "left"), ("images", "right")), rows, "most frequent confusions"
    )


def save_json(answers: Answers, path: Path, source: Path, card: ModelCard, top: int) -> None:
    """Everything that was said, and of whom, written whole or not at all."""
    described: dict[str, Any] = {
        "model": str(source),
        "mvp_ext": __version__,
        "task": card.task,
        "class_names": list(answers.class_names),
        "images": [
            {
                "file": str(image.path),
                "classes": [{"name": name, "probability": chance} for name, chance in row],
            }
            for image, row in zip(answers.images, answers.predictions.top(top), strict=True)
        ],
        "damaged": [{"file": str(file), "reason": reason} for file, reason in answers.damaged.items()],
    }
    if answers.labelled:
        described |= {"quality": answers.quality._asdict(), "confusion": answers.confusion().tolist()}
    write_atomic(path, (json.dumps(described, indent=1, ensure_ascii=False) + "\n").encode())


def save_csv(answers: Answers, path: Path) -> None:
    """A row an image: the file, the most probable class, the probability of each class."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("file", "class", *answers.class_names))
    predictions = answers.predictions
    for image, label, row in zip(
        answers.images, predictions.labels, predictions.probabilities.tolist(), strict=True
    ):
        writer.writerow((image.path, label, *(f"{chance:.6f}" for chance in row)))
    write_atomic(path, text.getvalue().encode())
