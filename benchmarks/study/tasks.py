"""The tasks of a world: which classes are hidden, which the zoo sees, which are held out. All from fixed seeds."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvp_ext.data.images import ImageData, load_data
from mvp_ext.data.tasks import Task, sample_tasks
from mvp_ext.model.preprocessing import resize

from .config import World

# Seeds of the draws, apart from each other so that a longer zoo does not change the held-out tasks.
ZOO_SEED, DEVELOPMENT_SEED, HELD_OUT_SEED, HIDDEN_SEED = 1000, 2000, 3000, 4000


@dataclass(frozen=True)
class TaskSet:
    """``zoo`` and ``development`` tasks, and the held-out ones by split.

    ``seen``: classes that the zoo (and a backbone pre-trained here) may see. ``left_out``: sources that were not there.
    """

    data: ImageData
    seen: tuple[int, ...]
    hidden: tuple[int, ...]
    zoo: tuple[Task, ...]
    development: tuple[Task, ...]
    splits: dict[str, tuple[Task, ...]]
    left_out: tuple[str, ...] = ()

    def of(self, split: str) -> tuple[Task, ...]:
        return self.development if split == "development" else self.splits[split]

    @cached_property
    def seen_data(self) -> ImageData:
        """The data without the hidden classes' images: what a backbone may be trained on."""
        keep = torch.zeros(len(self.data.class_names), dtype=torch.bool)
        keep[list(self.seen)] = True
        parts: dict[str, Any] = {}
        for which in ("train", "test"):
            images, labels = self.data.split(which)
            parts |= {f"{which}_images": images[keep[labels]], f"{which}_labels": labels[keep[labels]]}
        return replace(self.data, **parts)

    def published(self) -> dict[str, Any]:
        """Every class list, as JSON values."""
        lists = {"zoo": self.zoo, "development": self.development, **self.splits}
        return {
            "data": self.data.name,
            "hidden classes": [self.data.class_names[c] for c in self.hidden],
            "tasks": {name: {t.name: list(t.class_names) for t in tasks} for name, tasks in lists.items()},
            "left out": list(self.left_out),
        }


def draw_tasks(world: World, files: Path) -> TaskSet:
    """The tasks of a world; sources are looked for below ``files``."""
    found, left_out = [load_source(source, files) for source in world.sources], []
    for source in world.optional_sources:
        try:
            found.append(load_source(source, files))
        except (OSError, ValueError):
            left_out.append(source)
    data = found[0] if len(found) == 1 else join_data(found, world.joined_size)
    generator = torch.Generator().manual_seed(world.seed + HIDDEN_SEED)
    order = [data.classes[i] for i in torch.randperm(len(data.classes), generator=generator).tolist()]
    hidden, seen = tuple(sorted(order[: world.hidden])), tuple(sorted(order[world.hidden :]))
    domains = _domains(world, data, seen)
    k = world.classes_per_task

    def draw(
        count: int, seed: int, prefix: str, taken: Sequence[Task], images: int | None
    ) -> tuple[Task, ...]:
        drawn = []
        for number, classes in enumerate(domains):
            share = -(-count // len(domains))
            drawn.append(
                sample_tasks(
                    data,
                    share,
                    min(k, len(classes)),
                    seed + world.seed + 100 * number,
                    exclude=taken,
                    classes=classes,
                    max_train_per_class=images,
                )
            )
        mixed = [task for group in zip_longest(*drawn) for task in group if task is not None][:count]
        return tuple(replace(task, name=f"{prefix}-{i:03d}") for i, task in enumerate(mixed))

    zoo = draw(world.zoo_tasks, ZOO_SEED, "zoo", (), world.zoo_train)
    development = draw(world.development, DEVELOPMENT_SEED, "development", zoo, world.task_train)
    splits: dict[str, tuple[Task, ...]] = {}
    taken = [*zoo, *development]
    for name, split in world.splits.items():
        if split.kind == "shared":
            splits[name] = draw(split.count, HELD_OUT_SEED, name, taken, world.task_train)
        elif split.kind in ("hidden", "other"):
            source = data if split.kind == "hidden" else load_source(split.source, files)
            splits[name] = tuple(
                sample_tasks(
                    source,
                    split.count,
                    split.classes,
                    HELD_OUT_SEED + world.seed,
                    name,
                    classes=hidden if split.kind == "hidden" else None,
                    max_train_per_class=world.task_train,
                )
            )
        else:
            raise ValueError(f"split {name!r}: kind: expected shared, hidden or other, got {split.kind!r}")
        taken += splits[name]
    return TaskSet(data, seen, hidden, zoo, development, splits, tuple(left_out))


def load_source(source: str, files: Path) -> ImageData:
    """As ``load_data``, with paths below ``files``; ``idx:FOLDER`` reads the MNIST family's files."""
    if source.startswith("idx:"):
        return _read_idx(files / source.removeprefix("idx:"))
    if source.partition(":")[0] in ("digits", "cifar100"):
        return load_data(source)
    paths = sorted(files.glob(source))
    if not paths:
        raise FileNotFoundError(f"{files / source}: no such data; --files says where it is")
    return load_data(paths if len(paths) > 1 else paths[0])


def join_data(parts: Sequence[ImageData], size: int) -> ImageData:
    """Several data sets as one, at one image size.

    The names of classes without superclasses are preceded by their data set's. Superclasses stay; a data set without
    them becomes one. Images are mirrored only where all data sets allow it.
    """
    first = 0
    columns: dict[str, list[Any]] = {f"{w}_{k}": [] for w in ("train", "test") for k in ("images", "labels")}
    names: list[str] = []
    groups: list[int] = []
    group_names: list[str] = []
    for part in parts:
        for which in ("train", "test"):
            images, labels = part.split(which)
            columns[f"{which}_images"].append(resize(images, size))
            columns[f"{which}_labels"].append(labels + first)
        grouped = part.superclass_of_class is not None
        names += [name if grouped else f"{part.name}/{name}" for name in part.class_names]
        own = part.superclass_of_class or (0,) * len(part.class_names)
        groups += [len(group_names) + group for group in own]
        group_names += list(part.superclass_names or (part.name,))
        first += len(part.class_names)
    return ImageData(
        name="+".join(part.name for part in parts),
        class_names=tuple(names),
        flip=all(part.flip for part in parts),
        superclass_of_class=tuple(groups),
        superclass_names=tuple(group_names),
        **{name: torch.cat(values) for name, values in columns.items()},
    )


def _domains(world: World, data: ImageData, seen: Sequence[int]) -> list[tuple[int, ...]]:
    """The classes of each domain that the zoo may see; one domain of all where none is given."""
    if not world.domains:
        return [tuple(seen)]
    if data.superclass_of_class is None or data.superclass_names is None:
        raise ValueError(f"domains: {data.name!r} knows no superclasses")
    found = []
    for domain in world.domains:
        groups = {data.superclass_names.index(name) for name in domain if name in data.superclass_names}
        classes = tuple(c for c in seen if data.superclass_of_class[c] in groups)
        if len(classes) > world.classes_per_task:  # a source that is not there has none
            found.append(classes)
    return found


def _read_idx(folder: Path) -> ImageData:
    """Fashion-MNIST (or MNIST) as its authors publish it: four gzipped IDX files."""

    def read(name: str, header: int) -> np.ndarray:
        raw = gzip.decompress(next(_existing(folder, name)).read_bytes())
        return np.frombuffer(raw, np.uint8, offset=header)

    parts: dict[str, Any] = {}
    for which, prefix in (("train", "train"), ("test", "t10k")):
        images = read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
        parts[f"{which}_images"] = torch.from_numpy(np.repeat(images, 3, axis=3).copy())
        parts[f"{which}_labels"] = torch.from_numpy(
            read(f"{prefix}-labels-idx1-ubyte.gz", 8).astype(np.int64)
        )
    classes = tuple(str(label) for label in range(int(parts["train_labels"].max()) + 1))
    return ImageData(name=folder.name, class_names=classes, flip=False, **parts)


def _existing(folder: Path, name: str) -> Iterator[Path]:
    yield from (path for path in (folder / name, folder / "raw" / name) if path.exists())
    raise FileNotFoundError(f"{folder / name}: no such file")
