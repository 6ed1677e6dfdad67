"""One self-contained page of a study: a verdict per hypothesis, tables against the control, figures, limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mvp_ext.app import plots
from mvp_ext.app.report import PROVENANCE, bullets, facts, figure, page, table
from mvp_ext.app.results import flops_text, seconds_text
from mvp_ext.model.storage import write_atomic

from .arms import ARMS
from .figures import figures
from .stats import by_task, mean_error
from .study import Study
from .summary import Table, collect
from .units import Unit
from .verdicts import Questions, Verdict, judge

CONTROL = "universal"


def write_report(
    study: Study, units: Sequence[Unit], *, publish: Path | None = None, command: str = ""
) -> Path:
    """Write ``report.html``, ``results.json`` and ``figures/`` into the study's folder; returns the page's path.

    ``publish``: root of a checkout that gets the figures (docs/figures/study) and the results too.
    """
    results = collect(study, units, command)
    answers = Table(results)
    verdicts, _ = judge(answers)
    results["verdicts"] = [vars(verdict) for verdict in verdicts]
    results["limits"] = limits(results)
    results["tables"] = {
        f"{world}, {split}": arm_rows(answers, world, split)
        for world in answers.worlds
        for split in answers.splits(world)
    }
    drawn = figures(answers)
    path = study.folder / "report.html"
    write_atomic(path, render(results, answers, verdicts, drawn).encode())
    places = [(study.folder / "figures", study.folder / "results.json")]
    if publish is not None:
        kept = publish / "benchmarks" / "results" / study.config.machine / f"study_{study.config.name}.json"
        places.append((publish / "docs" / "figures" / "study", kept))
    for folder, file in places:
        folder.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        for name, (_, draw, _) in drawn.items():
            (folder / f"{study.config.name}_{name}.png").write_bytes(plots.to_png(draw))
        write_atomic(file, (_dumps(results) + "\n").encode())
    return path


def render(results: dict[str, Any], answers: Table, verdicts: Sequence[Verdict], drawn: Any) -> str:
    """The page as text."""
    done, total = (sum(part[key] for part in results["parts"]) for key in ("done", "total"))
    state = (
        ""
        if done == total
        else f" <strong>{done} of {total} units of work are done; the rest is missing here.</strong>"
    )
    body = [
        f'<p class="lead">{escape(_lead(verdicts))}{state}</p>',
        "<h2>Verdicts</h2>",
        *(_verdict(verdict) for verdict in verdicts),
    ]
    for name in results["tables"]:
        rows = results["tables"][name]
        if rows:
            body.append(f"<h2>{escape(name)}</h2><div class='wide'>{table(COLUMNS, rows)}</div>")
            body.append(f'<p class="note">{escape(NOTE)}</p>')
    body += [_time_to_accuracy(answers), *(figure(*parts) for parts in drawn.values())]
    body.append(bullets("Read this before quoting it", limits(results)))
    body.append(bullets("The arms", [f"{arm.name}: {arm.about}" for arm in ARMS.values()]))
    for world, about in answers.worlds.items():
        rates = {arm: f"{rate:g}; tried: {about['rates'][arm]}" for arm, rate in about["chosen"].items()}
        body.append(facts(f"{world}: learning rates chosen on development tasks (and their accuracy)", rates))
        made = {
            k: f"{seconds_text(v['seconds'])}, {flops_text(v['flops'])}" for k, v in about["made"].items()
        }
        body.append(facts(f"{world}: what was made once, and its cost", made))
        for name, tasks in about["tasks"]["tasks"].items():
            lists = {task: ", ".join(classes) for task, classes in tasks.items()}
            body.append(facts(f"{world}: classes of the {name} tasks", lists))
        hidden = {"classes": ", ".join(about["tasks"]["hidden classes"])}
        body.append(facts(f"{world}: classes hidden from the zoo", hidden))
    body.append(facts("Machine and versions", {**results["environment"], "commit": results["commit"]}))
    ends = " · ".join(x for x in (results["command"], results["created"]) if x)
    return page(results["title"], "\n".join([*body, f'<p class="note">{escape(ends)}</p>']))


COLUMNS = (
    ("arm", "left"),
    ("accuracy (%)", "right"),
    (f"minus {CONTROL}", "right"),
    ("p, corrected", "right"),
    ("tasks, runs", "right"),
    ("steps", "right"),
    ("FLOPs a task", "right"),
    ("time a task", "right"),
    ("made once: time", "right"),
    ("learning rate", "right"),
)
NOTE = (
    "Accuracy: mean ± standard error over tasks, each the mean of its seeds. Differences are paired; p is a two-sided "
    "paired t-test over tasks, corrected (Holm) within this table. FLOPs and time count the dense pass, similarity, "
    "scoring, merging, statistics, heads and training; what is made once for all tasks is in the column of that name."
)


def arm_rows(answers: Table, world: str, split: str) -> list[list[str]]:
    """One row an arm at the default point, best first, and the dense model."""
    questions = Questions(answers)
    about = answers.worlds[world]
    compared = {
        arm: questions.ask(world, split, arm, CONTROL) if arm != CONTROL else None
        for arm in answers.arms(world, split)
    }
    questions.correct()
    rows = []
    for arm, comparison in compared.items():
        runs = answers.runs(world, split, arm)
        means = list(by_task({key: row["accuracy"] for key, row in runs.items()}).values())
        mean, error = mean_error(means)
        cost = {k: sum(r[k] for r in runs.values()) / len(runs) for k in ("steps", "flops", "seconds")}
        once = answers.shared_cost(world, arm)["seconds"]
        rate = about["chosen"].get(arm)
        difference = adjusted = ""
        if comparison is not None:
            paired = comparison.paired
            difference = f"{100 * paired.difference:+.1f}" + (
                f" ± {100 * paired.error:.1f}" if paired.error else ""
            )
            adjusted = f"{comparison.adjusted:.2g}"
        row = [
            arm,
            f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if error is not None else ""),
            difference,
            adjusted,
            f"{len(means)}, {len(runs)}",
            f"{cost['steps']:g}",
            flops_text(cost["flops"]),
            seconds_text(cost["seconds"]),
            seconds_text(once) if once else "",
            f"{rate:g}" if rate else "",
        ]
        rows.append((mean, row))
    rows.sort(key=lambda item: -item[0])
    if rows and (dense := about["dense"].get(split)):
        blank = [""] * (len(COLUMNS) - 3)
        rows.append((0.0, ["dense, ridge head", f"{100 * sum(dense) / len(dense):.1f}", "", *blank]))
    return [row for _, row in rows]


def _time_to_accuracy(answers: Table) -> str:
    """What each arm needs to reach full iterative pruning's mean accuracy on the tasks that both have."""
    rows = []
    for world in answers.worlds:
        goal = answers.scores(world, "shared", "iterative, full")
        for arm in answers.arms(world, "shared") if goal else []:
            for steps in answers.values(world, "shared", arm, "steps"):
                runs = answers.runs(world, "shared", arm, steps=steps)
                common = goal.keys() & runs.keys()
                if not common or arm == "iterative, full":
                    continue
                margin = sum(runs[k]["accuracy"] - goal[k] for k in common) / len(common)
                if margin >= 0:
                    kinds = ("steps", "flops", "seconds")
                    trained, flops, seconds = (sum(runs[k][c] for k in common) / len(common) for c in kinds)
                    costs = [f"{trained:g}", flops_text(flops), seconds_text(seconds)]
                    rows.append([world, arm, *costs, f"{100 * margin:+.1f}"])
                    break
    if not rows:
        return ""
    columns = [("world", "left"), ("arm", "left"), ("steps", "right"), ("FLOPs a task", "right")]
    columns += [("time a task", "right"), ("above it by", "right")]
    return f"<h2>Cost to reach full iterative pruning's accuracy</h2><div class='wide'>{table(columns, rows)}</div>"


def limits(results: dict[str, Any]) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    sentences = list(results["notes"])
    for world, about in results["worlds"].items():
        if not about["pretrained here"]:
            sentences.append(
                f"{world}: the backbone comes with weights and may have seen every class, the hidden ones too; only "
                "a backbone that this program pre-trains has not."
            )
        if about["tasks"]["left out"]:
            sentences.append(
                f"{world}: left out, for want of the files: {', '.join(about['tasks']['left out'])}."
            )
    sentences.append(
        "Held-out tasks of one world share classes: their number overstates the independent evidence."
    )
    sentences.append(
        "Seconds are those of one core (CPU time of a process with one thread): wall-clock on a machine that does "
        "nothing else."
        if results["config"]["clock"] == "cpu"
        else "Seconds are wall-clock, taken with as many processes as were started."
    )
    return [*sentences, PROVENANCE]


def _lead(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(f"{verdict.name} {verdict.verdict}" for verdict in verdicts) + "."


def _verdict(verdict: Verdict) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict.sentences)
    title = f"{verdict.name}: {verdict.claim} — {verdict.verdict}"
    return f"<section><h3>{escape(title)}</h3><ul>{items}</ul></section>"


def _dumps(results: dict[str, Any]) -> str:
    """JSON with one line a row, so that a later run's difference can be read."""
    rows = ",\n  ".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({**results, "rows": "ROWS"}, indent=1, ensure_ascii=False)
    return head.replace('"ROWS"', f"[\n  {rows}\n ]")
