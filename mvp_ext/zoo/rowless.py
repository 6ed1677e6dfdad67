"""Zoos of older versions: their entries' class means and their shared models have no rows in the index yet."""

from __future__ import annotations

import contextlib
from typing import Any

from mvp_ext.zoo.files import BadFile, is_regular
from mvp_ext.zoo.index import SCHEMA_VERSION, Index, ZooError
from mvp_ext.zoo.layout import ROWLESS_MODELS, Layout
from mvp_ext.zoo.rows import means_row, read_means, read_row


def adopt(layout: Layout, index: Index, version: int) -> None:
    """Give them rows, in one transaction. What cannot be read stays without; ``Zoo.verify`` names it."""
    means, models = [], []
    for row in index.without_means():
        with contextlib.suppress(OSError, ValueError, BadFile):
            if is_regular(path := layout.of_entry(row)):
                means.append({**row, **means_row(read_means(path))})
    for name in rowless_models(layout, index):
        with contextlib.suppress(ZooError):
            models.append(model_row(layout, name))
    if version < SCHEMA_VERSION or means or models:
        index.adopt(means, models)


def rowless_models(layout: Layout, index: Index) -> list[str]:
    """Names of the shared models that lie there and have no row."""
    found = [name for name in ROWLESS_MODELS if is_regular(layout.root / f"{name}.safetensors")]
    known = {row["name"] for row in index.models()} if found else set()
    return [name for name in found if name not in known]


def model_row(layout: Layout, name: str) -> dict[str, Any]:
    """The row that such a model would have; ZooError where its file cannot be read."""
    path = layout.root / f"{name}.safetensors"
    try:
        row, _ = read_row(path)
    except BadFile as error:
        raise ZooError(f"zoo {layout.root}: model {name!r}: {path}: {error}") from error
    return {**row, "name": name, "file": path.name}
