"""Which backbones can be cut, exactly and all the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.coverage import PROOFS
from benchmarks.coverage import summary as summary_of_coverage
from scripts.pages.common import machine, name_of, read, table


def coverage_page(path: Path, page: Path) -> str:
    """One row a model, Torch-Pruning beside it."""
    result = read(path)
    rows = result["models"]
    made = result["setting"]
    where = machine({**result["environment"], "threads": made["threads"]})
    columns = (
        "model",
        "scope",
        "exact, eval",
        "exact, train",
        "read again",
        "pruned",
        "ONNX",
        "FLOPs",
        "weights",
        "time",
    )
    cells = [
        (
            name,
            row.get("scope", ""),
            *("✓" if row.get(proof) else "–" for proof in PROOFS),
            *(_left(row, kind, "ours") for kind in ("flops", "parameters", "latency_ms")),
            *(_left(row, kind, "Torch-Pruning") or "–" for kind in ("flops", "latency_ms")),
        )
        for name, row in rows.items()
    ]
    reasons = [f"- `{name}`: {each}" for name, row in rows.items() for each in _why(row)]
    return (
        "\n\n".join(
            (
                "# Coverage",
                f"Which backbones can be cut to keep {made['keep']:g}, exactly and all the way (`{made['command']}`; "
                f"{where}; `{name_of(path)}`). Random weights; gains, biases, tables and statistics are drawn. FLOPs, "
                "weights and the time of one image are shares of the dense model's; the last two columns are "
                "Torch-Pruning's, used as in its examples with whole heads pruned (its errors are in the file; in an "
                "earlier trial, which only asked for outputs of the right shape, it ran on 75 of 120 of these models).",
                "\n".join(f"- {line}" for line in summary_of_coverage(rows).splitlines()),
                table((*columns, "FLOPs, peer", "time, peer"), cells),
                "## Why not",
                "\n".join(reasons),
            )
        )
        + "\n"
    )


def _left(row: Mapping[str, Any], kind: str, whose: str) -> str:
    sizes = row.get(kind, {})
    return f"{sizes[whose] / sizes['dense']:.2f}" if whose in sizes else ""


def _why(row: Mapping[str, Any]) -> Iterator[str]:
    for proof, reason in row["reasons"].items():
        if proof != "Torch-Pruning":
            # Some errors come in colours.
            plain = re.sub(r"\x1b\[[0-9;]*m", "", reason)
            yield f"{proof}: {plain}"
    times = row.get("latency_ms", {})
    if "ours" in times and times["ours"] >= times["dense"]:
        flops = row["flops"]
        yield f"not faster: {flops['ours'] / flops['dense']:.0%} of the FLOPs are left"
