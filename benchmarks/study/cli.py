"""The study from the command line.

python benchmarks/study run    --config cpu --out DIR --files DIR [--only TEXT] [--budget-seconds N]
python benchmarks/study status --config cpu --out DIR
python benchmarks/study report --config cpu --out DIR [--publish]
python benchmarks/study judge  --config cpu    # the verdicts on published results, anew

``run`` may be stopped and started again at any time, and started several times at once on one --out: the processes
share the work. ``--only`` runs the units whose part or key contains the text, and what they need.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mvp_ext.app.environment import commit
from mvp_ext.app.results import seconds_text

from . import runner
from .config import load_config
from .study import Study
from .units import Unit, plan, select

ROOT = Path(__file__).resolve().parent.parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 where a unit failed."""
    parser = argparse.ArgumentParser(
        prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "status", "report", "judge"])
    parser.add_argument("--config", default="smoke", help="smoke, cpu, h200, or a TOML file")
    parser.add_argument("--out", type=Path, help="the study's folder; of every command but judge")
    parser.add_argument("--files", type=Path, default=Path("data"), help="where data and weights lie")
    parser.add_argument("--only", action="append", default=[], help="parts or keys that contain this text")
    parser.add_argument(
        "--budget-seconds", type=float, default=float("inf"), help="begin no unit after this long"
    )
    parser.add_argument(
        "--publish", action="store_true", help="report: also into docs/figures/study and benchmarks/results"
    )
    options = parser.parse_args(arguments)
    config = load_config(options.config)
    if options.command == "judge":
        from .report import judge_again, published

        path = published(ROOT, config)
        if not path.exists():
            parser.error(f"judge: --config: expected one with published results, and there is no {path}")
        judge_again(path, commit(ROOT, "benchmarks/study"))
        return 0
    if options.out is None:
        parser.error(f"{options.command}: --out: expected the study's folder")
    study = Study(config, options.out, options.files)
    units = select(plan(study.config), options.only)
    console = Console(stderr=True)
    if options.command == "run":
        return _run(study, units, options.budget_seconds, console)
    if options.command == "status":
        Console().print(status_table(study, units))
        return 0
    from .report import write_report  # draws figures: not needed for the other commands

    command = "python benchmarks/study report " + shlex.join(list(arguments or sys.argv[1:])[1:])
    page = write_report(study, units, publish=ROOT if options.publish else None, command=command)
    console.print(f"{page}")
    return 0


def _run(study: Study, units: Sequence[Unit], budget_seconds: float, console: Console) -> int:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        line = bar.add_task("", total=len(units))

        def show(unit: Unit, done: int, total: int) -> None:
            bar.update(line, completed=done, description=f"{unit.part}: {unit.key}")
            if not console.is_terminal:
                console.print(f"{done}/{total} {unit.key}", highlight=False, soft_wrap=True)

        failed = runner.run(study, units, budget_seconds=budget_seconds, on_unit=show)
        bar.update(line, completed=sum(unit.key in study.journal for unit in units), description="")
    if failed:
        console.print(
            f"{len(failed)} unit(s) failed, see {study.folder / 'errors.log'}: {', '.join(failed[:5])}"
        )
    return 1 if failed else 0


def status_table(study: Study, units: Sequence[Unit]) -> Table:
    """What is done, what it took, and about how long the rest will take in one process."""
    table = Table("part", "done", "spent", "left, about")
    rows = runner.progress(study.journal, units)
    for row in rows:
        left = "?" if row["left"] is None else seconds_text(row["left"])
        table.add_row(row["part"], f"{row['done']}/{row['total']}", seconds_text(row["seconds"]), left)
    done, total = (sum(row[key] for row in rows) for key in ("done", "total"))  # type: ignore[literal-required]
    table.add_row("all", f"{done}/{total}", seconds_text(sum(row["seconds"] for row in rows)), "")
    return table
