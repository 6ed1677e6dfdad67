"""The zoo: pruned models of earlier tasks, kept in one directory.

    zoo/index.sqlite                        what there is: masks, tasks, class means, accuracies, checksums, facts
    zoo/entries/<name>-<token>.safetensors  weights, normalisation statistics, head, class means, scores
    zoo/shared/<name>-<token>.safetensors   models of all tasks: what the entries started from, controls
    zoo/.lock                               held shared while a model is added, exclusive while strays are removed

Questions are answered from the index; a model's file is read, and its checksum compared, once its weights are wanted.

A file is written whole under a name of its own before the one transaction that makes it a model of the zoo. So a kill,
a full disk or a power cut at any moment leaves a readable zoo, at worst with a stray file that `verify` names, and any
number of processes can add at once. No weights are used whose bytes are not those that were written.

Each file also says what its row does: an index that is lost or damaged is made again from them. A zoo that may only be
read answers all the same. What lies in its directory is data of others: see ``files.py``.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import save_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.structure import Structure
from mvp_ext.train.backbone import BackboneIdentity
from mvp_ext.zoo.entry import RECORD, ClassMeans, NewEntry, SharedModel, ZooEntry, ZooProblem
from mvp_ext.zoo.files import BadFile, check_size, remove_file
from mvp_ext.zoo.index import FILE_COLUMNS, MEANS_COLUMNS, DamagedIndexError, Index, ZooError
from mvp_ext.zoo.layout import ROWLESS_MODELS, Layout
from mvp_ext.zoo.rebuild import holds_models, rebuild, rebuilt_elsewhere
from mvp_ext.zoo.rowless import adopt, model_row, rowless_models
from mvp_ext.zoo.rows import (
    DAMAGED_ROW,
    entry_of,
    entry_row,
    file_name,
    json_of,
    means_of,
    model_of,
    timestamp,
    to_json,
)
from mvp_ext.zoo.verify import find_problems, repaired

__all__ = ["BackboneIdentity", "NewEntry", "SharedModel", "Zoo", "ZooEntry", "ZooError", "ZooProblem"]

T = TypeVar("T")


class Zoo:
    """A directory of pruned models; safe with several processes adding and reading at once.

    Args:
        path: the directory.
        create: make it where there is none; an existing directory must be empty or a zoo. A zoo of an older version is
            then brought up to date, if it may be written; otherwise it is read as it is.
        backbone: the dense model's identity; recorded in a zoo that has none, otherwise compared.

    An index that is gone or damaged is made again from the files of the models, which a warning says; of a zoo that may
    not be written for this process alone.

    Raises:
        ZooError: no zoo there (``create=False``), a directory that is something else, a newer index, a folder or index
            that is a link, another backbone.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, create: bool = True, backbone: BackboneIdentity | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        self._layout = Layout(self.path)
        self._layout.check()
        self._index = Index(self._layout.index)
        version = self._version()
        if version == 0:
            if not create:
                raise ZooError(f"no zoo at {self.path}; build one first (mvp-ext zoo build)")
            self._create()
        elif create and self._index.writable():
            adopt(self._layout, self._index, version)
        if backbone is not None:
            self.bind(backbone)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it where it lies."""
        return partial(Zoo, create=False), (os.path.abspath(self.path),)

    def _version(self) -> int:
        """Of the index, which is made again where it is damaged, or gone while models are there."""
        try:
            version, damage = self._index.version(), "is gone"
        except DamagedIndexError as error:
            if not self._layout.entries.is_dir():
                raise
            version, damage = 0, f"is damaged ({error})"
        if version or not (damage != "is gone" or holds_models(self._layout)):
            return version
        if self._index.writable():
            count, where = rebuild(self._layout, self._index), "again"
        else:
            self._index, count = rebuilt_elsewhere(self._layout, self._index)
            where = "for this process, as the zoo may not be written,"
        warnings.warn(
            f"zoo {self.path}: its index {damage}; it was made {where} from the files of {count} entries",
            stacklevel=3,
        )
        return self._index.version()

    def _create(self) -> None:
        try:
            self._layout.create()
            with self._layout.lock(exclusive=True):
                if self._index.version() == 0:  # another process may have been first
                    self._index.create()
        except OSError as error:
            raise ZooError(f"{self.path}: no zoo can be made here ({error})") from error

    # ---- of the zoo as a whole

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

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How the models of this zoo see images; None where nobody said."""
        stored = self.facts().get("preprocessing")
        try:
            return None if stored is None else Preprocessing.from_dict(stored)
        except ValueError as error:
            raise ZooError(f"zoo {self.path}: what it says of preprocessing is damaged ({error})") from error

    def bind_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Record how the models of this zoo see images, or compare it with what is recorded (ZooError)."""
        if self.preprocessing is None:
            self.record_facts(preprocessing=preprocessing)
        self.check_preprocessing(preprocessing)

    def check_preprocessing(self, preprocessing: Preprocessing) -> None:
        """ZooError where the zoo's models see images otherwise; where nobody said, any fits. Records nothing."""
        known = self.preprocessing
        if known is not None and known != preprocessing:
            raise ZooError(
                f"zoo {self.path}: its models see images as {known}, the given one as {preprocessing}: leave image "
                "size, mean and std out to see them as the zoo does, or use another zoo"
            )

    def facts(self) -> dict[str, Any]:
        """What ``record_facts`` recorded; ZooError where that is damaged."""
        found = {}
        for key, value in self._index.facts().items():
            try:
                found[key] = json_of(value)
            except ValueError as error:
                raise ZooError(
                    f"zoo {self.path}: fact {key!r} is damaged ({error}); `mvp-ext zoo verify --repair` restores it"
                ) from error
        return found

    def record_facts(self, **facts: Any) -> None:
        """Record JSON values (or dataclasses of them) of the zoo, each in place of what its key had.

        Raises:
            ValueError: a value is not JSON; nothing is recorded then.
        """
        self._index.record_facts({key: to_json(value, f"fact {key!r}") for key, value in facts.items()})

    def __repr__(self) -> str:
        return f"Zoo({str(self.path)!r})"

    # ---- entries

    def entries(self, fingerprint: str | None = None, names: Sequence[str] | None = None) -> list[ZooEntry]:
        """All usable entries, by name. Those whose file is missing or cut short are left out, each with a warning.

        No file is read: that a file's bytes are not those that were added is found by ``ZooEntry.read``.

        Args:
            fingerprint: the structure that the entries must have; ZooError (expected, got) where one has another.
            names: only those of these entries that there are.
        """
        return list(self._usable(self._index.rows(names=names), fingerprint, entry_of))

    def class_means(self, fingerprint: str | None = None) -> list[ClassMeans]:
        """What is known of the usable entries' tasks, by name: all that finding a task's neighbours takes.

        Entries that were added without class means are not among them.
        """
        rows = self._index.rows((*FILE_COLUMNS, "architecture", *MEANS_COLUMNS))
        return [known for known in self._usable(rows, fingerprint, means_of) if known is not None]

    def __getitem__(self, name: str) -> ZooEntry:
        """The entry of that name; ZooError where there is none or it is not usable."""
        rows = self._index.rows(names=[name])
        if not rows:
            near = difflib.get_close_matches(
                name, [str(row["name"]) for row in self._index.rows(("name",))], n=3
            )
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ZooError(f"zoo {self.path}: no entry {name!r}{hint}")
        entry = self._described(rows[0], entry_of)
        if isinstance(entry, ZooProblem):
            raise ZooError(f"zoo {self.path}: {entry}")
        return entry

    def __contains__(self, name: object) -> bool:
        """Whether there is a usable entry of that name, as far as can be seen without reading its file."""
        rows = self._index.rows(names=[name]) if isinstance(name, str) else []
        return any(isinstance(self._described(row, entry_of), ZooEntry) for row in rows)

    def is_sound(self, name: str) -> bool:
        """Whether there is such an entry and its file has the bytes that were added; that is read once a process.

        For builders: what is damaged is to be built again.
        """
        return name in self and self[name].is_sound()

    def __len__(self) -> int:
        """The number of usable entries."""
        return sum(isinstance(self._described(row, entry_of), ZooEntry) for row in self._index.rows())

    def __iter__(self) -> Iterator[ZooEntry]:
        return iter(self.entries())

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

    def _usable(
        self, rows: list[dict[str, Any]], fingerprint: str | None, of: Callable[[Mapping[str, Any], Path], T]
    ) -> Iterator[T]:
        for row in rows:
            described = self._described(row, of)
            if isinstance(described, ZooProblem):
                warnings.warn(f"zoo {self.path}: skipped {described}", stacklevel=4)
                continue
            if fingerprint is not None and row["structure_fingerprint"] != fingerprint:
                raise ZooError(
                    f"zoo {self.path}: entry {row['name']!r} is of another backbone: expected structure fingerprint "
                    f"{fingerprint}, got {row['structure_fingerprint']} ({row['architecture']})"
                )
            yield described

    def _described(
        self, row: Mapping[str, Any], of: Callable[[Mapping[str, Any], Path], T]
    ) -> T | ZooProblem:
        """What ``of`` makes of an entry's row, if its file is there."""
        path = self._index.path
        try:
            path = self._layout.of_entry(row)
            check_size(path, row["bytes"])
            if row["zoo_fingerprint"] not in (None, row["structure_fingerprint"]):
                raise ValueError(
                    f"structure fingerprint: expected the zoo's, {row['zoo_fingerprint']}, got "
                    f"{row['structure_fingerprint']!r}"
                )
            return of(row, path)
        except BadFile as problem:
            return ZooProblem(problem.kind, path, str(problem), row["name"])
        except DAMAGED_ROW as error:
            message = f"its row cannot be read ({error})"
            return ZooProblem("damaged", self._index.path, message, row["name"])

    # ---- adding and removing

    def add(self, result: Any, *, replace: bool = False, if_absent: bool = False) -> ZooEntry:
        """Add a result of pruning under its task's name (see ``NewEntry.of``); otherwise as ``add_model``."""
        return self.add_model(NewEntry.of(result), replace=replace, if_absent=if_absent)

    def add_model(self, new: NewEntry, *, replace: bool = False, if_absent: bool = False) -> ZooEntry:
        """Add a pruned model; when this returns, it is on the disk and every reader sees it.

        Args:
            replace: whether an entry of that name is replaced. A damaged one always is.
            if_absent: keep and return an existing entry of that name, for builds that are resumed or shared.

        Raises:
            ZooError: the name is taken, the structure or the preprocessing is another than the zoo's, the disk is full.
                The zoo is then as it was before.
            ValueError: the task or the cost are no JSON values, or ``save_pruned`` refuses the model.
        """
        name = new.name
        old = next(iter(self._index.rows(("file",), names=[name])), None)
        if old is not None and not replace and self.is_sound(name):
            if if_absent:
                return self[name]
            raise ZooError(f"zoo {self.path}: there already is an entry {name!r}; replace=True replaces it")
        row = entry_row(new)
        extra: dict[str, Any] = {key: value.detach() for key, value in (new.tensors or {}).items()}
        backbone = _backbone_of(new.structure)
        self._index.check(backbone)  # before the work of writing weights; again when the row goes in
        seen = None if new.card is None else new.card.preprocessing
        if seen is not None:
            self.check_preprocessing(seen)
        replacing = old["file"] if old else None
        extra[RECORD] = {
            **{key: row[key] for key in ("name", "accuracy", "steps")},
            **{key: json.loads(row[key]) for key in ("task", "cost")},
            **self._record_of_zoo(seen),
        }
        with self._layout.writing(self._layout.of_entry(row), f"entry {name!r}") as file:
            save_pruned(
                new.model, file.path, mask=new.mask, structure=new.structure, card=new.card, extra=extra
            )
            file.used = self._index.insert({**row, **file.facts()}, backbone, replacing=replacing)
        if not file.used:  # another process took the name while this one was writing
            if if_absent:
                return self[name]
            raise ZooError(f"zoo {self.path}: another process just added an entry {name!r}")
        if seen is not None:
            self.bind_preprocessing(seen)
        if old is not None:
            self._layout.remove_entry(old)
        return self[name]

    def _record_of_zoo(self, seen: Preprocessing | None) -> dict[str, Any]:
        """What a model's file says of the zoo, for an index that is lost."""
        facts = self.facts()
        if seen is not None:
            facts["preprocessing"] = seen.to_dict()
        return {"backbone": self._index.meta(), "facts": facts}

    def remove(self, name: str) -> None:
        """Remove an entry, usable or not; ZooError where there is none of that name."""
        rows = self._index.rows(("file",), names=[name])
        if not rows or not self._index.delete(name, rows[0]["file"]):
            raise ZooError(f"zoo {self.path}: no entry {name!r}")
        self._layout.remove_entry(rows[0])

    # ---- models that the entries share

    def shared(self, name: str) -> SharedModel | None:
        """The shared model of that name, described without reading its file; None where there is none.

        Raises:
            ZooError: its description is damaged.
        """
        rows = [row for row in self._index.models() if row["name"] == name]
        if not rows and name in rowless_models(self._layout, self._index):
            rows = [model_row(self._layout, name)]
        return self._shared_of(rows[0]) if rows else None

    def save_shared(
        self,
        name: str,
        model: nn.Module,
        mask: Mask,
        structure: Structure,
        extra: Mapping[str, Any] | None = None,
        *,
        card: ModelCard | None = None,
        if_absent: bool = False,
    ) -> SharedModel:
        """Keep a model beside the entries, in place of the one of that name; when this returns, it is on the disk.

        Args:
            name: "start" is what the zoo's entries started from; others are controls. ``extra``: JSON values.
            card: what its file says of it beside its weights.
            if_absent: keep and return an existing one of that name, for builds that are resumed or shared.

        Raises:
            ZooError: the structure is another than the zoo's, the disk is full. The zoo is then as it was before.
            ValueError: ``extra`` is not JSON, or the model is not what the mask leaves.
        """
        backbone = _backbone_of(structure)
        row = {
            "name": name,
            "file": f"{self._layout.shared.name}/{file_name(name)}",
            "structure_fingerprint": structure.fingerprint,
            "extra": to_json(dict(extra or {}), f"shared model {name!r}: extra"),
            "created": timestamp(),
        }
        self._index.check(backbone)
        with self._layout.writing(self._layout.of_model(row), f"model {name!r}") as file:
            recorded = {**(extra or {}), RECORD: {"name": name, **self._record_of_zoo(None)}}
            save_pruned(model, file.path, mask=mask, structure=structure, card=card, extra=recorded)
            old = self._index.put_model({**row, **file.facts()}, backbone, if_absent=if_absent)
            file.used = old != row["file"]
        if not file.used:
            return self._shared_of(next(each for each in self._index.models() if each["name"] == name))
        if old is not None:
            self._layout.remove_model({"file": old})
        if name in ROWLESS_MODELS:
            remove_file(self.path / f"{name}.safetensors")
        return self._shared_of({**row, **file.facts()})

    def _shared_of(self, row: Mapping[str, Any]) -> SharedModel:
        try:
            return model_of(row, self._layout.of_model(row))
        except (BadFile, *DAMAGED_ROW) as error:
            raise ZooError(
                f"{self._index.path}: model {row['name']!r}: its row cannot be read ({error})"
            ) from error

    # ---- soundness

    def verify(self, *, repair: bool = False) -> list[ZooProblem]:
        """Check the index and read every file; returns what is wrong (empty: sound).

        Args:
            repair: also mend it. An index or a row that is damaged is made again from the files of the models; stray
                files are removed, and models whose file is damaged or gone, so that a build makes them again. Waits for
                models that are just being added.

        Files of models that another process is adding at this moment are not called stray.

        Raises:
            ZooError: with ``repair``, where the zoo may not be written.
        """
        if repair and not self._index.writable():
            raise ZooError(f"zoo {self.path}: it cannot be repaired: it may not be written")
        if self._index.path != self._layout.index:
            lost = "gone or damaged; this process reads one made from the entries"
            return [ZooProblem("index", self._layout.index, lost), *find_problems(self._layout, self._index)]
        return repaired(self._layout, self._index) if repair else find_problems(self._layout, self._index)


def _backbone_of(structure: Structure) -> dict[str, str]:
    return BackboneIdentity(structure.architecture, structure.fingerprint).to_meta()
