"""What a user gets for a task: accuracy against latency, over keep ratios, ways to prune and runtimes.

    python benchmarks/deployed.py --work deployed --data DATA --weights FILE --image-size 64 --mean … --std …
    # benchmarks/results/<machine>/deployed_<model>.json, docs/figures/deployed_<model>/accuracy_latency.png

At each keep ratio a zoo is built and `compare` runs its methods on held-out tasks; what is finished is kept in the work
folder, and the same command goes on from there. Then the dense model and the shape of each keep ratio, which all
methods share, are timed in turn in all runtimes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from results import machine_folder

from mvp_ext.app.bench import DENSE, Grid, bench, checkpoint_of, pruned_copies
from mvp_ext.app.comparison import Comparison, compare
from mvp_ext.app.environment import command, commit
from mvp_ext.app.plots import MARKERS, Theme, add_legend, new_figure, to_png
from mvp_ext.app.progress import progress_bar
from mvp_ext.app.results import Mean
from mvp_ext.data.images import load_data
from mvp_ext.data.tasks import sample_tasks
from mvp_ext.pruning.build import build_refined_zoo
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.storage import write_atomic
from mvp_ext.train.backbone import Backbone, load_backbone
from mvp_ext.zoo.zoo import Zoo

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("refined", "universal", "one_shot")
RUNTIMES = ("eager", "optimized", "onnxruntime", "openvino")
CLASSES, ZOO_TASKS, HELD_OUT, STEPS = 5, 8, 4, 20
SCHEDULE = Schedule(share=0.4, steps_per_round=5, final_steps=60)


def main() -> None:
    options = _parse()
    backbone = load_backbone(
        options.model,
        weights=options.weights,
        num_classes=None if options.weights else CLASSES,
        image_size=options.image_size,
        mean=options.mean,
        std=options.std,
    )
    accuracy = {f"keep {keep:g}": _compared(backbone, keep, options) for keep in options.keep}
    side, name = backbone.preprocessing.size, backbone.architecture
    small = {
        label: checkpoint_of(model, backbone.preprocessing)
        for label, model in pruned_copies(backbone.model, options.keep).items()
    }
    grid = Grid(
        ("eager",) if options.dry_run else RUNTIMES,
        batches=(1,),
        threads=(1 if options.dry_run else 2,),
        seconds=0.0 if options.dry_run else 2.0,
    )
    result = {
        "setting": {
            "model": name,
            "data": load_data(options.data).name,
            "held-out tasks": options.tasks,
            "classes a task": CLASSES,
            "fine-tuning steps": options.steps,
            "command": command(ROOT),
            "commit": commit(ROOT, "csrc", "mvp_ext", "benchmarks/*.py"),
        },
        "accuracy": accuracy,
        "speed": bench(checkpoint_of(backbone.model, backbone.preprocessing), small, (3, side, side), grid),
    }
    folder = options.out or machine_folder()
    figures = options.out or ROOT / "docs" / "figures" / f"deployed_{name}"
    for place in (folder, figures):
        place.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_atomic(folder / f"deployed_{name}.json", f"{text}\n".encode())
    write_atomic(figures / "accuracy_latency.png", to_png(partial(accuracy_against_latency, result)))


def _compared(backbone: Backbone, keep: float, options: argparse.Namespace) -> dict[str, Any]:
    """Method → accuracy of each held-out task, and that of the dense model with a ridge head."""
    data = load_data(options.data)
    zoo = Zoo(options.work / f"zoo-{keep:g}")
    tasks = sample_tasks(data, options.zoo_tasks, CLASSES, 0, "zoo")
    held_out = sample_tasks(
        data, options.tasks, CLASSES, 1000, "held-out", exclude=tasks, max_train_per_class=options.max_train
    )
    schedule = replace(SCHEDULE, final_steps=min(SCHEDULE.final_steps, 3 * options.steps))
    settings = Settings(keep=keep, schedule=schedule)
    with progress_bar(f"keep {keep:g}") as progress:
        build_refined_zoo(backbone, tasks, zoo, settings, progress=progress)
        compared = compare(
            backbone,
            held_out,
            zoo,
            Comparison(settings, options.steps, arms=METHODS, seconds=0.0),
            journal=options.work / f"runs-{keep:g}.jsonl",
            progress=progress,
        )
    arms = {arm["name"]: [task["accuracy"] for task in arm["tasks"]] for arm in compared["arms"]}
    return {"dense": compared["dense_accuracy"], "arms": arms}


def accuracy_against_latency(result: dict[str, Any], theme: Theme) -> Figure:
    """A point for each model and runtime: colours are runtimes, marks ways to prune."""
    figure, axes = new_figure(theme, 7.2, 4.4)
    models = result["speed"]["models"]
    dense = sum(kept["dense"] for kept in result["accuracy"].values()) / len(result["accuracy"])
    runtimes = list(dict.fromkeys(timed["runtime"] for timed in models[DENSE]["latency"]))
    methods = list(next(iter(result["accuracy"].values()))["arms"])
    for position, runtime in enumerate(runtimes):
        colour = theme.colour(position)
        at = {
            name: timed["median_ms"]
            for name, model in models.items()
            for timed in model["latency"]
            if timed["runtime"] == runtime
        }
        axes.plot(at[DENSE], 100 * dense, "*", ms=11, color=colour)
        for mark, method in zip(MARKERS, methods, strict=False):
            points = [
                (at[keep], 100 * Mean.of(kept["arms"][method]).value)
                for keep, kept in result["accuracy"].items()
            ]
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, ms=5, lw=0.8, alpha=0.9)
        axes.plot([], [], color=colour, lw=3, label=runtime)
    for mark, method in zip(MARKERS, methods, strict=False):
        axes.plot([], [], color=theme.muted, marker=mark, ls="", label=method)
    axes.plot([], [], "*", ms=11, color=theme.muted, label="dense, ridge head")
    axes.set_xscale("log")
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("latency of one image (ms), two threads")
    axes.set_ylabel("test accuracy (%)")
    add_legend(axes, theme)
    return figure


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy against latency over keep ratios and runtimes")
    parser.add_argument("--work", type=Path, required=True, help="folder for zoos and finished runs")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", type=Path, help="a safetensors state dict")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--mean", type=float, nargs=3)
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--data", default="digits", help="as of `mvp-ext prune`")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--max-train", type=int, default=100, help="training images a class, held out")
    parser.add_argument("--out", type=Path, help="folder; default: the project's result and figure folders")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and few steps; needs --out")
    options = parser.parse_args()
    options.zoo_tasks, options.tasks, options.steps = ZOO_TASKS, HELD_OUT, STEPS
    if options.dry_run:
        if options.out is None:
            parser.error("--dry-run needs --out")
        options.model, options.image_size, options.keep = "test_resnet", 16, [0.5]
        options.zoo_tasks, options.tasks, options.steps, options.max_train = 2, 1, 1, 6
    return options


if __name__ == "__main__":
    main()
