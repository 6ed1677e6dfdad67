"""``mvp-ext zoo build | list | show | verify | push | pull | merge``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mvp_ext.app import data_options, options
from mvp_ext.app.comparison import zoo_cost
from mvp_ext.app.console import Commands, console, plain, say
from mvp_ext.app.progress import progress_bar
from mvp_ext.app.results import count_text, flops_text, kept_text, seconds_text
from mvp_ext.app.tables import Side, Table
from mvp_ext.model.families import find_structure
from mvp_ext.model.measure import count_parameters
from mvp_ext.pruning.build import (
    UNIVERSAL_SHARE,
    build_refined_zoo,
    build_universal,
    build_zoo,
    one_by_one,
    planned_zoo_steps,
)
from mvp_ext.pruning.clusters import CLUSTERED_SHARE, build_clustered_zoo, of_several_kinds
from mvp_ext.train import parallel
from mvp_ext.train.cost import Cost
from mvp_ext.zoo.remote import shown_url
from mvp_ext.zoo.shared import CLUSTERS
from mvp_ext.zoo.travel import merge_zoos, pull_zoo, push_zoo
from mvp_ext.zoo.zoo import Zoo

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Pruned models of earlier tasks.")
LISTED: tuple[tuple[str, Side], ...] = (
    *(("entry", "left"), ("classes", "left"), ("keep", "right"), ("accuracy (%)", "right")),
    *(("steps", "right"), ("FLOPs", "right"), ("time", "right")),
)
Url = Annotated[
    str, typer.Argument(metavar="URL", help="A folder, s3://…, gs://…, hf://… or another that fsspec knows.")
]
ZooArgument = Annotated[
    Path | None, typer.Argument(metavar="[ZOO]", help="The same, without --zoo.", show_default=False)
]


@app.command()
@options.grouped
def build(
    model: options.ModelOptions,
    data: data_options.DataOptions,
    sampling: data_options.SamplingOptions,
    cut: options.CutOptions,
    schedule: options.ScheduleOptions,
    what: options.BuildOptions,
    run: options.ExecutionOptions,
    workers: options.WorkerOptions,
    zoo: options.ZooPath = Path("zoo"),
) -> None:
    """Prune the model for many tasks, with distillation, and keep the results.

    What the zoo already has is passed over: after Ctrl-C or a crash the same command goes on where it was. Several
    processes or GPUs make the model of all tasks together, and divide the entries: `torchrun --nproc-per-node 2 -m
    mvp_ext zoo build …`.
    """
    device, opened = run.begin_together(), Zoo(zoo)
    backbone = model.backbone(device, seen=opened.preprocessing)
    settings = schedule.applied(cut.settings(opened, backbone, run.seed), what.steps)
    # What the model does not have is said before images are read.
    structure = find_structure(backbone.model, settings.scope)
    with parallel.first_alone():
        images = data.images()
    drawn = sampling.tasks(images, what.tasks, "zoo", data, [], seed=0)
    have = [task for task in drawn if task.name in opened]
    for task in have:
        if opened[task.name].task.get("fingerprint") != task.fingerprint:
            raise ValueError(
                f"{zoo}: entry {task.name!r} is of another task than the one asked for (other data, seed, classes "
                "a task or images a class); give another --zoo"
            )
    if have:
        say(f"{len(have)} of {what.tasks} entries are there already")
    experts, of_kinds = what.experts, what.clusters is not None
    if what.clusters is None and what.refine is None:
        of_kinds = CLUSTERS in opened.facts() or (
            len(opened) == 0 and of_several_kinds(backbone, drawn, settings)
        )
    share = CLUSTERED_SHARE if of_kinds else 0.0 if what.refine is False else UNIVERSAL_SHARE
    first, each = planned_zoo_steps(structure, settings, what.tasks, share)
    total = first + each * len(parallel.mine(range(what.tasks)))
    refined = f"one model of all tasks in {first} optimizer steps, then " if first else ""
    entries = f"experts in {each} steps a task" if of_kinds else f"{what.tasks} entries in {each} steps each"
    say(f"to make: {refined}{entries}")
    if what.with_universal:
        total += total if what.universal_steps is None else what.universal_steps
    with workers.begin() as maker, progress_bar("zoo", total) as progress:
        make = build_zoo if what.refine is False else build_refined_zoo
        if of_kinds:
            make = partial(build_clustered_zoo, clusters=experts)
        make(backbone, drawn, opened, settings, progress=progress, run=maker or one_by_one)
        if what.with_universal:
            build_universal(backbone, drawn, opened, settings, steps=what.universal_steps, progress=progress)
    cost = zoo_cost(opened)
    say(
        f"{zoo}: {cost['entries']} entries, mean accuracy {100 * (cost['accuracy'] or 0):.1f} %, "
        f"{flops_text(cost['flops'])} and {seconds_text(cost['seconds'])} in all"
    )


@app.command("list")
def list_(folder: ZooArgument = None, zoo: options.ZooPath = Path("zoo")) -> None:
    """The zoo's entries, one line each."""
    opened = Zoo(folder or zoo, create=False)
    rows = []
    for entry in opened.entries():
        cost = Cost.from_dict(entry.cost)
        rows.append(
            (
                entry.name,
                ", ".join(map(str, entry.task.get("classes", ()))),
                f"{entry.keep:.2f}",
                "" if entry.accuracy is None else f"{100 * entry.accuracy:.1f}",
                str(entry.steps),
                flops_text(cost.flops),
                seconds_text(cost.seconds),
            )
        )
    console.print(Table(LISTED, rows))
    known = opened.backbone
    if known is not None:
        say(f"{len(rows)} entries of {known.architecture}, structure {known.structure_fingerprint}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The entry.")],
    folder: ZooArgument = None,
    zoo: options.ZooPath = Path("zoo"),
) -> None:
    """One entry: its task, what it keeps of each layer, what it cost."""
    entry = Zoo(folder or zoo, create=False)[name]
    facts = {
        "task": ", ".join(map(str, entry.task.get("classes", ()))),
        "data": entry.task.get("data", ""),
        "model": entry.architecture,
        "accuracy": "unknown" if entry.accuracy is None else f"{100 * entry.accuracy:.1f} %",
        "keep": kept_text(entry.mask),
        "parameters": count_text(count_parameters(entry.load().model)),
        "cost": f"{entry.steps} steps, {flops_text(Cost.from_dict(entry.cost).flops)}, "
        + seconds_text(Cost.from_dict(entry.cost).seconds),
        "created": entry.created,
        "file": entry.path,
        "sha256": entry.sha256,
    }
    for key, value in facts.items():
        console.print(Text.assemble((f"{key:<11}", "bold"), plain(str(value))), soft_wrap=True)
    rows = []
    for layer, bits in entry.mask.layers.items():
        kept, units = int(bits.sum()), bits.numel()
        rows.append((layer, str(kept), str(units), "█" * round(20 * kept / units)))
    console.print(Table([("layer", "left"), ("kept", "right"), ("of", "right"), ("", "left")], rows))


@app.command()
def verify(
    folder: ZooArgument = None,
    zoo: options.ZooPath = Path("zoo"),
    repair: Annotated[
        bool,
        typer.Option(
            help="Mend the index from the files, and remove what is damaged, so that `zoo build` makes it again."
        ),
    ] = False,
) -> None:
    """Read every file and name each that is damaged, missing or nobody's. Exit code 1 if there is one."""
    opened = Zoo(folder or zoo, create=False)
    problems = opened.verify(repair=repair)
    for problem in problems:
        console.print(Text(plain(str(problem)), style="red"), soft_wrap=True)
    if problems:
        say(
            f"{len(problems)} problems"
            + (", mended or removed" if repair else "; --repair mends or removes them")
        )
        raise typer.Exit(0 if repair else 1)
    say(f"{opened.path}: {len(opened)} entries, all sound")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="ZOO", help="Directory of the zoo.")],
    url: Url,
    force: Annotated[
        bool, typer.Option("--force", help="Also where what others pushed there is lost.")
    ] = False,
) -> None:
    """Copy a zoo to a URL, with a page that describes it. What is there already is not moved again.

    Who pulls meanwhile gets the zoo that was there before, whole.
    """
    opened = Zoo(folder, create=False)
    with progress_bar("push") as progress:
        push_zoo(opened, url, replace=force, progress=progress)
    say(f"{folder}: {len(opened)} entries are at {shown_url(url)}")


@app.command()
def pull(
    url: Url,
    folder: Annotated[
        Path, typer.Argument(metavar="ZOO", help="A new directory, or one that was pulled from there before.")
    ],
) -> None:
    """Copy the zoo at a URL into a directory, or bring that up to date. Every checksum is compared."""
    with progress_bar("pull") as progress:
        opened = pull_zoo(url, folder, progress=progress)
    say(f"{folder}: {len(opened)} entries of {shown_url(url)}")


@app.command()
def merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="ZOO ZOO…", help="Directories of two or more zoos.")
    ],
    out: Annotated[Path, typer.Option(help="A new directory for the zoo of all their models.")],
) -> None:
    """Make one zoo of several that have one backbone. Models of one name must be the same."""
    with progress_bar("merge") as progress:
        merged = merge_zoos([Zoo(folder, create=False) for folder in folders], out, progress=progress)
    say(f"{out}: {len(merged)} entries")
