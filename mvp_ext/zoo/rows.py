"""What the index keeps of models: their rows from what is added, and back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_ext.model.checkpoint import PrunedState, parse_pruned, read_extra
from mvp_ext.model.mask import Mask
from mvp_ext.train.cost import Cost
from mvp_ext.zoo.entry import RECORD, ClassMeans, NewEntry, SharedModel, ZooEntry
from mvp_ext.zoo.files import BadFile, is_regular, read_regular
from mvp_ext.zoo.index import ENTRY_COLUMNS, MODEL_COLUMNS
from mvp_ext.zoo.layout import ROWLESS_MODELS

# What a row that was tampered with, or hit by a failing disk, can raise
DAMAGED_ROW = (ValueError, TypeError, RuntimeError, OSError, LookupError, AttributeError, OverflowError)


# Masks are values: entries that refine one model share theirs, and a process asks for the same ones again and again.
_mask_of = functools.lru_cache(maxsize=64)(Mask.from_bytes)


def entry_row(new: NewEntry) -> dict[str, Any]:
    """All but ``sha256`` and ``bytes``, which the written file says.

    Raises:
        ValueError: the task or the cost are no JSON values.
    """
    task = new.task.to_dict() if hasattr(new.task, "to_dict") else new.task
    return {
        "name": new.name,
        "file": file_name(new.name),
        "architecture": new.structure.architecture,
        "structure_fingerprint": new.structure.fingerprint,
        "mask": new.mask.to_bytes(),
        "task": to_json(task, "zoo.add: task"),
        "keep": new.mask.keep,
        "accuracy": None if new.accuracy is None else float(new.accuracy),
        "steps": int(new.steps),
        "cost": to_json({} if new.cost is None else new.cost, "zoo.add: cost"),
        "created": timestamp(),
        **means_row(new.tensors or {}),
    }


def entry_of(row: Mapping[str, Any], path: Path) -> ZooEntry:
    """The inverse of ``entry_row``; one of ``DAMAGED_ROW`` where the row is not what was written."""
    described = {key: row[key] for key in ENTRY_COLUMNS if key not in ("file", "bytes")}
    _check_texts(row, ("name", "sha256", "structure_fingerprint", "created"))
    if row["architecture"] is not None:
        _check_texts(row, ("architecture",))
    for key in ("task", "cost"):
        described[key] = _object(row, key)
    classes = described["task"].get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, (str, int)) for name in classes):
        raise TypeError("task: classes: expected a list of names")
    Cost.from_dict(described["cost"])
    for key in ("keep", "accuracy"):
        unknown = key == "accuracy" and row[key] is None
        if not unknown and not (isinstance(row[key], float) and 0 <= row[key] <= 1):
            raise TypeError(f"{key}: expected a number in [0, 1], got {row[key]!r}")
    if not isinstance(row["steps"], int) or row["steps"] < 0:
        raise TypeError(f"steps: expected a count, got {row['steps']!r}")
    described["mask"] = _mask_of(row["mask"])
    return ZooEntry(path=path, **described)


def model_of(row: Mapping[str, Any], path: Path) -> SharedModel:
    """A row of the index as a model; one of ``DAMAGED_ROW`` where the row is not what was written."""
    described = {key: row[key] for key in MODEL_COLUMNS if key not in ("file", "bytes")}
    _check_texts(row, ("name", "sha256", "structure_fingerprint", "created"))
    described["extra"] = extra = _object(row, "extra")
    if row["name"] in ROWLESS_MODELS:
        # What builders ask of the models that they made.
        Cost.from_dict(extra.get("result", {}).get("cost", {}))
    return SharedModel(path=path, **described)


def _check_texts(row: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if not isinstance(row[key], str):
            raise TypeError(f"{key}: expected text, got {row[key]!r}")
        if key == "created":
            datetime.fromisoformat(row[key])


def _object(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = json_of(row[key])
    if not isinstance(found, dict):
        raise TypeError(f"{key}: expected a JSON object")
    return found


# ---- from a file alone


def sound_state(data: bytes) -> PrunedState:
    """What a model's file holds; BadFile where it is damaged, or has weights that are not finite."""
    try:
        stored = parse_pruned(data, source="the file")
    except ValueError as error:
        raise BadFile("damaged", str(error)) from error
    # Older versions took them; a vote of such an entry is lost.
    for name, tensor in stored.state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadFile("damaged", f"its weights {name} are not finite")
    return stored


def row_of_file(path: Path, data: bytes, stored: PrunedState) -> dict[str, Any]:
    """The row of an entry, or of a shared model, as its file says it.

    A file of an older version has no record of its row: then the name, the classes, and what it cost are those of its
    card, as far as it has one.

    Raises:
        One of ``DAMAGED_ROW``: the record is not what was written.
    """
    record = stored.extra.get(RECORD)
    if record is None:
        record = _record_of_card(path, stored)
    facts = {
        "name": record["name"],
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "structure_fingerprint": stored.structure.fingerprint,
        "created": _iso(path.lstat().st_mtime),
    }
    if "task" not in record:
        extra = {k: v for k, v in stored.extra.items() if k != RECORD and not isinstance(v, Tensor)}
        return {**facts, "file": f"{path.parent.name}/{path.name}", "extra": to_json(extra, f"{path}: extra")}
    accuracy = record["accuracy"]
    return {
        **facts,
        "architecture": stored.structure.architecture,
        "mask": stored.mask.to_bytes(),
        "task": to_json(record["task"], f"{path}: task"),
        "keep": stored.mask.keep,
        "accuracy": None if accuracy is None else float(accuracy),
        "steps": int(record["steps"]),
        "cost": to_json(record["cost"], f"{path}: cost"),
        **means_row(stored.extra),
    }


def read_row(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row that a file says, and what it says of its zoo: "backbone" and "facts", where it does.

    Raises:
        BadFile: it is none of a model, damaged, or has weights that are not finite.
    """
    _, data = read_regular(path)
    stored = sound_state(data)
    try:
        row = row_of_file(path, data, stored)
        (entry_of if "task" in row else model_of)(row, path)
    except DAMAGED_ROW as error:
        raise BadFile("damaged", f"what it says of its entry cannot be read ({error})") from error
    record = stored.extra.get(RECORD) or {}
    return row, {key: record.get(key) or {} for key in ("backbone", "facts")}


def _record_of_card(path: Path, stored: PrunedState) -> dict[str, Any]:
    card = stored.card
    name = path.stem.rpartition("-")[0] or path.stem
    if path.parent.name != "entries":
        return {"name": name}
    cost = card.made_with.get("cost", {})
    return {
        "name": card.task or name,
        "task": {"name": card.task or name, "classes": list(card.class_names)},
        "accuracy": card.metrics.get("accuracy"),
        "steps": cost.get("steps", 0),
        "cost": cost,
    }


def means_row(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The columns that say what an entry's task looks like: empty ones where the tensors do not say it."""
    means, temperature = tensors.get("class_means"), tensors.get("temperature")
    if means is None or temperature is None or means.ndim != 2 or temperature.numel() != 1:
        return {"class_count": 0, "class_means": b"", "temperature": None}
    blob = means.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False).tobytes()
    return {"class_count": len(means), "class_means": blob, "temperature": float(temperature)}


def means_of(row: Mapping[str, Any], path: Path) -> ClassMeans | None:
    """The inverse of ``means_row``; None for an entry without class means.

    A row of an older schema does not say: then two tensors are read from the file.
    """
    _check_texts(row, ("name",))
    if row["class_count"] is None and not is_regular(path):
        raise BadFile("damaged", "expected a regular file")
    found = means_row(read_means(path)) if row["class_count"] is None else row
    if found["class_count"] == 0:
        return None
    means = torch.frombuffer(bytearray(found["class_means"]), dtype=torch.float32)
    return ClassMeans(row["name"], means.view(found["class_count"], -1), float(found["temperature"]))


def read_means(path: Path) -> dict[str, Tensor]:
    """The tensors that ``means_row`` takes, from an entry's file, without reading its weights."""
    return read_extra(path, ("class_means", "temperature"))


def file_name(name: str) -> str:
    """A new file's name, its own among all, that still says whose it is, on any file system."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:80] or "entry"
    return f"{slug}-{secrets.token_hex(6)}.safetensors"


def timestamp() -> str:
    return _iso(time.time())


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def to_json(value: Any, what: str) -> str:
    """JSON of a value or dataclass, non-finite numbers as null; ValueError, naming ``what``, of anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be JSON values ({error})") from error


def json_of(text: Any) -> Any:
    """The inverse of ``to_json``; ValueError where ``text`` is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {str(text)[:50]!r} ({error})") from error


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None: a cost that was not measured must not keep a model out."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return value
    return [_finite(item) for item in value]
