"""``mvp-ext``: thin commands over the Python API."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from mvp_ext._version import __version__
from mvp_ext.app import options, zoo_commands
from mvp_ext.app.bench import bench as run_bench
from mvp_ext.app.bench import bench_table, pruned_copies
from mvp_ext.app.comparison import NAMES, NEED_ZOO, Comparison
from mvp_ext.app.comparison import compare as run_comparison
from mvp_ext.app.console import Commands, console, progress_bar, say, warn_in_one_line
from mvp_ext.app.demo import FULL, QUICK, run_demo
from mvp_ext.app.report import save_report, summary_table
from mvp_ext.app.results import count_text, flops_text, load_results, save_results, seconds_text
from mvp_ext.data.tasks import Task
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.pruning.methods import METHODS, method_for, vote_for
from mvp_ext.pruning.prune import prune as run_prune
from mvp_ext.train.pretrain import pretrain as run_pretraining
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.zoo import Zoo

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(zoo_commands.app, name="zoo")
Out = Annotated[Path, Option(help="Where the result goes.", rich_help_panel=options.RUN)]


def main() -> None:
    """The console script."""
    app()


def _version(value: bool) -> None:
    if value:
        say(f"mvp-ext {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Small models for new tasks by a vote of pruned models of similar tasks.

    `mvp-ext demo` shows it on real images, with nothing to download. Errors are one line; MVP_DEBUG=1 shows where.
    """
    warn_in_one_line()


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    quick: Annotated[bool, Option(help="A small one: it shows that everything works, not how well.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """The main job on scikit-learn's digits: pre-train, build a zoo, compare on held-out tasks, write a page.

    Run again with the same OUT it goes on where it was.
    """
    options.set_threads(threads)
    size = dataclasses.replace(QUICK if quick else FULL, seed=seed)
    results = run_demo(size, out, bar=progress_bar, device=options.device_of(device))
    results["command"] = _command()
    _write(results, out)


@app.command()
def pretrain(
    out: Out = Path("backbone.safetensors"),
    model: options.Model = "resnet18",
    image_size: options.ImageSize = None,
    data: options.Data = "digits",
    steps: Annotated[int, Option(help="Training steps.", rich_help_panel=options.RUN)] = 500,
    batch_size: Annotated[int | None, Option(help="Images a step.", rich_help_panel=options.RUN)] = None,
    learning_rate: options.LearningRate = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Train a backbone from scratch on all classes, where no pre-trained weights are at hand.

    After Ctrl-C or a crash the same command goes on where it was.
    """
    options.set_threads(threads)
    place = options.device_of(device)
    images = options.data_of(data)
    size = image_size or max(32, *images.image_size)
    import torch

    torch.manual_seed(seed)  # the weights that training starts from
    network = create_model(model, num_classes=len(images.classes), img_size=size).to(place)
    recipe = None
    if learning_rate is not None or batch_size is not None:
        family = Recipe.for_model(network)
        recipe = dataclasses.replace(
            family,
            learning_rate=learning_rate or family.learning_rate * (10 if family.optimizer == "sgd" else 3),
            batch_size=batch_size or family.batch_size,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("pre-training") as progress:
        backbone, accuracy, cost = run_pretraining(
            network,
            images,
            steps=steps,
            image_size=size,
            recipe=recipe,
            seed=seed,
            on_step=lambda done, total: progress("", done, total),
            resume=out.with_suffix(".partial"),
        )
    backbone.save(out)
    say(
        f"{out}: {model} at {size} pixels, {100 * accuracy:.1f} % on {len(images.test_labels)} test images of "
        f"{len(images.classes)} classes, {flops_text(cost.flops)} in {seconds_text(cost.seconds)}"
    )


@app.command()
def prune(
    out: Out = Path("small.safetensors"),
    zoo: options.ZooPath = Path("zoo"),
    model: options.Model = "resnet18",
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    data: options.Data = "digits",
    classes: Annotated[
        str | None, Option(help="The task: class names joined by commas.", rich_help_panel=options.DATA)
    ] = None,
    task: Annotated[
        Path | None, Option(help="The task: a file that --save-task wrote.", rich_help_panel=options.DATA)
    ] = None,
    save_task: Annotated[
        Path | None, Option(help="Write the task's description here.", rich_help_panel=options.DATA)
    ] = None,
    max_train: options.MaxTrain = None,
    method: Annotated[
        str,
        Option(
            help=f"auto (refined where the zoo refines a universal model, else mvp), {', '.join(METHODS)}.",
            rich_help_panel=options.PRUNING,
        ),
    ] = "auto",
    keep: options.Keep = 0.3,
    scope: options.Scope = None,
    align: options.Align = 8,
    steps: Annotated[int, Option(help="Fine-tuning steps.", rich_help_panel=options.PRUNING)] = 60,
    neighbours: options.Neighbours = 5,
    similarity: options.Similarity = "leep",
    criterion: options.Criterion = "taylor",
    learning_rate: options.LearningRate = None,
    add: Annotated[bool, Option(help="Add the result to the zoo.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Make a small model for one task by a vote of the zoo's nearest entries."""
    options.set_threads(threads)
    if (classes is None) == (task is None):
        raise ValueError("prune: which task? Give either --classes name,name,… or --task FILE")
    opened = Zoo(zoo, create=False) if method in NEED_ZOO or add else None
    backbone = options.backbone_of(model, weights, pretrained, image_size, mean, std, device=device)
    images = options.data_of(data)
    if task is not None:
        chosen = Task.load(task, images)
    else:
        names = [name.strip() for name in str(classes).split(",") if name.strip()]
        label = "+".join(names)
        chosen = Task.of(label, images, names, seed=seed, max_train_per_class=max_train)
    if save_task is not None:
        chosen.save(save_task)
    method = method_for(opened) if method == "auto" else method
    with progress_bar("fine-tuning") as progress:
        result = run_prune(
            backbone,
            chosen,
            zoo=opened,
            keep=keep,
            steps=steps,
            method=method,
            scope=scope,
            align=align,
            recipe=options.recipe_of(backbone, learning_rate),
            schedule=options.schedule_of(steps, 10, 0.1, criterion),
            vote=vote_for(method, neighbours, similarity),
            seed=seed,
            on_step=lambda done, total: progress(chosen.name, done, total),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    result.save(out)
    if add and opened is not None:
        opened.add(result)
    if result.neighbours:
        nearest = ", ".join(f"{name} ({similarity:.2f})" for name, similarity in result.neighbours)
        say(f"voters: {nearest}")
    say(
        f"{out}: accuracy {100 * result.accuracy:.1f} %, {count_text(result.parameters)} parameters, "
        f"{flops_text(result.flops)} an image, {result.cost.steps} steps, {flops_text(result.cost.flops)} and "
        f"{seconds_text(result.cost.seconds)} to make"
    )


@app.command()
def compare(
    out: Out = Path("runs/compare"),
    zoo: options.ZooPath = Path("zoo"),
    model: options.Model = "resnet18",
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    data: options.Data = "digits",
    tasks: Annotated[int, Option(help="Held-out tasks.", rich_help_panel=options.DATA)] = 6,
    classes_per_task: options.ClassesPerTask = 5,
    task_seed: options.TaskSeed = 1000,
    max_train: options.MaxTrain = None,
    keep: options.Keep = 0.3,
    scope: options.Scope = None,
    align: options.Align = 8,
    steps: Annotated[
        int, Option(help="Fine-tuning steps of each arm.", rich_help_panel=options.PRUNING)
    ] = 60,
    final_steps: Annotated[
        int, Option(help="Iterative pruning: steps after the last removal.", rich_help_panel=options.PRUNING)
    ] = 200,
    steps_per_round: options.StepsPerRound = 10,
    share: options.Share = 0.1,
    criterion: options.Criterion = "taylor",
    neighbours: options.Neighbours = 5,
    similarity: options.Similarity = "leep",
    arm: Annotated[
        list[str] | None,
        Option(help=f"Methods (repeatable): {', '.join(NAMES)}. Default: what suits the zoo, and controls."),
    ] = None,
    rate: Annotated[
        list[str] | None, Option(help="Learning rate of one method, like mvp=0.02 (repeatable).")
    ] = None,
    seconds: Annotated[float, Option(help="Time for each latency.")] = 1.0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Compare methods on held-out tasks at equal shapes and head refit; write results.json and report.html.

    The tasks are drawn so that none has the class set of an entry. Run again with the same OUT it goes on where it was.
    """
    options.set_threads(threads)
    opened = Zoo(zoo, create=False)
    backbone = options.backbone_of(model, weights, pretrained, image_size, mean, std, device=device)
    images = options.data_of(data)
    known = [Task.of(e.name, images, e.task["classes"]) for e in opened.entries() if _has(images, e.task)]
    drawn = options.tasks_of(images, tasks, classes_per_task, task_seed, "held-out", max_train, known)
    asked = Comparison(
        keep=keep,
        scope=scope,
        align=align,
        steps=steps,
        neighbours=neighbours,
        similarity=similarity,
        schedule=options.schedule_of(final_steps, steps_per_round, share, criterion),
        arms=tuple(arm or ()),
        rates=dict(_rate(text) for text in rate or ()),
        seconds=seconds,
        seed=seed,
    )
    with progress_bar("compare") as progress:
        results = run_comparison(
            backbone,
            drawn,
            opened,
            asked,
            title=f"{backbone.architecture} on {images.name}: pruned models for new tasks",
            journal=out / "runs.jsonl",
            progress=progress,
        )
    results["command"] = _command()
    _write(results, out)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A results.json of `demo` or `compare`.")],
    out: Annotated[Path | None, Option(help="The page. Default: report.html beside the results.")] = None,
    figures: Annotated[Path | None, Option(help="A folder for the figures as PNG files.")] = None,
) -> None:
    """Make the page again from saved results."""
    loaded = load_results(results)
    path = save_report(loaded, out or results.with_name("report.html"), figures=figures)
    console.print(summary_table(loaded))
    say(f"{path}" + (f", figures in {figures}" if figures else ""))


@app.command()
def bench(
    model: options.Model = "resnet18",
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    image_size: options.ImageSize = None,
    keep: Annotated[
        list[float] | None,
        Option(help="Keep ratios (repeatable). Default: 0.5.", rich_help_panel=options.PRUNING),
    ] = None,
    scope: options.Scope = None,
    align: options.Align = 8,
    pruned: Annotated[list[Path] | None, Option(help="Also a saved pruned model (repeatable).")] = None,
    against_torch_pruning: Annotated[
        bool, Option(help="Also the same shapes made by Torch-Pruning.")
    ] = False,
    batch: Annotated[list[int] | None, Option(help="Batch sizes (repeatable). Default: 1 and 32.")] = None,
    seconds: Annotated[float, Option(help="Time for each model and batch size.")] = 2.0,
    channels_last: Annotated[bool, Option(help="Time in the channels_last layout.")] = False,
    device: options.Device = "auto",
    out: Annotated[Path | None, Option(help="Save as JSON.", rich_help_panel=options.RUN)] = None,
    threads: options.Threads = None,
) -> None:
    """Dense against pruned: latency and throughput per batch size, FLOPs, parameters, saving that became time."""
    import torch

    options.set_threads(threads)
    place = options.device_of(device)
    backbone = options.backbone_of(model, weights, pretrained, image_size, need_weights=False)
    dense, shape = backbone.model, (3, backbone.preprocessing.size, backbone.preprocessing.size)
    keeps = keep or [0.5]
    others = pruned_copies(dense, keeps, scope=scope, align=align)
    if against_torch_pruning:
        others |= _made_by_torch_pruning(dense, others, keeps, scope, align, shape)
    for path in pruned or ():
        others[path.name] = load_pruned(path).model
    result = run_bench(
        dense.to(place),
        {name: other.to(place) for name, other in others.items()},
        shape,
        batches=tuple(batch or (1, 32)),
        seconds=seconds,
        channels_last=channels_last,
        setting={
            "model": model,
            "scope": find_structure(dense, scope).scope,
            "align": align,
            "device": str(place),
            "threads": torch.get_num_threads(),
            "command": _command(),
        },
    )
    console.print(bench_table(result))
    say(f"{model} at {shape[1]} pixels on {place}, {torch.get_num_threads()} threads")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        say(f"{out}")


def _made_by_torch_pruning(
    dense: Any,
    ours: dict[str, Any],
    keeps: list[float],
    scope: str | None,
    align: int,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    from mvp_ext.app.peers import different_shapes, prune_with_torch_pruning

    structure = find_structure(dense, scope)
    made = {}
    for keep in keeps:
        peer = prune_with_torch_pruning(dense, structure, Mask.random(structure, keep, 0, align), shape)
        different = different_shapes(ours[f"keep {keep:g}"], peer)
        if different:
            raise RuntimeError(
                f"torch-pruning made other shapes, first of {different[0]}: the comparison would be unfair"
            )
        made[f"keep {keep:g}, torch-pruning"] = peer
    return made


def _rate(text: str) -> tuple[str, float]:
    method, _, value = text.partition("=")
    try:
        if method in NAMES:
            return method, float(value)
    except ValueError:
        pass
    raise ValueError(f"--rate: expected METHOD=RATE with METHOD one of {', '.join(NAMES)}, got {text!r}")


def _has(images: Any, task: dict[str, Any]) -> bool:
    return set(task.get("classes", ())) <= set(images.class_names)


def _command() -> str:
    """The command that repeats this, without the folder that the script happens to lie in."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _write(results: dict[str, Any], out: Path) -> None:
    save_results(results, out / "results.json")
    page = save_report(results, out / "report.html", figures=out / "figures")
    console.print(summary_table(results))
    say(f"{page} (open it in a browser), {out / 'results.json'}, {out / 'figures'}")
