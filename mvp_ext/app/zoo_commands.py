"""``mvp-ext zoo build | list | show | verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mvp_ext.app import options
from mvp_ext.app.comparison import zoo_cost
from mvp_ext.app.console import Commands, console, progress_bar, say
from mvp_ext.app.results import count_text, flops_text, seconds_text
from mvp_ext.model.measure import count_parameters
from mvp_ext.pruning.build import build_refined_zoo, build_universal, build_zoo
from mvp_ext.train.cost import Cost
from mvp_ext.zoo.zoo import Zoo

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Pruned models of earlier tasks.")
ZooArgument = Annotated[Path, typer.Argument(metavar="ZOO", help="Directory of the zoo.")]


@app.command()
def build(
    zoo: options.ZooPath = Path("zoo"),
    model: options.Model = "resnet18",
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    data: options.Data = "digits",
    tasks: Annotated[int, typer.Option(help="How many tasks.", rich_help_panel=options.DATA)] = 24,
    classes_per_task: options.ClassesPerTask = 5,
    task_seed: options.TaskSeed = 0,
    max_train: options.MaxTrain = None,
    keep: options.Keep = 0.3,
    scope: options.Scope = None,
    align: options.Align = 8,
    steps: Annotated[
        int, typer.Option(help="Steps after the last removal.", rich_help_panel=options.PRUNING)
    ] = 200,
    steps_per_round: options.StepsPerRound = 10,
    share: options.Share = 0.1,
    criterion: options.Criterion = "taylor",
    learning_rate: options.LearningRate = None,
    refine: Annotated[
        bool,
        typer.Option(
            help="Entries refine one pruned model of all tasks, or each is pruned from the dense model.",
            rich_help_panel=options.PRUNING,
        ),
    ] = True,
    universal: Annotated[
        bool | None,
        typer.Option(
            help="Also one pruned model of all tasks at the zoo's whole cost, a control. Default: with --no-refine."
        ),
    ] = None,
    universal_steps: Annotated[
        int | None, typer.Option(help="Its optimizer steps. Default: as many as the whole zoo took.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Prune the model for many tasks, with distillation, and keep the results.

    What the zoo already has is passed over: after Ctrl-C or a crash the same command goes on where it was.
    """
    options.set_threads(threads)
    backbone = options.backbone_of(model, weights, pretrained, image_size, mean, std, device=device)
    drawn = options.tasks_of(options.data_of(data), tasks, classes_per_task, task_seed, "zoo", max_train)
    opened = Zoo(zoo)
    have = 0
    for task in drawn:
        if task.name in opened:
            have += 1
            if opened[task.name].task.get("fingerprint") != task.fingerprint:
                raise ValueError(
                    f"{zoo}: entry {task.name!r} is of another task than the one asked for (other data, seed, classes "
                    "a task or images a class); give another --zoo"
                )
    if have:
        say(f"{have} of {tasks} entries are there already")
    schedule = options.schedule_of(steps, steps_per_round, share, criterion)
    recipe = options.recipe_of(backbone, learning_rate)
    common = {
        "keep": keep,
        "scope": scope,
        "align": align,
        "schedule": schedule,
        "recipe": recipe,
        "seed": seed,
    }
    with progress_bar("zoo") as progress:
        build = build_refined_zoo if refine else build_zoo
        build(backbone, drawn, opened, progress=progress, **common)  # type: ignore[arg-type]
        if not refine if universal is None else universal:
            build_universal(backbone, drawn, opened, steps=universal_steps, progress=progress, **common)  # type: ignore[arg-type]
    cost = zoo_cost(opened)
    say(
        f"{zoo}: {cost['entries']} entries, mean accuracy {100 * (cost['accuracy'] or 0):.1f} %, "
        f"{flops_text(cost['flops'])} and {seconds_text(cost['seconds'])} in all"
    )


@app.command("list")
def list_(zoo: ZooArgument = Path("zoo")) -> None:
    """The zoo's entries, one line each."""
    opened = Zoo(zoo, create=False)
    table = Table()
    table.add_column("entry")
    table.add_column("classes")
    for name in ("keep", "accuracy (%)", "steps", "FLOPs", "time"):
        table.add_column(name, justify="right")
    for entry in opened.entries():
        cost = Cost.from_dict(entry.cost)
        table.add_row(
            escape(entry.name),
            escape(", ".join(map(str, entry.task.get("classes", ())))),
            f"{entry.keep:.2f}",
            "" if entry.accuracy is None else f"{100 * entry.accuracy:.1f}",
            str(entry.steps),
            flops_text(cost.flops),
            seconds_text(cost.seconds),
        )
    console.print(table)
    known = opened.backbone
    if known is not None:
        say(f"{table.row_count} entries of {known.architecture}, structure {known.structure_fingerprint}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="The entry.")], zoo: ZooArgument = Path("zoo")) -> None:
    """One entry: its task, what it keeps of each layer, what it cost."""
    entry = Zoo(zoo, create=False)[name]
    facts = {
        "task": ", ".join(map(str, entry.task.get("classes", ()))),
        "data": entry.task.get("data", ""),
        "model": entry.architecture,
        "accuracy": "unknown" if entry.accuracy is None else f"{100 * entry.accuracy:.1f} %",
        "keep": f"{entry.keep:.3f} of all units",
        "parameters": count_text(count_parameters(entry.load().model)),
        "cost": f"{entry.steps} steps, {flops_text(Cost.from_dict(entry.cost).flops)}, "
        + seconds_text(Cost.from_dict(entry.cost).seconds),
        "created": entry.created,
        "file": entry.path,
        "sha256": entry.sha256,
    }
    for key, value in facts.items():
        console.print(f"[bold]{key:<11}[/]{escape(str(value))}", soft_wrap=True)
    table = Table("layer", "kept", "of", "")
    for layer, bits in entry.mask.layers.items():
        kept, units = int(bits.sum()), bits.numel()
        table.add_row(layer, str(kept), str(units), "█" * round(20 * kept / units))
    console.print(table)


@app.command()
def verify(
    zoo: ZooArgument = Path("zoo"),
    repair: Annotated[
        bool, typer.Option(help="Remove what is damaged, so that `zoo build` makes it again.")
    ] = False,
) -> None:
    """Read every file and name each that is damaged, missing or nobody's. Exit code 1 if there is one."""
    opened = Zoo(zoo, create=False)
    problems = opened.verify(repair=repair)
    for problem in problems:
        console.print(str(problem), style="red", markup=False, soft_wrap=True)
    if problems:
        say(f"{len(problems)} problems" + (", removed" if repair else "; --repair removes them"))
        raise typer.Exit(0 if repair else 1)
    say(f"{zoo}: {len(opened)} entries, all sound")
