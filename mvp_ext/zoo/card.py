"""A zoo's card: the page that people read at the URL of a zoo before they pull it."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from mvp_ext.zoo.manifest import Described

# Of more classes the first are named.
NAMED_CLASSES = 10


def zoo_card(zoo: Described, url: str, meta: dict[str, str]) -> str:
    """Markdown: backbone, preprocessing, settings, every entry with its accuracy, sizes, and how to pull it.

    The same of the same zoo: a card does not say when it was written.

    Args:
        zoo: what its index says.
        url: where it lies.
        meta: what is recorded of its backbone.
    """
    sizes = {item.key: item.content.bytes for item in zoo.items}
    facts = {
        "backbone": meta.get("architecture", "unknown"),
        "structure": meta.get("structure_fingerprint", "unknown"),
        "weights (SHA-256)": meta.get("weights_sha256", "unknown"),
        "entries": len(zoo.entries),
        "size": _size(sum(sizes.values())),
    }
    known = [entry.accuracy for entry in zoo.entries if entry.accuracy is not None]
    if known:
        facts["mean accuracy"] = f"{100 * sum(known) / len(known):.1f} %"
    parts = [
        "---\nlibrary_name: mvp_ext\ntags: [pruning, image-classification]\n---",
        f"# A zoo of pruned models of {_cell(facts['backbone'])}",
        f"```bash\nmvp-ext zoo pull {shlex.quote(url)} zoo\n```",
        _table(("", ""), facts.items()),
    ]
    for title, key in (("Preprocessing", "preprocessing"), ("Settings", "settings")):
        if isinstance(said := zoo.facts.get(key), dict):
            parts += [f"## {title}", _table(("", ""), said.items())]
    rows = [
        (
            *(entry.name, _classes(entry.task.get("classes", ())), f"{entry.keep:.2f}"),
            "" if entry.accuracy is None else f"{100 * entry.accuracy:.1f}",
            *(entry.steps, _size(sizes["entry", entry.name, entry.sha256])),
        )
        for entry in zoo.entries
    ]
    parts += ["## Entries", _table(("entry", "classes", "keep", "accuracy (%)", "steps", "size"), rows)]
    if zoo.models:
        shared = [(model.name, _size(sizes["model", model.name, model.sha256])) for model in zoo.models]
        parts += ["## Models that the entries share", _table(("model", "size"), shared)]
    return "\n\n".join(parts) + "\n"


def _classes(classes: Sequence[Any]) -> str:
    more = f" and {len(classes) - NAMED_CLASSES} more" if len(classes) > NAMED_CLASSES else ""
    return ", ".join(map(str, classes[:NAMED_CLASSES])) + more


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    """Names are data: none of them ends a cell, a line, or begins a tag or a link."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|" else c for c in text if c.isprintable())
