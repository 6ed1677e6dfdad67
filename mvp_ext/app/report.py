"""One self-contained HTML page of a comparison: a table, figures with captions, what was measured on what.

The page loads nothing: its figures are data URIs, and a content security policy says so to the browser. It follows the
reader's light or dark setting.
"""

from __future__ import annotations

import math
import os
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mvp_ext.app import plots
from mvp_ext.app.results import (
    ArmSummary,
    Results,
    chance_overlap,
    check_results,
    count_text,
    flops_text,
    rank_correlation,
    seconds_text,
    summarise,
)
from mvp_ext.app.tables import Side, Table
from mvp_ext.storage import write_atomic

PROVENANCE = (
    "Meta-Vote Pruning (Zhao, Zhou, Long, Jiang, Zhang: Voting from Nearest Tasks, ECML PKDD 2023, arXiv 2301.11560). "
    "A re-implementation from the abstract and secondary sources; hyper-parameters are ours; the paper's own numbers "
    "were not verified."
)
DIGITS_NOTE = (
    "scikit-learn's digits are a demonstration: ten classes in all, so five-class tasks overlap heavily, and the zoo's "
    "tasks share classes with the held-out ones. That flatters voting."
)

# A difference whose p is smaller is one.
SIGNIFICANT = 0.05


def save_report(
    results: Results, path: str | os.PathLike[str], *, figures: str | os.PathLike[str] | None = None
) -> Path:
    """Write the page, each file whole or not at all; what was there stays where one cannot be written.

    Args:
        results: of a comparison (``results.py``).
        path: of the page; its parent folders are made.
        figures: a folder for the page's figures as PNG files, too.

    Returns:
        The page's path.

    Raises:
        ValueError: the results lack what every report needs.
        OSError: a file could not be written.
    """
    path = Path(path)
    page = render_report(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())
    if figures is not None:
        folder = Path(figures)
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in plots.figures(results).items():
            write_atomic(folder / f"{name}.png", plots.to_png(draw))
    return path


def render_report(results: Results) -> str:
    """The page as text. Raises ValueError for results that lack what every report needs (``results.py``)."""
    check_results(results)
    arms = summarise(results)
    drawn = plots.figures(results)
    captions = {
        "accuracy": "Accuracy on held-out test images against fine-tuning steps; bands are ± one standard error over "
        "tasks. Steps are only part of the cost: iterative pruning also scores and removes units between them.",
        "cost": "Accuracy against everything spent on one task: training (three forward passes a sample and step), "
        "scoring, similarity. The zoo and the universal model, paid once for all tasks, are not in it.",
        "overlap": _overlap_caption(results) if "overlap" in drawn else "",
        "layers": "Units kept in each layer against the dense model's. All arms are compared at the same shapes.",
        "latency": "Latency of one forward pass, the models timed in turn in one process. Arms of the same shapes "
        "share one measurement.",
    }
    titles = {
        "accuracy": "Accuracy against steps",
        "cost": "Accuracy against cost",
        "overlap": "Overlap against similarity",
        "layers": "Kept units per layer",
        "latency": "Latency",
    }
    sections = [figure(titles[name], draw, captions[name]) for name, draw in drawn.items()]
    body = f"""<p class="lead">{_lead(results, arms)}</p>
{bullets("Findings", [*findings(results, arms), *said_by_experts(results)])}
<div class="wide">{summary_table(results).html()}</div>
<p class="note">Accuracy: mean ± standard error over {max(arm.tasks for arm in arms)} tasks. Differences are
paired, task by task. A multiply-add counts as two FLOPs.{_dense_note(results)}</p>
{"".join(sections)}
{bullets("Read this before quoting it", limits(results))}
{facts("Setting", results["setting"])}
{facts("Machine and versions", results.get("environment", {}))}
<p class="note">{escape(" · ".join(x for x in (results.get("command"), results.get("created")) if x))}</p>"""
    return page(results["title"], body)


def page(title: str, body: str) -> str:
    """A whole page around ``body`` (HTML). It loads nothing, and tells the browser so."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
{body}
</main></body>
</html>
"""


def summary_table(results: Results) -> Table:
    """One row an arm, and one for the dense model: the page's table, for a terminal and for Markdown too."""
    arms = summarise(results)
    columns: list[tuple[str, Side]] = [("arm", "left")]
    columns += [
        (heading, "right")
        for heading in (
            "accuracy (%)",
            f"{arms[0].name} minus this",
            "steps",
            "cost a task",
            "time a task",
            "parameters",
            "FLOPs an image",
            "times as fast as dense",
        )
    ]
    return Table(columns, _summary_rows(results, arms), results["title"])


def _summary_rows(results: Results, arms: Sequence[ArmSummary]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        model = results["models"][arm.model]
        rows.append(
            (
                arm.name,
                arm.accuracy.percent(),
                "" if arm.difference is None else arm.difference.percent(sign=True),
                f"{arm.steps:g}",
                flops_text(arm.flops),
                seconds_text(arm.seconds),
                count_text(model["parameters"]),
                flops_text(model["flops"]),
                _speed_up(results, arm.model),
            )
        )
    dense, accuracy = results["models"]["dense"], results.get("dense_accuracy")
    rows.append(
        (
            "dense model, ridge head",
            "" if accuracy is None else f"{100 * accuracy:.1f}",
            *("",) * 4,
            count_text(dense["parameters"]),
            flops_text(dense["flops"]),
            "1",
        )
    )
    return rows


def findings(results: Results, arms: Sequence[ArmSummary]) -> list[str]:
    """What the numbers say of the first arm, in sentences; one that a paired t-test does not find is none."""
    first, sentences = arms[0], []
    for arm in arms[1:]:
        if arm.difference is None:
            continue
        points = f"{arm.difference.percent(sign=True)} points"
        if arm.difference.error is None:
            verdict = f"{first.name} against {arm.name}: {points} on one task, which proves nothing"
        elif arm.p is None or arm.p >= SIGNIFICANT:
            tested = "the same on every task" if arm.p is None else f"p = {arm.p:.2g}, paired t-test"
            verdict = f"no clear difference between {first.name} and {arm.name} ({points}; {tested})"
        else:
            word = "more" if arm.difference.value > 0 else "less"
            verdict = (
                f"{first.name} is {word} accurate than {arm.name} ({points}; p = {arm.p:.2g}, paired t-test)"
            )
        if first.flops > 0 and arm.flops > 0 and not 0.5 < arm.flops / first.flops < 2:
            times = arm.flops / first.flops
            ratio = f"{times:.3g} times" if times > 1 else f"1/{1 / times:.3g} of"
            verdict += f", which costs {ratio} its FLOPs a task"
        sentences.append(verdict[0].upper() + verdict[1:] + ".")
    return sentences


def said_by_experts(results: Results) -> list[str]:
    """Of each arm that asked a zoo of experts: what they knew of the tasks, and what came of it."""
    sentences = []
    for arm in results["arms"]:
        choices = [
            choice for task in arm["tasks"] if (choice := task.get("choice")) and "known_share" in choice
        ]
        if choices:
            known, told = (
                math.fsum(choice[key] for choice in choices) / len(choices)
                for key in ("known_share", "told_by_experts")
            )
            heard = sum(choice["told_by_experts"] > 0 for choice in choices)
            sentences.append(
                f"{arm['name']}: the zoo knows {known:.0%} of a task's classes on average; experts told {told:.0%} "
                f"of the training images, on {heard} of {len(choices)} tasks."
            )
    return sentences


def limits(results: Results) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    sentences = [*results.get("notes", ())]
    if str(results["setting"].get("data", "")).startswith("digits"):
        sentences.insert(0, DIGITS_NOTE)
    zoo = results.get("zoo")
    if zoo:
        sentences.append(
            f"The zoo's {zoo['entries']} entries cost {seconds_text(zoo['seconds'])} and "
            f"{flops_text(zoo['flops'])} once, which is in no arm's cost"
            + (f"; their mean accuracy is {100 * zoo['accuracy']:.1f} %." if zoo.get("accuracy") else ".")
        )
    if len(results["arms"]) > 2:
        sentences.append(
            f"The {len(results['arms']) - 1} p values are not corrected for being several: one in "
            f"{1 / SIGNIFICANT:.0f} comparisons of equal methods looks like a difference."
        )
    return [*sentences, PROVENANCE]


def _lead(results: Results, arms: Sequence[ArmSummary]) -> str:
    first, model = arms[0], results["models"][arms[0].model]
    dense = results["models"]["dense"]
    text = (
        f"{first.name}: {first.accuracy.percent()} % with {model['parameters'] / dense['parameters']:.0%} of the dense "
        f"model's parameters and {model['flops'] / dense['flops']:.0%} of its FLOPs, "
        f"after {first.steps:g} steps in {seconds_text(first.seconds)} a task."
    )
    return escape(text)


def _dense_note(results: Results) -> str:
    batches = [timed["batch"] for timed in results["models"]["dense"]["latency"]]
    return (
        f" Latency: median at batch {', '.join(map(str, batches))}, times as fast as dense."
        if batches
        else ""
    )


def _speed_up(results: Results, name: str) -> str:
    dense = {timed["batch"]: timed["median_ms"] for timed in results["models"]["dense"]["latency"]}
    timed = results["models"][name]["latency"]
    return ", ".join(f"{dense[t['batch']] / t['median_ms']:.2f}×" for t in timed if t["batch"] in dense)


def _overlap_caption(results: Results) -> str:
    points = results["overlap"]
    x, y = [p["similarity"] for p in points], [p["iou"] for p in points]
    rho = rank_correlation(x, y)
    return (
        f"Each point is a pair of tasks: the overlap of their two masks against the tasks' similarity; mean overlap "
        f"{sum(y) / len(y):.2f}, chance {chance_overlap(results['keep']):.2f} (two independent draws of the share r = "
        f"{results['keep']:g} overlap by about r/(2−r))."
        + (
            ""
            if rho is None
            else f" Rank correlation {rho:+.2f}; pairs share tasks, so they are not independent."
        )
    )


def figure(title: str, draw: object, caption: str) -> str:
    """A figure in its light and dark version, as data URIs, with its caption."""
    light, dark = (_data_uri(plots.to_svg(draw, theme)) for theme in (plots.LIGHT, plots.DARK))  # type: ignore[arg-type]
    return (
        f"<figure><h2>{escape(title)}</h2><div class='wide'><picture>"
        f"<source media='(prefers-color-scheme: dark)' srcset='{dark}'>"
        f"<img src='{light}' alt='{escape(title, quote=True)}'></picture></div>"
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg).decode()}"


def bullets(title: str, sentences: Sequence[str]) -> str:
    """A titled list; nothing where there is no sentence."""
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<section><h2>{escape(title)}</h2><ul>{items}</ul></section>\n"


def facts(title: str, values: Results) -> str:
    """Names and values behind a title that opens."""
    if not values:
        return ""
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())
    return f"<details><summary>{escape(title)}</summary><dl>{rows}</dl></details>\n"


_STYLE = """
:root { --surface: #fcfcfb; --ink: #1c1c1a; --muted: #6a6963; --line: #e1e0d9; --accent: #2a78d6; }
@media (prefers-color-scheme: dark) {
  :root { --surface: #1a1a19; --ink: #f4f4f2; --muted: #a3a29a; --line: #34342f; --accent: #3987e5; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--surface); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.lead { font-size: 1.1rem; margin: 0 0 1rem; }
.note, figcaption { color: var(--muted); font-size: .9rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%;
  margin-top: 1.5rem; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: bottom; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; white-space: normal; min-width: 4rem; }
.left { text-align: left; } .right { text-align: right; }
tbody tr:first-child td { font-weight: 600; } tbody tr:last-child td { color: var(--muted); }
figure { margin: 0; } figure img { width: 100%; min-width: 34rem; height: auto; display: block; }
li { margin: .25rem 0; max-width: 50rem; }
details { border-top: 1px solid var(--line); padding: .7rem 0; } summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""
