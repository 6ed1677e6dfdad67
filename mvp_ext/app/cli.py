"""``mvp-ext``: thin commands over the Python API."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Option

from mvp_ext._version import __version__
from mvp_ext.app import cache_commands, data_options, deploy_options, options, zoo_commands
from mvp_ext.app.bench import bench as run_bench
from mvp_ext.app.bench import bench_table, checkpoint_of, pruned_copies, reasons
from mvp_ext.app.comparison import NEED_ZOO, arms_of
from mvp_ext.app.comparison import compare as run_comparison
from mvp_ext.app.console import Commands, complain, console, say, warn_in_one_line
from mvp_ext.app.demo import FULL, QUICK, run_demo
from mvp_ext.app.environment import command
from mvp_ext.app.export_command import export_file
from mvp_ext.app.outputs import check_folder, check_output
from mvp_ext.app.predict import ask, open_model, publish
from mvp_ext.app.progress import progress_bar
from mvp_ext.app.report import said_by_experts, save_report, summary_table
from mvp_ext.app.results import (
    class_accuracy_text,
    count_text,
    flops_text,
    kept_text,
    load_results,
    save_results,
    seconds_text,
)
from mvp_ext.data.sources import find_images
from mvp_ext.data.tasks import Task
from mvp_ext.deploy.bundle import save_bundle
from mvp_ext.model.checkpoint import read_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.create_args import create_args
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.pruning.prune import RunOptions
from mvp_ext.pruning.prune import prune as run_prune
from mvp_ext.pruning.settings import Settings
from mvp_ext.storage import write_atomic
from mvp_ext.train import parallel
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
app.add_typer(cache_commands.app, name="cache")


def main() -> None:
    """The console script."""
    # Until now nobody would have caught it (``_start_up``).
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
@options.grouped
def demo(
    run: options.ExecutionOptions,
    out: options.Out = Path("runs/demo"),
    quick: Annotated[bool, Option(help="A small one: it shows that everything works, not how well.")] = False,
) -> None:
    """The main job on scikit-learn's digits: pre-train, build a zoo, compare on held-out tasks, write a page.

    Run again with the same OUT it goes on where it was.
    """
    device = run.begin()
    check_folder("--out", out)
    size = dataclasses.replace(QUICK if quick else FULL, seed=run.seed)
    results = run_demo(size, out, device=device)
    results["command"] = command()
    _write(results, out)


@app.command()
@options.grouped
def pretrain(
    run: options.ExecutionOptions,
    out: options.Out = Path("backbone.safetensors"),
    model: Annotated[str, Option(help=f"{options.MODEL_NAMES}.", rich_help_panel=options.MODEL)] = "resnet18",
    image_size: Annotated[
        int | None,
        Option(
            help="Side of the model's input in pixels. Default: the images', at least 32.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    data: data_options.Data = None,
    cache: data_options.Cache = "auto",
    steps: Annotated[int, Option(help="Training steps.", rich_help_panel=options.RUN)] = 500,
    batch_size: Annotated[int | None, Option(help="Images a step.", rich_help_panel=options.RUN)] = None,
    learning_rate: Annotated[
        float | None, Option(help="Peak learning rate. Default: the family's.", rich_help_panel=options.RUN)
    ] = None,
    force: options.Force = False,
) -> None:
    """Train a backbone from scratch on all classes, where no pre-trained weights are at hand.

    After Ctrl-C or a crash the same command goes on where it was. Several processes or GPUs share each batch:
    `torchrun --nproc-per-node 2 -m mvp_ext pretrain …`.
    """
    device = run.begin_together()
    check_output("--out", out, replace=force)
    with parallel.first_alone():
        images = data_options.load_images(data, cache)
    size = image_size or max(32, *images.image_size)
    # The weights that training starts from.
    torch.manual_seed(run.seed)
    network = create_model(model, num_classes=len(images.classes), img_size=size).to(device)
    with progress_bar("pre-training") as progress:
        backbone, accuracy, cost = run_pretraining(
            network,
            images,
            steps=steps,
            image_size=size,
            recipe=options.pretraining_recipe(Recipe.for_model(network), learning_rate, batch_size),
            seed=run.seed,
            on_step=lambda done, total: progress("", done, total),
            resume=out.with_suffix(".partial"),
        )
    if parallel.rank() == 0:
        backbone.save(out)
    say(
        f"{out}: {model} at {size} pixels, {100 * accuracy:.1f} % on {len(images.test_labels)} test images of "
        f"{len(images.classes)} classes, {flops_text(cost.flops)} in {seconds_text(cost.seconds)}"
    )


@app.command()
@options.grouped
def prune(
    model: options.ModelOptions,
    data: data_options.DataOptions,
    task: data_options.TaskOptions,
    cut: options.CutOptions,
    how: options.MethodOptions,
    voters: options.NeighbourOptions,
    run: options.ExecutionOptions,
    what: options.PruneOutputOptions,
    zoo: options.ZooPath = Path("zoo"),
) -> None:
    """Make a small model for one task by a vote of the zoo's nearest entries."""
    device = run.begin()
    task.check()
    check_output("--out", what.out, replace=what.force)
    opened = Zoo(zoo, create=False) if how.method in NEED_ZOO or what.add else None
    backbone = model.backbone(device, seen=None if opened is None else opened.preprocessing)
    settings = cut.settings(opened, backbone, run.seed)
    # What the model does not have is said before images are read.
    find_structure(backbone.model, settings.scope)
    chosen = task.of(data.images(), data, run.seed)
    with progress_bar("fine-tuning") as progress:
        result = run_prune(
            backbone,
            chosen,
            opened,
            settings,
            method=how.method,
            steps=how.number_of_steps,
            vote=voters.vote(),
            run=RunOptions(on_step=lambda done, total: progress(chosen.name, done, total)),
        )
    result.save(what.out)
    if what.add and opened is not None:
        opened.add(result)
    if result.neighbours:
        nearest = ", ".join(f"{name} ({similarity:.2f})" for name, similarity in result.neighbours)
        say(f"voters: {nearest}")
    choice = result.choice or {}
    if "known_share" in choice:
        say(
            f"the zoo knows {choice['known_share']:.0%} of the task's classes; "
            f"experts have told {choice['told_by_experts']:.0%} of its images"
        )
    if "left_out_error" in choice:
        say(f"{choice['steps']} steps: {choice['left_out_error']:.1%} leave-one-out error before them")
    say(f"kept: {kept_text(result.mask)}")
    say(f"outputs, in order: {', '.join(result.class_names)}")
    say(f"accuracy by class: {class_accuracy_text(result.class_names, result.class_accuracy)}")
    say(
        f"{what.out}: accuracy {100 * result.accuracy:.1f} %, mean confidence {100 * result.mean_confidence:.1f} %, "
        f"calibration error {100 * result.expected_calibration_error:.1f} %, "
        f"{count_text(result.parameters)} parameters, {flops_text(result.flops)} an image, "
        f"{result.cost.steps} steps, {flops_text(result.cost.flops)} and {seconds_text(result.cost.seconds)} to make"
    )


@app.command()
@options.grouped
def export(
    file: Annotated[Path, typer.Argument(help="A small model that `prune` wrote.")],
    what: deploy_options.ExportOptions,
) -> None:
    """Write a small model for ONNX Runtime, OpenVINO or torch alone, checked against PyTorch first."""
    export_file(file, what)


@app.command()
@options.grouped
def compare(
    model: options.ModelOptions,
    data: data_options.DataOptions,
    sampling: data_options.SamplingOptions,
    cut: options.CutOptions,
    schedule: options.ScheduleOptions,
    voters: options.NeighbourOptions,
    what: options.CompareOptions,
    workers: options.WorkerOptions,
    run: options.ExecutionOptions,
    zoo: options.ZooPath = Path("zoo"),
) -> None:
    """Compare methods on held-out tasks at equal shapes and head refit; write results.json and report.html.

    The tasks are drawn so that none has the class set of an entry. Run again with the same OUT it goes on where it was.
    """
    device = run.begin()
    check_folder("--out", what.out)
    opened = Zoo(zoo, create=False)
    backbone = model.backbone(device, seen=opened.preprocessing)
    settings = schedule.applied(cut.settings(opened, backbone, run.seed), what.final_steps)
    # What the model does not have is said before images are read.
    structure = find_structure(backbone.model, settings.scope)
    images = data.images()
    known = [Task.of(e.name, images, e.task["classes"]) for e in opened.entries() if _has(images, e.task)]
    drawn = sampling.tasks(images, what.tasks, "held-out", data, known, seed=1000)
    compared = what.comparison(settings, voters.vote())
    arms = arms_of(opened, compared)
    steps = len(drawn) * sum(compared.all_steps(arm, structure) for arm in arms)
    say(f"to do: {len(arms)} methods on {len(drawn)} tasks, {steps} optimizer steps")
    with workers.begin() as together, progress_bar("compare", steps) as progress:
        results = run_comparison(
            backbone,
            drawn,
            opened,
            compared,
            title=f"{backbone.architecture} on {images.name}: pruned models for new tasks",
            journal=what.out / "runs.jsonl",
            progress=progress,
            workers=together,
        )
    results["command"] = command()
    _write(results, what.out)


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
@options.grouped
def predict(
    file: Annotated[
        Path,
        typer.Argument(
            help="A small model or a bundle: .safetensors; or exported: .onnx, .xml or .pt2 (which may run code)."
        ),
    ],
    images: Annotated[list[str], typer.Argument(help="Image files, folders, and patterns like 'a/*.jpg'.")],
    what: deploy_options.PredictOptions,
    run: options.DeviceOptions,
) -> None:
    """Classes of images with their probabilities.

    In a folder whose subfolders have the classes' names, also accuracy, calibration and what is taken for what. Images
    that cannot be read are named and passed over; the exit code is then 1.
    """
    what.check_outputs()
    found = find_images(images)
    model = open_model(file, run, what.task)
    with progress_bar("predict") as progress:
        answers = ask(model, found, batch=what.batch, progress=progress)
    publish(answers, what)
    if answers.damaged:
        complain(f"error: {len(answers.damaged)} of {len(found)} images could not be read")
        raise typer.Exit(1)


@app.command()
def bundle(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Small models with one backbone. NAME=FILE sets the name of the task.", metavar="FILES..."
        ),
    ],
    out: options.Out = Path("tasks.safetensors"),
    force: options.Force = False,
) -> None:
    """Store small models that share a backbone as one file: the backbone once, and each task's classifier.

    They may differ in nothing else but the running statistics of batch norms. `predict` asks all tasks, or one.
    """
    check_output("--out", out, replace=force)
    named = [_named(text) for text in files]
    save_bundle(named, out)
    together, apart = out.stat().st_size, sum(path.stat().st_size for _, path in named)
    say(f"{out}: {len(named)} tasks, {count_text(together)}B; as separate files {count_text(apart)}B")


def _named(text: str) -> tuple[str | None, Path]:
    """NAME=FILE, or FILE alone; a file whose own name has such a sign is taken as it is."""
    name, sign, file = text.partition("=")
    return (name, Path(file)) if sign and not Path(text).exists() else (None, Path(text))


@app.command()
@options.grouped
def bench(
    model: deploy_options.BenchModelOptions,
    what: deploy_options.BenchOptions,
    place: options.PlaceOptions,
    out: Annotated[Path | None, Option(help="Save as JSON.", rich_help_panel=options.RUN)] = None,
) -> None:
    """Dense against pruned, in one runtime or several: latency, throughput, FLOPs, size, saving that became time."""
    device, grid = place.begin(), what.grid()
    if out is not None:
        check_output("--out", out)
    files = {path: read_pruned(path) for path in what.pruned or ()}
    pruned = {path: state.checkpoint(state.build()) for path, state in files.items()}
    backbone = model.beside(pruned, next((state.create_args for state in files.values()), None))
    dense, see = backbone.model, backbone.preprocessing
    shape = (3, see.size, see.size)
    keeps = what.keep or ([] if files else [0.5])
    copies = pruned_copies(dense, keeps, scope=what.scope, align=what.align, seed=what.seed)
    peers = {}
    if what.against_torch_pruning:
        settings = Settings(scope=what.scope, align=what.align)
        peers = _made_by_torch_pruning(dense, copies, settings, keeps, shape)
    others = {name: checkpoint_of(copy, see) for name, copy in copies.items()}
    threads = [number or torch.get_num_threads() for number in grid.threads]
    with progress_bar("bench") as progress:
        result = run_bench(
            checkpoint_of(dense, see),
            others | {path.name: small for path, small in pruned.items()},
            shape,
            grid,
            peers=peers,
            data=what.task(pruned.values()),
            device=device,
            setting={
                "model": model.model or create_args(dense, find_structure(dense))["name"],
                "scope": find_structure(dense, what.scope).scope,
                "align": what.align,
                "device": str(device),
                "threads": threads[0] if len(threads) == 1 else threads,
                "command": command(),
            },
            progress=progress,
        )
    console.print(bench_table(result))
    for reason in reasons(result):
        say(reason)
    said = " and ".join(map(str, threads))
    say(f"{result['setting']['model']} at {shape[1]} pixels on {device}, {said} threads")
    if out is not None:
        write_atomic(out, f"{json.dumps(result, indent=1, ensure_ascii=False)}\n".encode())
        say(f"{out}")


def _made_by_torch_pruning(
    dense: Any,
    ours: dict[str, Any],
    settings: Settings,
    keeps: list[float],
    shape: tuple[int, ...],
) -> dict[str, Any]:
    from mvp_ext.app.peers import different_shapes, prune_with_torch_pruning

    structure = find_structure(dense, settings.scope)
    made = {}
    for keep in keeps:
        peer = prune_with_torch_pruning(
            dense, structure, Mask.random(structure, keep, 0, settings.align), shape
        )
        different = different_shapes(ours[f"keep {keep:g}"], peer)
        if different:
            raise RuntimeError(
                f"torch-pruning made other shapes, first of {different[0]}: the comparison would be unfair"
            )
        made[f"keep {keep:g}, torch-pruning"] = peer
    return made


def _has(images: Any, task: dict[str, Any]) -> bool:
    return bool(task.get("classes")) and set(task["classes"]) <= set(images.class_names)


def _write(results: dict[str, Any], out: Path) -> None:
    save_results(results, out / "results.json")
    page = save_report(results, out / "report.html", figures=out / "figures")
    console.print(summary_table(results))
    for sentence in said_by_experts(results):
        say(sentence)
    say(f"{page} (open it in a browser), {out / 'results.json'}, {out / 'figures'}")
