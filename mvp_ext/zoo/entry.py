"""What a zoo is made of: the backbone's identity, its entries, and what can be wrong with them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mvp_ext.model.checkpoint import PrunedCheckpoint, PrunedState, read_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.zoo.index import ZooError


@dataclass(frozen=True, eq=False)
class ZooEntry:
    """One pruned model of the zoo. The description is in memory; weights come with :meth:`read` or :meth:`load`.

    Attributes:
        name: unique in its zoo.
        task: the task it was made for, as ``Task.to_dict`` gives it.
        architecture, structure_fingerprint: of the backbone.
        keep: share of all units kept, in (0, 1].
        accuracy: on the task's test images, in [0, 1], or None.
        steps: fine-tuning steps spent on it.
        cost: what making it cost, as given to ``Zoo.add``.
        mask: the units kept.
        created: when, ISO 8601 in UTC.
        sha256: of the file at ``path``.
    """

    name: str
    task: dict[str, Any]
    architecture: str | None
    structure_fingerprint: str
    keep: float
    accuracy: float | None
    steps: int
    cost: dict[str, Any]
    mask: Mask
    created: str
    sha256: str
    path: Path

    def read(self) -> PrunedState:
        """Read the weights and extra tensors and build no model: what voting needs, in milliseconds.

        Raises:
            ZooError: the file is gone, or its bytes are not those that were added; the message names it.
        """
        problem = file_problem(self.path, self.sha256)
        if problem:
            raise ZooError(f"zoo entry {self.name!r}: {self.path}: {problem}")
        try:
            return read_pruned(self.path)
        except (OSError, ValueError) as error:
            raise ZooError(f"zoo entry {self.name!r}: {error}") from error

    def load(self, device: torch.device | str = "cpu") -> PrunedCheckpoint:
        """Read the model, in eval mode, and its extra tensors.

        Raises:
            ZooError: as :meth:`read`, or this timm builds another model than the one that was added.
        """
        stored = self.read()
        try:
            model = stored.build()
        except ValueError as error:
            raise ZooError(f"zoo entry {self.name!r}: {self.path}: {error}") from error
        return PrunedCheckpoint(model.to(device), stored.mask, stored.structure, stored.extra)


@dataclass(frozen=True)
class ZooProblem:
    """One thing that ``Zoo.verify`` found.

    ``kind``: "index" (the index itself), "missing", "damaged" (an entry's file or row), "stray" (a file that is no
    entry's, left behind by a killed or failed writer).
    """

    kind: Literal["index", "missing", "damaged", "stray"]
    path: Path
    message: str
    entry: str | None = None

    def __str__(self) -> str:
        subject = f"entry {self.entry!r}: " if self.entry else ""
        return f"{self.kind}: {subject}{self.path}: {self.message}"


def file_problem(path: Path, sha256: str) -> str | None:
    try:
        got = file_sha256(path)
    except FileNotFoundError:
        return "the file is gone"
    except OSError as error:
        return f"the file cannot be read ({error})"
    return None if got == sha256 else f"the file is damaged: expected SHA-256 {sha256[:16]}…, got {got[:16]}…"


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
