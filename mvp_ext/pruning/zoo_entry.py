"""What a zoo is made of: the backbone's identity, its entries, and what can be wrong with them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from mvp_ext.model.checkpoint import PrunedCheckpoint, PrunedState, read_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import find_structure

from .zoo_index import ZooError

if TYPE_CHECKING:
    from mvp_ext.model.structure import Structure


@dataclass(frozen=True)
class BackboneIdentity:
    """Which dense model a zoo's entries were cut from. Entries of different ones cannot vote together.

    Attributes:
        architecture: timm's name of it, or None where it is not known.
        structure_fingerprint: of its layers of units (``Structure.fingerprint``).
        weights_sha256: of its weights without the head; None where only a pruned model was seen.
    """

    architecture: str | None
    structure_fingerprint: str
    weights_sha256: str | None = None

    @classmethod
    def of(cls, model: nn.Module, structure: Structure | None = None) -> BackboneIdentity:
        """The identity of a dense model. The head does not enter it: every task has one of its own.

        Args:
            model: the dense model, as it was before any task.
            structure: of the scope that is pruned; default: the model's default scope.
        """
        structure = structure or find_structure(model)
        config = getattr(model, "pretrained_cfg", None) or {}
        head = (config.get("classifier") if isinstance(config, Mapping) else config.classifier) or ()
        heads = tuple(f"{name}." for name in ((head,) if isinstance(head, str) else head))
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            # Batch counters say how long a model trained, and change nothing that it computes.
            if not name.startswith(heads) and not name.endswith("num_batches_tracked"):
                digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return cls(structure.architecture, structure.fingerprint, digest.hexdigest())

    def to_meta(self) -> dict[str, str]:
        """What is known of it, as the index records it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_meta(cls, meta: Mapping[str, str]) -> BackboneIdentity | None:
        """The inverse of :meth:`to_meta`; None where nothing is recorded."""
        if "structure_fingerprint" not in meta:
            return None
        return cls(meta.get("architecture"), meta["structure_fingerprint"], meta.get("weights_sha256"))


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
