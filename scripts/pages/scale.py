"""How cost grows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvp_ext.app.results import count_text, flops_text, seconds_text
from scripts.pages.common import machine, name_of, read, table


def scale(path: Path) -> str:
    """What was measured of growth, and what it comes to for many tasks and processes."""
    result = read(path)
    made, driver, steps = result["setting"], result["driver"], result["steps"]
    times = ("open_seconds", "nearest_seconds", "vote_seconds", "prune_seconds")
    entries = [
        (
            f"{row['entries']:,}",
            f"{count_text(row['index_bytes'])}B",
            *(seconds_text(row[name]) for name in times),
        )
        for row in result["entries"]
    ]
    models = [
        (
            row["model"],
            count_text(row["parameters"]),
            flops_text(row["flops"]),
            seconds_text(row["step_seconds"]),
        )
        for row in result["models"]
    ]
    workers = [
        (str(row["workers"]), f"{60 * row['entries'] / row['seconds']:.1f}") for row in result["workers"]
    ]
    return "\n\n".join(
        (
            "## Measured",
            f"`{made['command']}`, commit {made['commit']}, one thread "
            f"({machine(result['environment'])}; `{name_of(path)}`). Zoos of resnet18 "
            f"with {made['voters']} voters of 10 classes a task; `prune` is that of a tiny model without fine-tuning.",
            table(("entries", "index", "open", f"{made['voters']} nearest", "vote of all", "prune"), entries),
            f"The nearest among {made['among']:,} entries of so many classes each:",
            table(
                ("classes", "time"),
                [(str(row["classes"]), seconds_text(row["nearest_seconds"])) for row in result["classes"]],
            ),
            f"A training step of {made['batch']} images at {result['models'][0]['pixels']} pixels:",
            table(("model", "parameters", "FLOPs an image", "step"), models),
            "Entries of a tiny model, pruned from scratch, by workers (that several share the entries of `zoo build`):",
            table(("workers", "entries a minute"), workers),
            f"One finished entry of resnet18 ({count_text(driver['entry_bytes'])}B) is added in "
            f"{seconds_text(driver['add_seconds'])}: checked, written and synced, its row committed.",
            *_many(steps, driver, tasks=10_000, processes=100),
        )
    )


def images(path: Path) -> str:
    """Batches from a folder of more images than memory holds."""
    result = read(path)
    made, titles = result["setting"], {"cache": "`--cache on`", "torchvision": "ImageFolder and DataLoader"}
    rows = [
        (
            f"{titles[name]}, {time}",
            seconds_text(run["first_batch_seconds"]),
            f"{run['images_per_second']:,.0f}",
            f"{run['peak_mb']:,} MB"
            + (f", and {run['worker_peak_mb']} a worker" if run["worker_peak_mb"] else ""),
        )
        for name in titles
        for time, run in zip(("the first time", "again"), result["runs"][name], strict=True)
    ]
    return "\n\n".join(
        (
            "## More images than memory",
            f"Shuffled, mirrored, normalised batches of {made['batch']} from a folder of {made['images']:,} JPEGs, at "
            f"{made['size']} pixels ({made['decoded_mb'] / 1024:.0f} GB as bytes): `{made['command']}`, commit "
            f"{made['commit']} ({machine(result['environment'])}; `{name_of(path)}`).",
            table(("", "to the first batch", "images a second after it", "resident memory"), rows),
        )
    )


def _many(
    steps: Mapping[str, Any], driver: Mapping[str, Any], tasks: int, processes: int
) -> tuple[str, str, str]:
    shared, own = steps["universal_a_task"] * tasks, steps["entry"] * tasks / processes
    each = own + shared / processes
    rows = [
        ("the model of all tasks", f"{shared:,.0f} steps", f"up to {steps['batch']} processes share each"),
        ("the entries", f"{own:,.0f} steps", f"of each of {processes} processes, side by side"),
        ("adding them by one writer", seconds_text(tasks * driver["add_seconds"]), "while others train"),
    ]
    return (
        f"## {tasks:,} tasks, {processes} GPUs",
        table(("work", "one after another", ""), rows),
        f"**The largest bottleneck is the model of all tasks.** Its steps come one after another, "
        f"{shared / own:,.0f} for each that a process spends on its entries, "
        f"and a batch of {steps['batch']} gives at most {steps['batch']} "
        "processes something to do. The plan gives it a share of all steps, so they grow with the tasks although it "
        "stays one small model. For so many tasks it wants fewer and larger steps (not tried), or none "
        f"(`--no-refine`: {each:,.0f} steps of each process). "
        "What follows behind it is the search for neighbours, which reads and compares every entry for every task: "
        "see the last line of the first table.",
    )
