"""What ``mvp-ext predict`` does: a model's file of any format asked about image files, and its answers told."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_ext._version import __version__
from mvp_ext.app.console import complain, console, say
from mvp_ext.app.deploy_options import PredictOptions
from mvp_ext.app.options import DeviceOptions
from mvp_ext.app.plots import WRITTEN_CLASSES, confusion, to_png
from mvp_ext.app.tables import Side, Table
from mvp_ext.data.sources import FoundImage
from mvp_ext.deploy.bundle import BUNDLE, load_bundle
from mvp_ext.deploy.export_bundle import is_exported_bundle, load_exported_bundle
from mvp_ext.deploy.exported import load_exported
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.prediction import Predictions
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.storage import kind_of, write_atomic
from mvp_ext.train.evaluate import Quality

# Of more classes than a terminal has room for: the pairs that are confused most often.
PAIRS = 10


@dataclass(frozen=True)
class OpenedModel:
    """A model's file, whatever its format.

    Attributes:
        path: of the file.
        see: how it sees images.
        answer: uint8 [B, S, S, 3] → its predictions for each of its tasks.
    """

    path: Path
    see: Preprocessing
    answer: Callable[[Tensor], Mapping[str, Predictions]]


def open_model(path: Path, where: DeviceOptions, task: str | None = None) -> OpenedModel:
    """Open a small model's file or a bundle's, exported or not; with ``task``, of a bundle that task alone.

    Raises:
        ValueError: the file is none of these, does not have the task or does not say how its model sees images, or a
            device is asked for that does not run it. OSError: it cannot be read.
    """
    device = where.begin()
    model: Any
    many = False
    if path.suffix == ".safetensors":
        many = kind_of(path) == BUNDLE
        model = load_bundle(path, device) if many else load_pruned(path, device)
    elif where.device not in ("auto", "cpu"):
        raise ValueError(f"--device {where.device}: exported files run on the CPU")
    else:
        many = path.suffix == ".onnx" and path.is_file() and is_exported_bundle(path)
        load = load_exported_bundle if many else load_exported
        model = load(path, threads=where.threads)
    cards = model.cards if many else {model.card.task or path.stem: model.card}
    if task is not None and task not in cards:
        shown = ", ".join(list(cards)[:10]) + (", …" if len(cards) > 10 else "")
        raise ValueError(f"--task: expected one of those of {path}, {shown}, got {task!r}")
    see = next(iter(cards.values())).need_preprocessing(f"predict: {path}")

    def answer(images: Tensor) -> Mapping[str, Predictions]:
        if many and task is None:
            return model.predict(images, batch=len(images))
        (one,) = cards if task is None else (task,)
        which = {"task": one} if many else {}
        return {one: model.predict(images, **which, batch=len(images))}

    return OpenedModel(path, see, answer)


@dataclass(frozen=True)
class Answers:
    """What a model says of image files.

    Attributes:
        model: that was asked.
        images: those that could be read.
        damaged: the others, and why.
        tasks: name → the predictions of that task for ``images``.
    """

    model: OpenedModel
    images: Sequence[FoundImage]
    damaged: Mapping[Path, str]
    tasks: Mapping[str, Predictions]


def ask(
    model: OpenedModel,
    found: Sequence[FoundImage],
    *,
    batch: int,
    progress: Callable[[str, int, int], None],
) -> Answers:
    """The model's answers, ``batch`` images a pass; images that cannot be read are named on stderr as they are met."""
    images: list[FoundImage] = []
    damaged: dict[Path, str] = {}
    parts: dict[str, list[Predictions]] = {}
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(found), batch):
            chunk = found[start : start + batch]
            pixels = []
            for image, read in zip(chunk, pool.map(partial(_read, model.see), chunk), strict=True):
                if isinstance(read, str):
                    damaged[image.path] = read
                    complain(f"{image.path}: passed over: {read}", "yellow")
                else:
                    images.append(image)
                    pixels.append(read)
            if pixels:
                for task, predictions in model.answer(torch.stack(pixels)).items():
                    parts.setdefault(task, []).append(predictions)
            progress("", start + len(chunk), len(found))
    tasks = {
        task: Predictions(torch.cat([p.probabilities for p in each]), each[0].class_names)
        for task, each in parts.items()
    }
    return Answers(model, images, damaged, tasks)


def _read(see: Preprocessing, image: FoundImage) -> Tensor | str:
    """uint8 [S, S, 3], or why the image cannot be read."""
    try:
        return see.bytes_of(image.path)
    # Pillow's decoders raise almost anything on damaged bytes.
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Judgement:
    """Predictions beside the folders that their images are in.

    Attributes:
        class_names: k, of the model.
        quality: over the images in folders of classes.
        confusion: k rows (the folder's class) of k counts (the predicted class).
        strangers: how many images are in no class's folder.
    """

    class_names: Sequence[str]
    quality: Quality
    confusion: list[list[int]]
    strangers: int

    @classmethod
    def of(cls, predictions: Predictions, images: Sequence[FoundImage]) -> Judgement | None:
        """None where no image is in a folder of a class."""
        names = predictions.class_names
        number_of = {name: number for number, name in enumerate(names)}
        label_of = {folder: number_of[name] for folder, name in class_of_folder(names).items()}
        known = [row for row, image in enumerate(images) if image.group in label_of]
        if not known:
            return None
        labels = torch.tensor([label_of[str(images[row].group)] for row in known])
        probabilities = predictions.probabilities[known].double()
        pairs = labels * len(names) + probabilities.argmax(1)
        counts = pairs.bincount(minlength=len(names) ** 2).view(len(names), -1)
        # Quality takes logits; logarithms of probabilities are some.
        quality = Quality.of(probabilities.log(), labels)
        return cls(names, quality, counts.tolist(), len(images) - len(known))

    def per_class(self) -> dict[str, tuple[int, int]]:
        """(images, those that are right) of each class that has images."""
        rows = zip(self.class_names, self.confusion, strict=True)
        return {name: (sum(row), row[at]) for at, (name, row) in enumerate(rows) if any(row)}

    @property
    def images(self) -> int:
        return sum(map(sum, self.confusion))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "images": self.images,
            **{name: value for name, value in self.quality._asdict().items() if name != "class_accuracy"},
            "classes": {
                name: {"images": images, "right": right, "accuracy": right / images}
                for name, (images, right) in self.per_class().items()
            },
            "confusion": self.confusion,
            "in_no_class_folder": self.strangers,
        }


def class_of_folder(class_names: Sequence[str]) -> dict[str, str]:
    """Which class a folder's name says: its own, or without the data set that joined classes are named by."""
    short = [(name.partition("/")[2], name) for name in class_names if "/" in name]
    counts = Counter([*class_names, *(folder for folder, _ in short)])
    return {folder: name for folder, name in short if counts[folder] == 1} | {n: n for n in class_names}


def publish(answers: Answers, what: PredictOptions) -> None:
    """Print the answers, and write them where ``what`` says.

    Raises:
        ValueError: a confusion matrix is asked for, and there is no one to draw. OSError: a file cannot be written.
    """
    judged = {
        task: judgement
        for task, predictions in answers.tasks.items()
        if (judgement := Judgement.of(predictions, answers.images)) is not None
    }
    console.print(answers_table(answers, what.top))
    for task, judgement in judged.items():
        for table in judgement_tables(judgement, task if len(answers.tasks) > 1 else ""):
            console.print(table)
        say(_in_words(judgement))
    if what.json is not None:
        _write(what.json, json.dumps(to_json(answers, judged, what.top), indent=1) + "\n")
    if what.csv is not None:
        _write(what.csv, to_csv(answers, what.top))
    if what.confusion is not None:
        if len(judged) != 1:
            raise ValueError(
                f"--confusion: expected one task with images in folders of its classes, got {len(judged)}"
            )
        (judgement,) = judged.values()
        drawn = partial(confusion, judgement.confusion, judgement.class_names)
        _write(what.confusion, to_png(drawn))


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Bytes of a file's name that are no text are spelled out.
    write_atomic(path, content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
    say(path)


def answers_table(answers: Answers, top: int) -> Table:
    """A row an image and task: its ``top`` most probable classes."""
    several = len(answers.tasks) > 1
    best = {task: predictions.top(top) for task, predictions in answers.tasks.items()}
    width = max((len(row) for rows in best.values() for row in rows), default=0)
    headings = ["image", *(["task"] if several else []), *map(str, range(1, width + 1))]
    columns: list[tuple[str, Side]] = [(heading, "left") for heading in headings]
    rows = []
    for position, image in enumerate(answers.images):
        name = str(image.path)
        for task, ranked in best.items():
            cells = [f"{label} {100 * chance:.1f} %" for label, chance in ranked[position]]
            rows.append([name, *([task] if several else []), *cells, *[""] * (width - len(cells))])
            name = ""
    return Table(columns, rows, "most probable classes")


def judgement_tables(judgement: Judgement, task: str) -> list[Table]:
    """Accuracy of each class, and what is taken for what."""
    title = f"{task}: " if task else ""
    classes = [
        [name, str(images), str(right), f"{100 * right / images:.1f}"]
        for name, (images, right) in judgement.per_class().items()
    ]
    names, counts = judgement.class_names, judgement.confusion
    sides: tuple[Side, ...] = ("left", "right", "right", "right")
    headings = ("class", "images", "right", "accuracy (%)")
    tables = [Table(list(zip(headings, sides, strict=True)), classes, f"{title}accuracy by class")]
    if len(names) <= WRITTEN_CLASSES:
        columns: list[tuple[str, Side]] = [("folder", "left"), *((name, "right") for name in names)]
        rows = [[name, *map(str, row)] for name, row in zip(names, counts, strict=True) if any(row)]
        return [*tables, Table(columns, rows, f"{title}images of each folder by the class predicted")]
    pairs = sorted(
        (-count, at, predicted)
        for at, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and at != predicted
    )
    rows = [[names[at], names[predicted], str(-count)] for count, at, predicted in pairs[:PAIRS]]
    columns = [("folder", "left"), ("predicted", "left"), ("images", "right")]
    return [*tables, Table(columns, rows, f"{title}confused most often")]


def _in_words(judgement: Judgement) -> str:
    quality = judgement.quality
    text = (
        f"accuracy {100 * quality.accuracy:.1f} % on {judgement.images} images, mean confidence "
        f"{100 * quality.mean_confidence:.1f} %, expected calibration error "
        f"{100 * quality.expected_calibration_error:.1f} %"
    )
    if judgement.strangers:
        text += f"; {judgement.strangers} more are in no folder of a class and do not count"
    return text


def to_json(answers: Answers, judged: Mapping[str, Judgement], top: int) -> dict[str, Any]:
    """The answers as JSON values: the model, an entry an image and task, the damaged images, the quality."""
    best = {task: predictions.top(top) for task, predictions in answers.tasks.items()}
    labels = {task: class_of_folder(predictions.class_names) for task, predictions in answers.tasks.items()}
    return {
        "model": {
            "file": answers.model.path.name,
            "tasks": {task: list(predictions.class_names) for task, predictions in answers.tasks.items()},
        },
        "versions": {"mvp_ext": __version__, "torch": torch.__version__},
        "images": [
            {
                "file": str(image.path),
                "task": task,
                **({"label": labels[task][image.group]} if image.group in labels[task] else {}),
                "classes": [{"name": name, "probability": chance} for name, chance in ranked[position]],
            }
            for position, image in enumerate(answers.images)
            for task, ranked in best.items()
        ],
        "damaged": [{"file": str(path), "reason": reason} for path, reason in answers.damaged.items()],
        "quality": {task: judgement.to_dict() for task, judgement in judged.items()},
    }


def to_csv(answers: Answers, top: int) -> str:
    """A line an image and task: the ``top`` classes, then the probability of each class; empty where a task has it
    not."""
    classes = list(dict.fromkeys(name for each in answers.tasks.values() for name in each.class_names))
    ranks = range(1, min(top, len(classes)) + 1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranked_columns = [f"{what} {rank}" for rank in ranks for what in ("class", "probability")]
    writer.writerow(["file", "task", "label", *ranked_columns, *classes])
    best = {task: predictions.top(top) for task, predictions in answers.tasks.items()}
    labels = {task: class_of_folder(predictions.class_names) for task, predictions in answers.tasks.items()}
    for position, image in enumerate(answers.images):
        for task, predictions in answers.tasks.items():
            ranked = [cell for pair in best[task][position] for cell in pair]
            label = labels[task].get(image.group or "", "")
            chances = predictions.probabilities[position].tolist()
            chance_of = dict(zip(predictions.class_names, chances, strict=True))
            padding = [""] * (2 * len(ranks) - len(ranked))
            every = [chance_of.get(name, "") for name in classes]
            writer.writerow([image.path, task, label, *ranked, *padding, *every])
    return text.getvalue()
