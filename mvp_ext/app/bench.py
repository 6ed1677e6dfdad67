"""Dense against pruned: size, latency, throughput, and what share of the FLOP saving became time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from torch import nn

from mvp_ext.app.environment import environment
from mvp_ext.app.results import count_text, flops_text
from mvp_ext.app.tables import Side, Table
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import Measurement, measure, share_of_saving
from mvp_ext.model.surgery import prune_model

DENSE = "dense"


def pruned_copies(
    model: nn.Module, keeps: Sequence[float], *, scope: str | None = None, align: int = 8, seed: int = 0
) -> dict[str, nn.Module]:
    """Copies of ``model`` at the shapes that each keep ratio gives (which units stay does not matter for speed)."""
    structure = find_structure(model, scope)
    copies = {}
    for keep in keeps:
        mask = Mask.random(structure, keep, seed, align)
        copies[f"keep {keep:g}"] = prune_model(copy.deepcopy(model), mask, structure=structure)
    return copies


def bench(
    dense: nn.Module,
    others: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    *,
    batches: Sequence[int] = (1, 32),
    seconds: float = 2.0,
    threads: int | None = None,
    channels_last: bool = False,
    setting: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure all models in turn; the result is JSON values, with machine, versions and setting.

    Args:
        dense: the model that the others are compared with.
        others: name → smaller model for the same input.
        input_shape: of one image, (C, H, W).
        batches: batch sizes, each timed for itself.
        seconds: about how long a model is timed at each.
        threads: torch's CPU threads while timing; None leaves them.
        channels_last: layout of the input and of the models' 4-d weights.
        setting: what else a reader must know, stored as it is.

    Raises:
        ValueError: another model has the dense model's name, or the models are on different devices.
    """
    if DENSE in others:
        raise ValueError(f"bench: others: {DENSE!r} is the dense model's own name")
    models = {DENSE: dense, **others}
    measured = measure(
        models, input_shape, batches=batches, seconds=seconds, threads=threads, channels_last=channels_last
    )
    return {
        "setting": dict(setting or {}),
        "input_shape": list(input_shape),
        "channels_last": channels_last,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "models": {name: _described(m, measured[DENSE]) for name, m in measured.items()},
    }


def _described(measured: Measurement, dense: Measurement) -> dict[str, Any]:
    described = measured.to_dict()
    for latency in described["latency"]:
        batch = latency["batch"]
        latency["speed_up"] = dense.at(batch).median_ms / latency["median_ms"]
        latency["share_of_saving"] = share_of_saving(dense, measured, batch)
    return described


def bench_table(result: Mapping[str, Any]) -> Table:
    """One row a model and batch size; "saving in time": what share of the saved FLOPs became saved time."""
    columns: list[tuple[str, Side]] = [("model", "left")]
    numbers = (
        "parameters",
        "FLOPs",
        "batch",
        "median ms (p10–p90)",
        "images/s",
        "times as fast",
        "saving in time",
    )
    columns += [(heading, "right") for heading in numbers]
    rows = []
    for name, model in result["models"].items():
        sizes = (name, count_text(model["parameters"]), flops_text(model["flops"]))
        for position, timed in enumerate(model["latency"]):
            share = timed["share_of_saving"]
            rows.append(
                (
                    *(sizes if position == 0 else ("", "", "")),
                    str(timed["batch"]),
                    f"{timed['median_ms']:.4g} ({timed['p10_ms']:.4g}–{timed['p90_ms']:.4g})",
                    f"{timed['throughput']:.0f}",
                    "" if name == DENSE else f"{timed['speed_up']:.2f}×",
                    "" if share is None else f"{share:.0%}",
                )
            )
    return Table(columns, rows, "dense against pruned")
