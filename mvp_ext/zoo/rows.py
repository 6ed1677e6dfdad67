"""What the index keeps of models: their rows from what is added, and back."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_ext.model.checkpoint import read_extra
from mvp_ext.model.mask import Mask
from mvp_ext.zoo.entry import ClassMeans, NewEntry, SharedModel, ZooEntry
from mvp_ext.zoo.index import ENTRY_COLUMNS, MODEL_COLUMNS

# What a row that was tampered with, or hit by a failing disk, can raise
DAMAGED_ROW = (ValueError, TypeError, RuntimeError, OSError)


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
    for key in ("task", "cost"):
        described[key] = json.loads(row[key])
        if not isinstance(described[key], dict):
            raise TypeError(f"{key}: expected a JSON object")
    for key in ("keep", "accuracy"):
        if not isinstance(row[key], (float, type(None))):
            raise TypeError(f"{key}: expected a number, got {row[key]!r}")
    described["mask"] = _mask_of(row["mask"])
    return ZooEntry(path=path, **described)


def model_of(row: Mapping[str, Any], path: Path) -> SharedModel:
    """A row of the index as a model; one of ``DAMAGED_ROW`` where the row is not what was written."""
    described = {key: row[key] for key in MODEL_COLUMNS if key not in ("file", "bytes")}
    described["extra"] = json.loads(row["extra"])
    return SharedModel(path=path, **described)


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
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def to_json(value: Any, what: str) -> str:
    """JSON of a value or dataclass, non-finite numbers as null; ValueError, naming ``what``, of anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be JSON values ({error})") from error


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None: a cost that was not measured must not keep a model out."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return value
    return [_finite(item) for item in value]
