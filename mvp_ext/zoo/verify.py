"""What is wrong with a zoo, and how it is mended: every file is read again and compared with what the index says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mvp_ext.zoo.entry import RECORD, ZooProblem
from mvp_ext.zoo.files import BadFile, check_size, files_in, forget, read_sound, remove_file
from mvp_ext.zoo.index import ENTRY_COLUMNS, MEANS_COLUMNS, DamagedIndexError, Index, ZooError
from mvp_ext.zoo.layout import Layout
from mvp_ext.zoo.rebuild import rebuild
from mvp_ext.zoo.rowless import model_row, rowless_models
from mvp_ext.zoo.rows import DAMAGED_ROW, entry_of, json_of, model_of, read_row, row_of_file, sound_state

# Columns that a file knows as well as the row, where it has a record of it. Masks and class means are always known.
_RECORDED = ("name", "architecture", "task", "accuracy", "steps", "cost")


def find_problems(layout: Layout, index: Index) -> list[ZooProblem]:
    """See ``Zoo.verify``; nothing is changed."""
    try:
        problems = [*_of_index(index), *(bad.problem for bad in _bad_rows(layout, index))]
        return problems + _bad_rowless(layout, index) + _strays(layout, index)
    except DamagedIndexError as error:
        return [ZooProblem("index", index.path, str(error))]


def repaired(layout: Layout, index: Index) -> list[ZooProblem]:
    """See ``Zoo.verify``: what was wrong, and is so no more."""
    try:
        if not (problems := _of_index(index)):
            return _mended(layout, index)
    except DamagedIndexError as error:
        problems = [ZooProblem("index", index.path, str(error))]
    rebuild(layout, index, force=True)
    return problems + _mended(layout, index)


def _mended(layout: Layout, index: Index) -> list[ZooProblem]:
    """All but the index as a whole."""
    problems: list[ZooProblem] = []
    lost: set[str] = set()
    for bad in _bad_rows(layout, index):
        problems.append(bad.problem)
        if not index.delete(bad.row["name"], bad.row["file"], bad.table) and _is_there(index, bad):
            raise DamagedIndexError(f"{index.path}: the row of {bad.row['name']!r} cannot be removed")
        name = str(bad.row["name"])
        lost.add(name)
        # A whole file outlives its row, and gets another one.
        try:
            lost.add(read_row(_path(layout, bad.row, bad.table))[0]["name"])
        except BadFile:
            (layout.remove_entry if bad.table == "entries" else layout.remove_model)(bad.row)
        if bad.table == "models":
            _remember(index, name, bad.row)
    rowless = _bad_rowless(layout, index)
    for problem in rowless:
        remove_file(problem.path)
    return problems + rowless + _strays(layout, index, repair=True, lost=lost)


def _is_there(index: Index, bad: _BadRow) -> bool:
    rows = index.rows(("name", "file")) if bad.table == "entries" else index.models()
    return (bad.row["name"], bad.row["file"]) in [(row["name"], row["file"]) for row in rows]


# ---- the index as a whole


def _of_index(index: Index) -> list[ZooProblem]:
    """What is wrong with the index but for its rows; DamagedIndexError where it cannot be read at all."""
    found = index.problems()
    for key, value in index.facts().items():
        try:
            json_of(value)
        except ValueError as error:
            found.append(f"fact {key!r} cannot be read ({error})")
    rows = index.rows(("structure_fingerprint",))
    known = {row["structure_fingerprint"] for row in rows}
    if rows and rows[0]["zoo_fingerprint"] not in (None, *known):
        found.append(f"its backbone ({rows[0]['zoo_fingerprint']!r}) is that of no entry")
    return [ZooProblem("index", index.path, line) for line in found]


def _remember(index: Index, name: str, row: Mapping[str, Any]) -> None:
    """What a lost shared model was, so that a build can make it again."""
    with contextlib.suppress(ValueError):
        if isinstance(extra := json_of(row["extra"]), dict):
            index.record_facts({f"lost {name}": json.dumps(extra)})


# ---- rows


@dataclass(frozen=True)
class _BadRow:
    problem: ZooProblem
    row: Mapping[str, Any] = field(repr=False)
    table: str


def _bad_rows(layout: Layout, index: Index) -> list[_BadRow]:
    found = []
    meta, bound = index.meta(), None
    with contextlib.suppress(ValueError):
        bound = json_of(index.facts().get("preprocessing", "null"))

    def check_entry(row: Mapping[str, Any], path: Path) -> None:
        record = _check_entry(row, path)
        for key, value in record.get("backbone", {}).items():
            if meta.get(key, value) != value:
                raise DamagedIndexError(f"{index.path}: the backbone's {key} is not that of the entries")
        seen = record.get("facts", {}).get("preprocessing")
        if seen is not None and bound not in (None, seen):
            raise DamagedIndexError(f"{index.path}: the preprocessing is not that of the entries")

    checks = {"entries": check_entry, "models": _check_model}
    rows = {"entries": index.rows((*ENTRY_COLUMNS, *MEANS_COLUMNS)), "models": index.models()}
    for table, check in checks.items():
        for row in rows[table]:
            if problem := _problem(layout, index, row, table, check):
                whose = {"entry" if table == "entries" else "model": row["name"]}
                found.append(_BadRow(replace(problem, **whose), row, table))
    return found


def _path(layout: Layout, row: Mapping[str, Any], table: str) -> Path:
    return layout.of_entry(row) if table == "entries" else layout.of_model(row)


def _problem(
    layout: Layout,
    index: Index,
    row: Mapping[str, Any],
    table: str,
    check: Callable[[Mapping[str, Any], Path], None],
) -> ZooProblem | None:
    path = index.path
    try:
        path = _path(layout, row, table)
        # Somebody asks because they doubt: what was found right before is read again.
        forget(path)
        check_size(path, row["bytes"])
        check(row, path)
    except DamagedIndexError:
        raise
    except BadFile as error:
        return ZooProblem(error.kind, path, str(error))
    except DAMAGED_ROW as error:
        return ZooProblem("damaged", index.path, f"its row cannot be read, or is not its file's ({error})")
    return None


def _check_entry(row: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Returns what the file says of the zoo."""
    said, recorded = _of_file(row, path)
    if entry_of(row, path).mask != entry_of(said, path).mask:
        raise ValueError("the mask is another")
    if row["class_count"] is not None and any(row[key] != said[key] for key in MEANS_COLUMNS):
        raise ValueError("the class means are others")
    if row["zoo_fingerprint"] not in (None, said["structure_fingerprint"]):
        raise ValueError(f"structure fingerprint: expected {row['zoo_fingerprint']}, its file's is another")
    for key in ("structure_fingerprint", "keep", *(_RECORDED if recorded else ())):
        _check_same(key, row, said)
    return recorded


def _check_model(row: Mapping[str, Any], path: Path) -> None:
    said, recorded = _of_file(row, path)
    model_of(row, path)
    for key in ("structure_fingerprint", "extra", *(("name",) if recorded else ())):
        _check_same(key, row, said)


def _check_same(key: str, row: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    mine, theirs = row[key], said[key]
    if key in ("task", "cost", "extra"):
        mine, theirs = json_of(mine), json_of(theirs)
    if mine != theirs:
        raise ValueError(f"{key}: expected {theirs!r} as in the file, got {mine!r}")


def _of_file(row: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The row that the file says, and its record where it has one; BadFile where the file is not sound."""
    data = read_sound(path, row["sha256"])
    stored = sound_state(data)
    return row_of_file(path, data, stored), stored.extra.get(RECORD, {})


# ---- files without rows


def _bad_rowless(layout: Layout, index: Index) -> list[ZooProblem]:
    problems = []
    for name in rowless_models(layout, index):
        try:
            model_row(layout, name)
        except ZooError as error:
            path = layout.root / f"{name}.safetensors"
            problems.append(ZooProblem("damaged", path, str(error), model=name))
    return problems


def _strays(
    layout: Layout, index: Index, *, repair: bool = False, lost: frozenset[str] | set[str] = frozenset()
) -> list[ZooProblem]:
    """Files that no row names; with ``repair`` they go, but those of ``lost`` names get a row."""
    problems = []
    # Alone, no writer is between its file and its row, so a file without a row is nobody's.
    with layout.lock(exclusive=True, wait=repair) as alone:
        if not alone:
            return []
        known = set()
        rows = {"entries": index.rows(("file",)), "models": index.models()}
        for table, of_table in rows.items():
            for row in of_table:
                try:
                    known.add(_path(layout, row, table))
                except BadFile:
                    continue
        for folder in (layout.entries, layout.shared):
            for path in files_in(folder):
                if path in known or (lost and _adopted(index, path, lost)):
                    continue
                problems.append(ZooProblem("stray", path, "no model's file, left by a stopped writer"))
                if repair:
                    remove_file(path)
        for path in layout.abandoned(remove=repair):
            problems.append(ZooProblem("stray", path, "half a file, left by a stopped writer"))
    return problems


def _adopted(index: Index, path: Path, lost: frozenset[str] | set[str]) -> bool:
    """Whether a whole model's file got a row in place of the damaged one of its name."""
    try:
        row, _ = read_row(path)
        backbone = {"structure_fingerprint": row["structure_fingerprint"]}
        if row["name"] not in lost:
            return False
        if "task" in row:
            return index.insert(row, backbone, replacing=None)
        if any(model["name"] == row["name"] for model in index.models()):
            return False
        index.put_model(row, backbone)
        return True
    # Of another backbone than the zoo's.
    except (BadFile, ZooError):
        return False
