"""One self-contained page of a study: a verdict per hypothesis, tables against the control, figures, limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mvp_ext.app import plots
from mvp_ext.app.report import PROVENANCE, bullets, facts, figure, page
from mvp_ext.app.results import flops_text, seconds_text
from mvp_ext.app.tables import Table
from mvp_ext.storage import write_atomic

from .arms import ARMS
from .config import Config
from .figures import figures
from .study import Study
from .summary import Answers, collect
from .tables import (
    COLUMNS,
    FACTOR_COLUMNS,
    FACTOR_NOTE,
    NOTE,
    TIME_COLUMNS,
    TIME_NOTE,
    TIME_TITLE,
    Columns,
    arm_rows,
    factor_rows,
    time_rows,
)
from .units import Unit
from .verdicts import Verdict, judge


def write_report(
    study: Study, units: Sequence[Unit], *, publish: Path | None = None, command: str = ""
) -> Path:
    """Write ``report.html``, ``results.json`` and ``figures/`` into the study's folder; returns the page's path.

    ``publish``: root of a checkout that gets the figures (docs/figures/study) and the results too.
    """
    results = collect(study, units, command)
    answers = Answers(results)
    verdicts, _ = judge(answers)
    results["verdicts"] = [vars(verdict) for verdict in verdicts]
    results["limits"] = limits(results)
    results["tables"] = {
        f"{world}, {split}": arm_rows(answers, world, split)
        for world in answers.worlds
        for split in answers.splits(world)
    }
    results["time to accuracy"] = time_rows(answers)
    results["table notes"] = {"arms": NOTE, "time": TIME_NOTE, "factors": FACTOR_NOTE}
    results["table columns"] = {
        kind: [heading for heading, _ in columns]
        for kind, columns in (("arms", COLUMNS), ("time", TIME_COLUMNS), ("factors", FACTOR_COLUMNS))
    }
    results["factors"] = {world: factor_rows(answers, world) for world in answers.worlds}
    drawn = figures(answers)
    path = study.folder / "report.html"
    write_atomic(path, render(results, answers, verdicts, drawn).encode())
    places = [(study.folder / "figures", study.folder / "results.json")]
    if publish is not None:
        places.append((publish / "docs" / "figures" / "study", published(publish, study.config)))
    for folder, file in places:
        folder.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        for name, (_, draw, _) in drawn.items():
            (folder / f"{study.config.name}_{name}.png").write_bytes(plots.to_png(draw))
        write_atomic(file, (_dumps(results) + "\n").encode())
    return path


def published(root: Path, config: Config) -> Path:
    """The results in a checkout."""
    return root / "benchmarks" / "results" / config.machine / f"study_{config.name}.json"


def judge_again(path: Path, commit: str) -> None:
    """New verdicts on published results, as the code is now; what was measured stays."""
    results = json.loads(path.read_text())
    verdicts, _ = judge(Answers(results))
    results |= {"verdicts": [vars(verdict) for verdict in verdicts], "judged at commit": commit}
    write_atomic(path, (_dumps(results) + "\n").encode())


def render(results: dict[str, Any], answers: Answers, verdicts: Sequence[Verdict], drawn: Any) -> str:
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
            body += _section(name, COLUMNS, rows, NOTE)
    body += _section(TIME_TITLE, TIME_COLUMNS, results["time to accuracy"], TIME_NOTE)
    for world, rows in results["factors"].items():
        body += _section(f"{world}, shared: one factor at a time", FACTOR_COLUMNS, rows, FACTOR_NOTE)
    body += [figure(*parts) for parts in drawn.values()]
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
        "Each world and keep ratio has one zoo and one universal model. Seeds are of the targets: no ± and no p holds "
        "what training those again would change."
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


def _section(title: str, columns: Columns, rows: list[list[str]], note: str = "") -> list[str]:
    if not rows:
        return []
    text = f"<h2>{escape(title)}</h2><div class='wide'>{Table(columns, rows).html()}</div>"
    return [text, f'<p class="note">{escape(note)}</p>'] if note else [text]


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
