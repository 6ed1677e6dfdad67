"""What lies at a zoo's URL. Every name but two says what its file's bytes are, so that no snapshot spoils another.

    zoo.json                     the manifest of the latest snapshot: small, put in place last
    README.md                    the card, for people
    files/<sha256>.safetensors   models
    files/<sha256>.sqlite        the index: what the zoo knows of them

A manifest is data of others: it is taken only where all of it is what a push writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mvp_ext.zoo.entry import SharedModel, StoredModel, ZooEntry
from mvp_ext.zoo.files import BadFile
from mvp_ext.zoo.index import ENTRY_COLUMNS, FILE_COLUMNS, MEANS_COLUMNS, Index, ZooError
from mvp_ext.zoo.layout import Layout
from mvp_ext.zoo.rows import DAMAGED_ROW, entry_of, json_of, means_of, model_of

MANIFEST = "zoo.json"
FORMAT, VERSION = "mvp_ext zoo", 1
_TABLES = {"entry": "entries", "model": "models"}
# Which model, with which bytes
Key = tuple[str, str, str]


class Content(NamedTuple):
    """The bytes of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Item:
    """A model of a zoo: an "entry", or a "model" that the entries share; ``file`` as its row says it."""

    kind: str
    name: str
    file: str
    content: Content

    @property
    def key(self) -> Key:
        return self.kind, self.name, self.content.sha256

    @property
    def remote(self) -> str:
        """Where it lies below the URL."""
        return f"files/{self.content.sha256}.safetensors"

    def path(self, layout: Layout) -> Path:
        """Its file in a zoo's directory; BadFile where that would lie outside of its folders."""
        row = {"file": self.file}
        return layout.of_entry(row) if self.kind == "entry" else layout.of_model(row)

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


@dataclass(frozen=True)
class Manifest:
    """One snapshot of a zoo: its index and its models, by their content."""

    index: Content
    items: tuple[Item, ...]

    @property
    def remote_index(self) -> str:
        """Where the index lies below the URL."""
        return f"files/{self.index.sha256}.sqlite"

    @property
    def keys(self) -> set[Key]:
        return {item.key for item in self.items}

    def to_bytes(self) -> bytes:
        """JSON; ``parse`` reads it."""
        tables: dict[str, list[dict[str, Any]]] = {table: [] for table in _TABLES.values()}
        for item in self.items:
            row = {"name": item.name, "file": item.file, **item.content._asdict()}
            tables[_TABLES[item.kind]].append(row)
        whole = {"format": FORMAT, "version": VERSION, "index": self.index._asdict(), **tables}
        return (json.dumps(whole, indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, source: str) -> Manifest:
        """The inverse of ``to_bytes``; ZooError, naming ``source``, of anything else."""
        try:
            whole = json.loads(data)
            if not isinstance(whole, dict) or whole.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT!r}")
            if not isinstance(whole["version"], int):
                raise TypeError("version: expected a number")
            if whole["version"] > VERSION:
                raise ValueError(f"version {whole['version']} is newer than this mvp_ext reads ({VERSION})")
            items = tuple(_item(kind, row) for kind, table in _TABLES.items() for row in whole[table])
            layout = Layout(Path("zoo"))
            paths = {item.path(layout) for item in items}
            if len(paths) < len(items) or len({(item.kind, item.name) for item in items}) < len(items):
                raise ValueError("two models have one name or file")
            return cls(_content(whole["index"]), items)
        except (BadFile, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ZooError(f"{source}: expected the manifest of a zoo, got another file ({error})") from error


def _item(kind: str, row: Any) -> Item:
    name, file = row["name"], row["file"]
    for text in (name, file):
        if not isinstance(text, str) or not text:
            raise TypeError(f"expected a name, got {text!r}")
        # What is no Unicode can be neither printed nor a file's name.
        text.encode()
    return Item(kind, name, file, _content(row))


def _content(row: Any) -> Content:
    sha256, size = row["sha256"], row["bytes"]
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise TypeError(f"expected a SHA-256, got {sha256!r}")
    if type(size) is not int or size < 0:
        raise TypeError(f"expected a number of bytes, got {size!r}")
    return Content(sha256, size)


# ---- an index


class Described(NamedTuple):
    """All that an index says, each row read."""

    items: tuple[Item, ...]
    entries: tuple[ZooEntry, ...]
    models: tuple[SharedModel, ...]
    facts: dict[str, Any]


def describe(index: Index, layout: Layout) -> Described:
    """What an index says of a zoo in that directory; no file is read that has a row of today's schema.

    Raises:
        ZooError: SQLite or a row finds it damaged.
    """
    if index.version() == 0 or index.problems():
        raise ZooError(f"{index.path}: the index is damaged")
    facts = {}
    items, entries, models = [], [], []
    row: Mapping[str, Any] = {}
    try:
        for key, value in index.facts().items():
            facts[key] = json_of(value)
        for row in index.rows((*ENTRY_COLUMNS, *MEANS_COLUMNS)):
            items.append(item := _item("entry", row))
            entries.append(entry_of(row, path := item.path(layout)))
            means_of(row, path)
            _check_backbone(entries[-1], row["zoo_fingerprint"])
        known = index.meta().get("structure_fingerprint")
        for row in index.models():
            items.append(item := _item("model", row))
            models.append(model_of(row, item.path(layout)))
            _check_backbone(models[-1], known)
    except (BadFile, *DAMAGED_ROW) as error:
        whose = f"the row of {row['name']!r}" if row else "a fact"
        raise ZooError(
            f"{index.path}: {whose} cannot be read ({error}); `mvp-ext zoo verify --repair` mends a zoo"
        ) from error
    return Described(tuple(items), tuple(entries), tuple(models), facts)


def _check_backbone(model: StoredModel, known: str | None) -> None:
    if known not in (None, model.structure_fingerprint):
        raise ValueError(f"structure fingerprint: expected {known}, got {model.structure_fingerprint}")


def keys_of(index: Index) -> set[Key]:
    """Which models an index has, whether their rows can be read or not."""
    entries = [("entry", row) for row in index.rows(FILE_COLUMNS)]
    models = [("model", row) for row in index.models()]
    return {(kind, str(row["name"]), str(row["sha256"])) for kind, row in entries + models}
