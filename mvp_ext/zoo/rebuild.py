"""A lost or damaged index, made again from the files of the zoo's models: each holds what its row says."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mvp_ext.storage import PART
from mvp_ext.zoo.files import BadFile, regular_files
from mvp_ext.zoo.index import DamagedIndexError, Index, ZooError
from mvp_ext.zoo.layout import Layout
from mvp_ext.zoo.rowless import adopt
from mvp_ext.zoo.rows import json_of, read_row


def holds_models(layout: Layout) -> bool:
    """Whether there is a whole entry or shared model in the zoo's folders, whatever the index says."""
    for folder in (layout.entries, layout.shared):
        for path in regular_files(folder):
            with contextlib.suppress(BadFile):
                read_row(path)
                return True
    return False


def rebuild(layout: Layout, index: Index, *, force: bool = False) -> int:
    """Make the index again, in place of what is there; that stays as ``index.sqlite.damaged``.

    Args:
        force: also where SQLite finds nothing wrong with it, which another process may just have made.

    Returns:
        The number of entries.

    Raises:
        ZooError: the zoo may not be written.
    """
    with layout.lock(exclusive=True):
        with contextlib.suppress(DamagedIndexError):
            if not force and index.version() and not index.problems():
                return len(index.rows(("name",)))
        draft = layout.root / f".{layout.index.name}.{os.getpid()}{PART}"
        with contextlib.suppress(OSError):
            draft.unlink()
        try:
            count = _fill(layout, Index(draft), index)
            if layout.index.exists():
                os.replace(layout.index, layout.spoilt)
            # They are the old one's, and SQLite would put them into the new one.
            for path in layout.beside_index:
                path.unlink(missing_ok=True)
            os.replace(draft, layout.index)
        except OSError as error:
            raise ZooError(f"zoo {layout.root}: its index cannot be made again ({error})") from error
        finally:
            for path in layout.root.glob(f"{draft.name}*"):
                path.unlink(missing_ok=True)
    return count


def rebuilt_elsewhere(layout: Layout, index: Index) -> tuple[Index, int]:
    """The index of a zoo that may not be written, made again outside of it, for as long as this process needs it."""
    folder = Path(tempfile.mkdtemp(prefix="mvp_ext-index-"))
    made = Index(folder / layout.index.name)
    count = _fill(layout, made, index)
    # The folder goes with the index that is read in it.
    return Index(made.path, kept_in=folder), count


def _fill(layout: Layout, made: Index, old: Index) -> int:
    """Rows of every whole model; of two with one name the later. What ``old`` alone knows of the zoo is taken over."""
    made.create()
    found: list[tuple[float, dict[str, Any], dict[str, Any]]] = []
    for folder in (layout.entries, layout.shared):
        for path in regular_files(folder):
            # What is no whole model stays where it is, and is named as a stray.
            with contextlib.suppress(BadFile, OSError):
                found.append((path.lstat().st_mtime, *read_row(path)))
    facts: dict[str, str] = {}
    for _, row, said in sorted(found, key=lambda each: -each[0]):
        facts = {key: json.dumps(value) for key, value in said["facts"].items()} | facts
        known = {key: row.get(key) for key in ("architecture", "structure_fingerprint")}
        backbone = {key: str(value) for key, value in {**said["backbone"], **known}.items() if value}
        # One of another backbone than the latest is none of this zoo's.
        with contextlib.suppress(ZooError):
            if "task" in row:
                made.insert(row, backbone, replacing=None)
            elif row["name"] not in {model["name"] for model in made.models()}:
                made.put_model(row, backbone)
    adopt(layout, made, made.version())
    for key, value in _salvaged_facts(old).items():
        facts.setdefault(key, value)
    made.record_facts(facts)
    with contextlib.suppress(ZooError, ValueError):
        made.record(old.meta())
    return len(made.rows(("name",)))


def _salvaged_facts(old: Index) -> dict[str, str]:
    found = {}
    with contextlib.suppress(ZooError):
        for key, value in old.facts().items():
            with contextlib.suppress(ValueError):
                json_of(value)
                found[key] = value
    return found
