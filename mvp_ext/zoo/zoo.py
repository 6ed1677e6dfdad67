"""The zoo: pruned models of earlier tasks, kept in one directory.

    zoo/index.sqlite                        what there is: masks, tasks, accuracies, checksums
    zoo/entries/<name>-<token>.safetensors  weights, normalisation statistics, head, class means, scores
    zoo/.lock                               held shared while an entry is added, exclusive while strays are removed

An entry's file is written whole under a name of its own before the one transaction that makes it an entry. So a kill,
a full disk or a power cut at any moment leaves a readable zoo, at worst with a stray file that `verify` names, and any
number of processes can add at once. Nothing is used whose bytes are not those that were written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mvp_ext.model.checkpoint import save_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.train.backbone import BackboneIdentity
from mvp_ext.zoo.entry import ZooEntry, ZooProblem, file_problem, file_sha256
from mvp_ext.zoo.index import Index, ZooError

__all__ = ["BackboneIdentity", "Zoo", "ZooEntry", "ZooError", "ZooProblem"]


class Zoo:
    """A directory of pruned models; safe with several processes adding and reading at once.

    Args:
        path: the directory.
        create: make it where there is none; an existing directory must be empty or a zoo.
        backbone: the dense model's identity; recorded in a zoo that has none, otherwise compared.

    Raises:
        ZooError: no zoo there (``create=False``), a directory that is something else, a damaged or newer index,
            another backbone.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, create: bool = True, backbone: BackboneIdentity | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        self._folder = self.path / "entries"
        self._index = Index(self.path / "index.sqlite")
        # Files whose content was checked: path → (size, modified, inode, sha256). Reading hundreds of files again for
        # every question would make each take seconds.
        self._checked: dict[Path, tuple[int, int, int, str]] = {}
        if self._index.version() == 0:
            if not create:
                raise ZooError(f"no zoo at {self.path}; build one first (mvp-ext zoo build)")
            self._create()
        if backbone is not None:
            self.bind(backbone)

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            ours = {
                self._folder.name,
                *(f"{self._index.path.name}{end}" for end in ("", "-wal", "-shm", "-journal")),
            }
            others = sorted(p.name for p in self.path.iterdir() if p.name not in ours and p.name[0] != ".")
            if others:
                raise ZooError(
                    f"{self.path} is not a zoo and not empty (it has {others[0]!r}); name another directory"
                )
            with self._lock(exclusive=True):
                self._folder.mkdir(exist_ok=True)
                if self._index.version() == 0:  # another process may have been first
                    self._index.create()
        except OSError as error:
            raise ZooError(f"{self.path}: no zoo can be made here ({error})") from error

    # ---- what there is

    @property
    def backbone(self) -> BackboneIdentity | None:
        """The dense model's identity, or None before the first entry."""
        return BackboneIdentity.from_meta(self._index.meta())

    def bind(self, backbone: BackboneIdentity) -> None:
        """Record the dense model's identity, or compare it with the recorded one (ZooError where they differ).

        To be called before work is spent on entries that could not be added.
        """
        self._index.record(backbone.to_meta())

    def check(self, backbone: BackboneIdentity) -> None:
        """ZooError where the recorded identity is another one; what is not recorded fits. Records nothing."""
        self._index.check(backbone.to_meta())

    def facts(self) -> dict[str, Any]:
        """JSON values that were recorded of the zoo as a whole, by name."""
        return dict(json.loads(self._index.meta().get("facts", "{}")))

    def record_facts(self, **facts: Any) -> None:
        """Record JSON values of the zoo as a whole; a name that is there is overwritten."""
        self._index.put_meta("facts", _to_json({**self.facts(), **facts}, "facts"))

    def entries(self, fingerprint: str | None = None) -> list[ZooEntry]:
        """All usable entries, by name. Damaged and missing ones are left out, each with a warning.

        Args:
            fingerprint: the structure that the entries must have; ZooError (expected, got) where one has another.
        """
        found = []
        for row in self._index.rows():
            entry = self._entry(row)
            if isinstance(entry, ZooProblem):
                warnings.warn(f"zoo {self.path}: skipped {entry}", stacklevel=2)
                continue
            if fingerprint is not None and entry.structure_fingerprint != fingerprint:
                raise ZooError(
                    f"zoo {self.path}: entry {entry.name!r} is of another backbone: expected structure fingerprint "
                    f"{fingerprint}, got {entry.structure_fingerprint} ({entry.architecture})"
                )
            found.append(entry)
        return found

    def __getitem__(self, name: str) -> ZooEntry:
        """The entry of that name; ZooError where there is none or it is damaged."""
        row = self._index.row(name)
        if row is None:
            near = difflib.get_close_matches(name, [row["name"] for row in self._index.rows()], n=3)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ZooError(f"zoo {self.path}: no entry {name!r}{hint}")
        entry = self._entry(row)
        if isinstance(entry, ZooProblem):
            raise ZooError(f"zoo {self.path}: {entry}")
        return entry

    def __contains__(self, name: object) -> bool:
        """Whether there is a usable entry of that name. A damaged one does not count: it is to be built again."""
        row = self._index.row(name) if isinstance(name, str) else None
        return row is not None and isinstance(self._entry(row), ZooEntry)

    def __len__(self) -> int:
        """The number of usable entries."""
        return sum(isinstance(self._entry(row), ZooEntry) for row in self._index.rows())

    def __iter__(self) -> Iterator[ZooEntry]:
        return iter(self.entries())

    def __repr__(self) -> str:
        return f"Zoo({str(self.path)!r})"

    def masks(self, entries: Sequence[ZooEntry] | None = None) -> Tensor:
        """bool [N, U]: the entries' masks, a row each, as ``meta_vote`` takes them. ZooError where N would be 0."""
        chosen = self.entries() if entries is None else entries
        if not chosen:
            raise ZooError(f"zoo {self.path}: no entries, so no masks")
        for entry in chosen:
            if entry.structure_fingerprint != chosen[0].structure_fingerprint:
                raise ZooError(
                    f"zoo {self.path}: entries {chosen[0].name!r} and {entry.name!r} are of different backbones: "
                    f"{chosen[0].structure_fingerprint} and {entry.structure_fingerprint}"
                )
        return torch.stack([entry.mask.to_vector() for entry in chosen])

    def _entry(self, row: Mapping[str, Any]) -> ZooEntry | ZooProblem:
        path = self._folder / row["file"]
        problem = self._check_file(path, row["sha256"])
        if problem:
            kind: Literal["missing", "damaged"] = "damaged" if path.exists() else "missing"
            return ZooProblem(kind, path, problem, row["name"])
        described = {key: value for key, value in row.items() if key not in ("file", "bytes")}
        try:
            for key in ("task", "cost"):
                described[key] = json.loads(row[key])
            described["mask"] = Mask.from_bytes(row["mask"])
        except (ValueError, TypeError) as error:
            return ZooProblem("damaged", self._index.path, f"its row cannot be read ({error})", row["name"])
        return ZooEntry(path=path, **described)

    def _check_file(self, path: Path, sha256: str) -> str | None:
        try:
            stat = path.stat()
        except OSError:
            return "the file is gone"
        seen = (stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256)
        if self._checked.get(path) == seen:
            return None
        problem = file_problem(path, sha256)
        if problem is None:
            self._checked[path] = seen
        return problem

    # ---- adding and removing

    def add(
        self,
        entry: Any,
        model: nn.Module | None = None,
        mask: Mask | None = None,
        structure: Structure | None = None,
        task: Any = None,
        *,
        accuracy: float | None = None,
        steps: int = 0,
        cost: Any = None,
        tensors: Mapping[str, Tensor] | None = None,
        replace: bool = False,
        if_absent: bool = False,
    ) -> ZooEntry:
        """Add a pruned model; when this returns, it is on the disk and every reader sees it.

        ``zoo.add(result)`` takes a result of pruning: an object with ``model``, ``mask``, ``structure``, ``task``,
        ``accuracy``, ``cost`` and, where it has them, ``steps`` and ``tensors``; the entry is named after the task.
        Otherwise:

        Args:
            entry: name of the entry.
            model: the pruned model, at its real, small shapes.
            mask, structure: what was kept, of which dense model.
            task: the ``Task``, or its ``to_dict()``.
            accuracy: on the task's test images, in [0, 1].
            steps: fine-tuning steps spent.
            cost: a dict of JSON values, or a dataclass of them.
            tensors: extra tensors to keep beside the weights (class means, scores).
            replace: whether an entry of that name is replaced. A damaged one always is.
            if_absent: keep and return an existing entry of that name, for builds that are resumed or shared.

        Raises:
            ZooError: the name is taken, the structure is another than the zoo's, the disk is full. The zoo is then
                as it was before.
            ValueError: no name, an accuracy outside [0, 1], a mask that does not fit the structure.
        """
        if not isinstance(entry, str):
            name = entry.task["name"] if isinstance(entry.task, Mapping) else entry.task.name
            model, mask, structure, task = entry.model, entry.mask, entry.structure, entry.task
            accuracy = getattr(entry, "accuracy", accuracy) if accuracy is None else accuracy
            steps = getattr(entry, "steps", None) or getattr(entry.cost, "steps", None) or steps
            cost = entry.cost if cost is None else cost
            tensors = getattr(entry, "tensors", None) if tensors is None else tensors
        else:
            name = entry
        if model is None or mask is None or structure is None or task is None:
            raise ValueError("zoo.add: expected a result, or name, model, mask, structure and task")
        if not name or len(name) > 200:
            raise ValueError(f"zoo.add: an entry's name has 1 to 200 characters, got {name!r}")
        if accuracy is not None and not 0 <= accuracy <= 1:  # also catches NaN
            raise ValueError(f"zoo.add: {name!r}: accuracy must be in [0, 1], got {accuracy}")
        mask.check(structure)
        old = self._index.row(name)
        if old is not None and not replace and isinstance(existing := self._entry(old), ZooEntry):
            if if_absent:
                return existing
            raise ZooError(f"zoo {self.path}: there already is an entry {name!r}; replace=True replaces it")

        row = {
            "name": name,
            "file": f"{_slug(name)}-{secrets.token_hex(6)}.safetensors",
            "architecture": structure.architecture,
            "structure_fingerprint": structure.fingerprint,
            "mask": mask.to_bytes(),
            "task": _to_json(task.to_dict() if hasattr(task, "to_dict") else task, "task"),
            "keep": mask.keep,
            "accuracy": None if accuracy is None else float(accuracy),
            "steps": int(steps),
            "cost": _to_json({} if cost is None else cost, "cost"),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        backbone = BackboneIdentity(structure.architecture, structure.fingerprint).to_meta()
        self._index.check(backbone)  # before the work of writing weights; again when the row goes in
        path = self._folder / str(row["file"])
        extra = {key: value.detach() for key, value in (tensors or {}).items()}
        with self._lock(exclusive=False):
            added = False
            try:
                save_pruned(model, path, mask=mask, structure=structure, extra=extra)
                row["sha256"], row["bytes"] = file_sha256(path), path.stat().st_size
                added = self._index.insert(row, backbone, replacing=old["file"] if old else None)
            except (OSError, SafetensorError) as error:
                raise ZooError(
                    f"zoo {self.path}: entry {name!r} could not be written, the zoo is unchanged ({error})"
                ) from error
            finally:
                if not added:
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
        if not added:  # another process took the name while this one was writing
            if if_absent:
                return self[name]
            raise ZooError(f"zoo {self.path}: another process just added an entry {name!r}")
        if old is not None:
            with contextlib.suppress(OSError):
                (self._folder / old["file"]).unlink(missing_ok=True)
        return self[name]

    def remove(self, name: str) -> None:
        """Remove an entry, usable or not; ZooError where there is none of that name."""
        row = self._index.row(name)
        if row is None or not self._index.delete(name, row["file"]):
            raise ZooError(f"zoo {self.path}: no entry {name!r}")
        with contextlib.suppress(OSError):  # what stays is a stray file, which verify names
            (self._folder / row["file"]).unlink(missing_ok=True)

    # ---- soundness

    def verify(self, *, repair: bool = False) -> list[ZooProblem]:
        """Check the index and read every file; returns what is wrong (empty: sound).

        Args:
            repair: also remove what is wrong: stray files, and entries whose file is damaged or gone, so that a build
                makes them again. Waits for entries that are just being added.

        Files of entries that another process is adding at this moment are not called stray.
        """
        problems = [ZooProblem("index", self._index.path, line) for line in self._index.problems()]
        self._checked.clear()  # somebody asks because they doubt: read everything again
        for row in self._index.rows():
            entry = self._entry(row)
            if isinstance(entry, ZooProblem):
                problems.append(entry)
                if repair:
                    self._index.delete(row["name"], row["file"])
                    with contextlib.suppress(OSError):
                        (self._folder / row["file"]).unlink(missing_ok=True)
        with self._lock(exclusive=True, wait=repair) as alone:
            if alone:  # no writer is between its file and its row, so a file without a row is nobody's
                known = {row["file"] for row in self._index.rows()}
                for path in sorted(self._folder.iterdir()):
                    if path.name not in known and path.is_file():
                        problems.append(
                            ZooProblem("stray", path, "no entry's file, left by a stopped writer")
                        )
                        if repair:
                            path.unlink(missing_ok=True)
        return problems

    @contextlib.contextmanager
    def _lock(self, *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
        """Hold the zoo's lock; yields whether it was had. The kernel releases it when a process dies."""
        with open(self.path / ".lock", "a") as file:
            mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            try:
                fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file releases the lock


def _slug(name: str) -> str:
    """A part of a file name that still says which entry it is, on any file system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:80] or "entry"


def _to_json(value: Any, what: str) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"zoo.add: {what} must be JSON values ({error})") from error


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None: a cost that was not measured must not keep a model out."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return value
    return [_finite(item) for item in value]
