"""What is wrong with a zoo: every file is read again, and compared with what the index says of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mvp_ext.model.checkpoint import PrunedState, parse_pruned
from mvp_ext.zoo.entry import ZooProblem
from mvp_ext.zoo.files import BadFile, check_size, forget, read_sound
from mvp_ext.zoo.index import ENTRY_COLUMNS, MEANS_COLUMNS, Index, ZooError
from mvp_ext.zoo.layout import Layout, remove_file
from mvp_ext.zoo.rowless import model_row, rowless_models
from mvp_ext.zoo.rows import DAMAGED_ROW, entry_of, means_row, model_of


def find_problems(layout: Layout, index: Index, *, repair: bool) -> list[ZooProblem]:
    """See ``Zoo.verify``."""
    problems = [ZooProblem("index", index.path, line) for line in index.problems()]
    for row in index.rows((*ENTRY_COLUMNS, *MEANS_COLUMNS)):
        if problem := _problem(index, row, layout.of_entry(row), _check_entry):
            problems.append(replace(problem, entry=row["name"]))
            if repair:
                index.delete(row["name"], row["file"])
                remove_file(layout.of_entry(row))
    for row in index.models():
        if problem := _problem(index, row, layout.of_model(row), _check_model):
            problems.append(replace(problem, model=row["name"]))
            if repair:
                index.delete(row["name"], row["file"], "models")
                remove_file(layout.of_model(row))
    for name in rowless_models(layout, index):
        path = layout.root / f"{name}.safetensors"
        try:
            model_row(layout, name)
        except ZooError as error:
            problems.append(ZooProblem("damaged", path, str(error), model=name))
            if repair:
                remove_file(path)
    return problems + _strays(layout, index, repair)


def _problem(
    index: Index, row: Mapping[str, Any], path: Path, check: Callable[[Mapping[str, Any], Path], None]
) -> ZooProblem | None:
    # Somebody asks because they doubt: what was found right before is read again.
    forget(path)
    try:
        check_size(path, row["bytes"])
        check(row, path)
    except BadFile as error:
        return ZooProblem(error.kind, path, str(error))
    except DAMAGED_ROW as error:
        return ZooProblem("damaged", index.path, f"its row cannot be read, or is not its file's ({error})")
    return None


def _check_entry(row: Mapping[str, Any], path: Path) -> None:
    stored = _sound_state(row, path)
    if entry_of(row, path).mask != stored.mask:
        raise ValueError("the mask is another")
    written = means_row(stored.extra)
    if row["class_count"] is not None and any(row[key] != value for key, value in written.items()):
        raise ValueError("the class means are others")


def _check_model(row: Mapping[str, Any], path: Path) -> None:
    _sound_state(row, path)
    model_of(row, path)


def _sound_state(row: Mapping[str, Any], path: Path) -> PrunedState:
    stored = parse_pruned(read_sound(path, row["sha256"]), source=os.fspath(path))
    # Older versions took them; a vote of such an entry is lost.
    for name, tensor in stored.state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadFile("damaged", f"its weights {name} are not finite")
    return stored


def _strays(layout: Layout, index: Index, repair: bool) -> list[ZooProblem]:
    problems = []
    # Alone, no writer is between its file and its row, so a file without a row is nobody's.
    with layout.lock(exclusive=True, wait=repair) as alone:
        known = {layout.of_entry(row) for row in index.rows(("file",))}
        known |= {layout.of_model(row) for row in index.models()}
        for folder in (layout.entries, layout.shared) if alone else ():
            for path in sorted(folder.iterdir()) if folder.exists() else ():
                if path not in known and path.is_file():
                    problems.append(ZooProblem("stray", path, "no model's file, left by a stopped writer"))
                    if repair:
                        path.unlink(missing_ok=True)
    return problems
