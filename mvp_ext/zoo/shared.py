"""The models that a zoo keeps beside its entries: one for all tasks, and what the entries started from."""

from __future__ import annotations

from pathlib import Path

from mvp_ext.model.checkpoint import read_pruned
from mvp_ext.zoo.zoo import Zoo


def universal_path(zoo: Zoo) -> Path:
    """Where a zoo keeps the universal pruned model of its tasks."""
    return Path(zoo.path) / "universal.safetensors"


def start_path(zoo: Zoo) -> Path:
    """Where a zoo keeps the model that its entries started from, if that was not the dense one."""
    return Path(zoo.path) / "start.safetensors"


def is_refined(zoo: Zoo) -> bool:
    """Whether ``build_refined_zoo`` made it: what its entries start from says for which keep ratio it was made."""
    return start_path(zoo).exists() and "keep" in read_pruned(start_path(zoo)).extra
