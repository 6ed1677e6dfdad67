"""Zoos of older versions: their entries' class means and their shared models have no rows in the index yet."""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import Any

from torch import Tensor

from mvp_ext.model.checkpoint import parse_pruned
from mvp_ext.zoo.index import SCHEMA_VERSION, Index, ZooError
from mvp_ext.zoo.layout import Layout
from mvp_ext.zoo.rows import means_row, read_means, timestamp, to_json

# Names of shared models that may lie in the zoo's directory as <name>.safetensors.
ROWLESS_MODELS = ("start", "universal")


def adopt(layout: Layout, index: Index, version: int) -> None:
    """Give them rows, in one transaction. What cannot be read stays without; ``Zoo.verify`` names it."""
    means, models = [], []
    for row in index.without_means():
        with contextlib.suppress(OSError, ValueError):
            means.append({**row, **means_row(read_means(layout.of_entry(row)))})
    for name in rowless_models(layout, index):
        with contextlib.suppress(ZooError):
            models.append(model_row(layout, name))
    if version < SCHEMA_VERSION or means or models:
        index.adopt(means, models)


def rowless_models(layout: Layout, index: Index) -> list[str]:
    """Names of the shared models that lie there and have no row."""
    found = [name for name in ROWLESS_MODELS if (layout.root / f"{name}.safetensors").is_file()]
    known = {row["name"] for row in index.models()} if found else set()
    return [name for name in found if name not in known]


def model_row(layout: Layout, name: str) -> dict[str, Any]:
    """The row that such a model would have; ZooError where its file cannot be read."""
    path = layout.root / f"{name}.safetensors"
    try:
        data = path.read_bytes()
        stored = parse_pruned(data, source=os.fspath(path))
    except (OSError, ValueError) as error:
        raise ZooError(f"zoo {layout.root}: model {name!r}: {error}") from error
    extra = {key: value for key, value in stored.extra.items() if not isinstance(value, Tensor)}
    return {
        "name": name,
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "structure_fingerprint": stored.structure.fingerprint,
        "extra": to_json(extra, f"{path}: extra"),
        "created": timestamp(),
    }
