"""What every page needs: where things lie, tables, and how a machine is named."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvp_ext.app.tables import Table

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
# What every study compares its arms with.
CONTROL = "universal"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers stand right."""
    cells = [[row[i] for row in rows if row[i]] for i in range(len(columns))]
    sides = ["right" if all(text[0] in "+-0123456789" for text in column) else "left" for column in cells]
    return Table(list(zip(columns, sides, strict=True)), rows).markdown()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def link(path: Path, page: Path) -> str:
    """A path under docs/ as ``page`` has to write it."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def machine(environment: Mapping[str, Any]) -> str:
    """The hardware and the versions that say most, of whichever are recorded."""
    gpu = str(environment.get("gpu", "none"))
    hardware = str(environment.get("cpu", "")) if gpu.startswith("none") else gpu
    threads = (
        f"{environment['threads']} threads" if "threads" in environment else environment.get("cpu cores")
    )
    return ", ".join(str(part) for part in (hardware, threads, f"torch {environment['torch']}") if part)
