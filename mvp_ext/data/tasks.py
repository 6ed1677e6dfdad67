"""Tasks: named sets of classes that can be saved and repeated exactly."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_ext.data.images import ImageData, content_hash, members_of, number_of
from mvp_ext.data.stored import Images, StoredImages
from mvp_ext.storage import write_atomic

TASK_FORMAT = 1
# Up to this many class sets are listed and shuffled; beyond it sets are drawn, where a repeat is rare.
_LISTED_SETS = 20_000


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task's own images, labels renumbered 0..k−1 in the order of ``class_names``.

    Attributes:
        name: the task's name.
        train_images: uint8 [n, H, W, 3]; ``StoredImages`` where the data set's are.
        train_labels: int64 [n], in [0, k).
        test_images: as for training.
        test_labels: likewise.
        class_names: k names.
        flip: whether augmentation may mirror these images.
    """

    name: str
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]
    flip: bool = True

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to(self, device: torch.device | str) -> TaskData:
        """The same data on another device (uint8, so a few megabytes a task); stored images go there by batches."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


@dataclass(frozen=True, eq=False)
class Task:
    """A classification problem: some classes of a data set.

    Two tasks with equal arguments over equal data have equal images in equal order (``fingerprint`` says so).

    Attributes:
        name: unique among the tasks it is used with; it names zoo entries.
        data: where the images are.
        classes: at least two different class numbers of ``data``; kept in ascending order.
        seed: draws the training images under ``max_train_per_class``; the natural seed of its training.
        max_train_per_class: at most so many training images a class (None: all). All test images stay.

    Raises:
        ValueError: fewer than two classes, a repeated or unknown class, or one without images.
    """

    name: str
    data: ImageData = field(repr=False)
    classes: tuple[int, ...]
    seed: int = 0
    max_train_per_class: int | None = None

    def __post_init__(self) -> None:
        classes = tuple(sorted(int(label) for label in self.classes))
        object.__setattr__(self, "classes", classes)
        if not self.name:
            raise ValueError("Task: a task needs a name")
        if len(classes) < 2:
            raise ValueError(f"Task {self.name!r}: at least 2 classes are needed, got {len(classes)}")
        if len(set(classes)) != len(classes):
            raise ValueError(f"Task {self.name!r}: classes must differ, got {classes}")
        usable = self.data.usable
        for label in classes:
            if not 0 <= label < len(self.data.class_names):
                known = len(self.data.class_names)
                raise ValueError(
                    f"Task {self.name!r}: class {label} is not in [0, {known}) of {self.data.name!r}"
                )
            if label not in usable:
                raise ValueError(
                    f"Task {self.name!r}: class {self.data.class_names[label]!r} has no training or no test "
                    f"images in {self.data.name!r}"
                )
        if self.max_train_per_class is not None and self.max_train_per_class < 1:
            raise ValueError(
                f"Task {self.name!r}: max_train_per_class must be at least 1, got {self.max_train_per_class}"
            )

    @classmethod
    def of(cls, name: str, data: ImageData, class_names: Sequence[str], **options: Any) -> Task:
        """A task by class names; ValueError names an unknown one and the nearest known."""
        return cls(name, data, data.numbers_of(class_names), **options)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.data.class_names[label] for label in self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the task's split: images in order, labels, names. Other classes do not enter it."""
        data = self.split()
        tensors = [data.train_images, data.train_labels, data.test_images, data.test_labels]
        return content_hash(tensors, data.class_names)

    def split(self) -> TaskData:
        """The task's images, in the order of the data set: a copy, or the data set's own where they are all of them.

        Of stored images none is read.
        """
        generator = torch.Generator().manual_seed(self.seed)
        renumber = torch.full((len(self.data.class_names),), -1)
        renumber[list(self.classes)] = torch.arange(len(self.classes))
        parts: dict[str, Any] = {}
        for which in ("train", "test"):
            images, labels = self.data.split(which)
            own = renumber[labels]
            keep = own >= 0
            if which == "train" and self.max_train_per_class is not None:
                for label, members in members_of(own.cpu().numpy()):
                    if label >= 0:
                        order = torch.randperm(len(members), generator=generator)
                        keep[torch.from_numpy(members)[order[self.max_train_per_class :]]] = False
            if not keep.all():
                images = images.only(keep) if isinstance(images, StoredImages) else images[keep]
            parts |= {f"{which}_images": images, f"{which}_labels": own[keep]}
        return TaskData(name=self.name, class_names=self.class_names, flip=self.data.flip, **parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description: everything but the images, which it names by fingerprint."""
        return {
            "format": TASK_FORMAT,
            "name": self.name,
            "data": self.data.name,
            "classes": list(self.class_names),
            "seed": self.seed,
            "max_train_per_class": self.max_train_per_class,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any], data: ImageData, *, what: str = "task") -> Task:
        """The task again, over ``data``; ValueError where the images are not those it was saved with.

        Classes are found by name, so a data set that gained other classes since still serves.
        """
        if not isinstance(record, dict) or record.get("format") != TASK_FORMAT:
            got = record.get("format") if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{what}: not a task of format {TASK_FORMAT}, got {got!r}")
        try:
            task = cls.of(
                record["name"],
                data,
                record["classes"],
                seed=record["seed"],
                max_train_per_class=record["max_train_per_class"],
            )
            expected = record["fingerprint"]
        except KeyError as error:
            raise ValueError(f"{what}: the task has no {error}") from error
        if task.fingerprint != expected:
            raise ValueError(
                f"{what}: task {task.name!r} was saved with other images of {record.get('data')!r} than "
                f"{data.name!r} has (fingerprint: expected {str(expected)[:12]}, got {task.fingerprint[:12]}); load"
                f" the data with the same source, image_size, test_share and seed"
            )
        return task

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the task as JSON; the file is replaced whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        write_atomic(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], data: ImageData) -> Task:
        """Read a task saved by ``save`` and check that ``data`` still has its images."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a task file ({error})") from error
        return cls.from_dict(record, data, what=str(path))


def sample_tasks(
    data: ImageData,
    count: int,
    classes_per_task: int,
    seed: int,
    prefix: str = "task",
    *,
    exclude: Iterable[Task] = (),
    superclasses: Iterable[str] | None = None,
    classes: Iterable[int] | None = None,
    max_train_per_class: int | None = None,
) -> list[Task]:
    """Draw tasks whose class sets all differ.

    A longer list starts with the shorter one, other arguments equal, so that a zoo can grow. Of joined data sets
    (``load_joined``) each task has classes of one, in turn.

    Args:
        data: where the classes come from.
        count: how many tasks.
        classes_per_task: at least 2.
        seed: of the draw; task i has seed ``seed + i`` and name ``{prefix}-{i:03d}``.
        prefix: of the names.
        exclude: tasks whose class sets must not be drawn again (a zoo's, for held-out tasks).
        superclasses: draw only from these superclasses' classes.
        classes: draw only from these classes (for a split by class: other classes than the zoo's).
        max_train_per_class: passed on to each task.

    Raises:
        ValueError: fewer than ``count`` such sets exist, unknown superclasses or classes.
    """
    pool = list(data.classes)
    if superclasses is not None:
        pool = _of_superclasses(data, pool, superclasses)
    if classes is not None:
        wanted = set(classes)
        missing = sorted(wanted - set(data.classes))
        if missing:
            named = [data.class_names[c] if 0 <= c < len(data.class_names) else c for c in missing]
            raise ValueError(f"sample_tasks: classes {named} have no images in {data.name!r}")
        pool = [label for label in pool if label in wanted]
    if classes_per_task < 2:
        raise ValueError(
            f"sample_tasks: a task needs at least 2 classes, got classes_per_task={classes_per_task}"
        )
    taken = {task.classes for task in exclude}
    pools = [pool]
    if data.domains is not None:
        pools = [[c for c in pool if c in domain] for domain in data.domains]
        pools = [pool for pool in pools if pool] or [[]]
    draws = []
    for number, pool in enumerate(pools):
        wanted_here = len(range(number, count, len(pools)))
        _check_enough(data, pool, classes_per_task, wanted_here, taken)
        sets = _class_sets(pool, classes_per_task, seed + number)
        draws.append(chosen for chosen in sets if chosen not in taken)
    tasks: list[Task] = []
    while len(tasks) < count:
        index = len(tasks)
        chosen = next(draws[index % len(draws)])
        taken.add(chosen)
        tasks.append(Task(f"{prefix}-{index:03d}", data, chosen, seed + index, max_train_per_class))
    return tasks


def _check_enough(
    data: ImageData, pool: list[int], size: int, count: int, taken: set[tuple[int, ...]]
) -> None:
    members = set(pool)
    blocked = sum(len(c) == size and members.issuperset(c) for c in taken)
    available = math.comb(len(pool), size) - blocked
    if count > available:
        of = f" of {data.class_names[pool[0]].partition('/')[0]!r}" if pool and data.domains else ""
        raise ValueError(
            f"sample_tasks: {count} different sets of {size} classes were asked for, {len(pool)} "
            f"classes{of} ({blocked} sets excluded) give {available}"
        )


def _class_sets(pool: list[int], size: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Random class sets, ascending: each exactly once where there are few, else endless with repeats."""
    generator = torch.Generator().manual_seed(seed)
    total = math.comb(len(pool), size)
    if total <= _LISTED_SETS:
        listed = list(combinations(pool, size))
        yield from (listed[i] for i in torch.randperm(total, generator=generator).tolist())
        return
    while True:
        order = torch.randperm(len(pool), generator=generator)[:size]
        yield tuple(sorted(pool[i] for i in order.tolist()))


def _of_superclasses(data: ImageData, pool: list[int], superclasses: Iterable[str]) -> list[int]:
    if data.superclass_of_class is None or data.superclass_names is None:
        raise ValueError(f"sample_tasks: {data.name!r} knows no superclasses")
    numbers = {name: number for number, name in enumerate(data.superclass_names)}
    wanted = {number_of("superclass", name, numbers, data.name) for name in superclasses}
    return [label for label in pool if data.superclass_of_class[label] in wanted]


def few_of_each(labels: Tensor, count: int, seed: int) -> Tensor:
    """About ``count`` of n images, evenly of all classes, at least one of each.

    Args:
        labels: int64 [n].
        count: rounded up to a multiple of the number of classes.
        seed: of the draw.

    Returns:
        int64 indices, ascending.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    each = -(-count // max(1, len(labels.unique())))
    chosen = [torch.from_numpy(members[:each]) for _, members in members_of(shuffled.cpu().numpy())]
    return order[torch.cat(chosen)].sort().values if chosen else order
