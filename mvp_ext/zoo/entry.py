"""What a zoo is made of: its entries, the models that they share, and what can be wrong with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint, PrunedState, parse_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.zoo.files import BadFile, check_sound, read_sound
from mvp_ext.zoo.index import ZooError

# Among the extra values of a model's file: what its row says, so that a lost index can be made again.
RECORD = "zoo"


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A pruned model in a zoo. The description is in memory; weights come with ``read`` or ``load``.

    Attributes:
        name: unique among those of its kind in its zoo.
        structure_fingerprint: of the dense model.
        created: when, ISO 8601 in UTC.
        sha256: of the file at ``path``.
    """

    kind: ClassVar[str]
    name: str
    structure_fingerprint: str
    created: str
    sha256: str
    path: Path

    def read(self) -> PrunedState:
        """Read the weights and extra tensors and build no model: what voting needs, in milliseconds.

        Raises:
            ZooError: the file is gone, or its bytes are not those that were added; the message names it.
        """
        try:
            stored = parse_pruned(read_sound(self.path, self.sha256), source=os.fspath(self.path))
            stored.extra.pop(RECORD, None)
            return stored
        except BadFile as error:
            raise ZooError(f"zoo {self.kind} {self.name!r}: {self.path}: {error}") from error
        except ValueError as error:
            raise ZooError(f"zoo {self.kind} {self.name!r}: {error}") from error

    def is_sound(self) -> bool:
        """Whether the file has the bytes that were added; it is read for that once a process, while it is unchanged."""
        try:
            check_sound(self.path, self.sha256)
        except BadFile:
            return False
        return True

    def load(self, device: torch.device | str = "cpu") -> PrunedCheckpoint:
        """Read the model, in eval mode, and its extra values.

        Raises:
            ZooError: as ``read``, or this timm builds another model than the one that was added.
        """
        stored = self.read()
        try:
            model = stored.build()
        except ValueError as error:
            raise ZooError(f"zoo {self.kind} {self.name!r}: {self.path}: {error}") from error
        return stored.checkpoint(model.to(device))


@dataclass(frozen=True, eq=False)
class ZooEntry(StoredModel):
    """One pruned model of the zoo, made for one task.

    Attributes:
        task: the task it was made for, as ``Task.to_dict`` gives it.
        architecture: of the backbone.
        keep: share of all units kept, in (0, 1].
        accuracy: on the task's test images, in [0, 1], or None.
        steps: fine-tuning steps spent on it.
        cost: what making it cost, as given to ``Zoo.add``.
        mask: the units kept.
    """

    kind: ClassVar[str] = "entry"
    architecture: str | None
    task: dict[str, Any]
    keep: float
    accuracy: float | None
    steps: int
    cost: dict[str, Any]
    mask: Mask


@dataclass(frozen=True, eq=False)
class SharedModel(StoredModel):
    """A model that a zoo keeps beside its entries: one for all tasks, or what the entries started from.

    Attributes:
        extra: JSON values that were saved with it; known without reading its file.
    """

    kind: ClassVar[str] = "model"
    extra: dict[str, Any]


class ClassMeans(NamedTuple):
    """What a zoo knows of an entry's task: the class means of its images under the dense backbone.

    ``means`` is f32 [k, F]; ``temperature`` that of ``nearest_mean_head``.
    """

    name: str
    means: Tensor
    temperature: float


@dataclass(frozen=True, eq=False)
class NewEntry:
    """A pruned model that is to be added to a zoo.

    Attributes:
        name: of the entry, 1 to 200 characters.
        model: the pruned model, at its real, small shapes.
        mask, structure: what was kept, of which dense model.
        task: the ``Task``, or its ``to_dict()``.
        accuracy: on the task's test images, in [0, 1].
        steps: fine-tuning steps spent.
        cost: a dict of JSON values, or a dataclass of them.
        card: what its file says of it beside its weights.
        tensors: extra tensors to keep beside the weights. With "class_means" (f32 [k, F]) and "temperature" (a scalar)
            the entry can be found by ``nearest_entries``; "head_weight" and "head_bias" are its own classifier.

    Raises:
        ValueError: no name, no task, an accuracy outside [0, 1], a mask that does not fit the structure.
    """

    name: str
    model: nn.Module
    mask: Mask
    structure: Structure
    task: Any
    accuracy: float | None = None
    steps: int = 0
    cost: Any = None
    card: ModelCard | None = None
    tensors: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 200:
            raise ValueError(f"zoo.add: an entry's name has 1 to 200 characters, got {self.name!r}")
        if self.task is None:
            raise ValueError(f"zoo.add: {self.name!r}: expected a task or its to_dict(), got None")
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:  # also catches NaN
            raise ValueError(f"zoo.add: {self.name!r}: accuracy must be in [0, 1], got {self.accuracy}")
        self.mask.check(self.structure)

    @classmethod
    def of(cls, result: Any) -> NewEntry:
        """From a result of pruning: an object with ``model``, ``mask``, ``structure``, ``task``, ``accuracy``, ``cost``
        and, where it has them, ``steps`` and ``tensors``; the entry is named after the task.
        """
        return cls(
            result.task["name"] if isinstance(result.task, Mapping) else result.task.name,
            result.model,
            result.mask,
            result.structure,
            result.task,
            accuracy=result.accuracy,
            steps=getattr(result, "steps", 0) or getattr(result.cost, "steps", 0),
            cost=result.cost,
            card=getattr(result, "card", None),
            tensors=getattr(result, "tensors", None),
        )


@dataclass(frozen=True)
class ZooProblem:
    """One thing that ``Zoo.verify`` found.

    ``kind``: "index" (the index itself), "missing", "damaged" (a model's file or row), "stray" (a file that is no
    model's, left behind by a killed or failed writer). ``entry`` or ``model`` names whose it is.
    """

    kind: Literal["index", "missing", "damaged", "stray"]
    path: Path
    message: str
    entry: str | None = None
    model: str | None = None

    def __str__(self) -> str:
        subject = f"entry {self.entry!r}: " if self.entry else f"model {self.model!r}: " if self.model else ""
        return f"{self.kind}: {subject}{self.path}: {self.message}"
