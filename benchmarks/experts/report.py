"""What the journals say: questions and answers, tables, figures."""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from study.stats import Scores, holm, mean_of, paired

from mvp_ext.app.environment import environment
from mvp_ext.app.plots import MARKERS, Theme, add_legend, new_figure, to_png
from mvp_ext.journal import Journal
from mvp_ext.model.measure import count_parameters
from mvp_ext.storage import write_atomic
from mvp_ext.zoo.shared import START
from mvp_ext.zoo.zoo import Zoo

from .arms import DENSE, IMAGES, NAMES, PARTS, SPLITS, J
from .runner import ROOT, code, folder_name, journal_at, results_of
from .worlds import HELD_OUT, WORLDS, Prepared


@dataclass(frozen=True)
class Question:
    """``first`` − ``second`` at equal J: above 0 ("superior"), or not below −1 point ("not inferior")."""

    kind: str
    split: str
    images: int
    second: str
    first: str = "default"
    steps: str = "20"


QUESTIONS = tuple(
    Question(kind, split, images, second)
    for images in IMAGES
    for kind, split, second in (
        ("superior", "known", "universal"),
        ("superior", "known", "universal, head of what it knows"),
        ("not inferior", "hidden", "universal"),
        ("not inferior", "new", "universal"),
    )
)
MARGIN = 0.01
# Nobody's questions: looked at when they were there, uncorrected. First − second, after 20 steps.
EXPLORED = (
    ("own masks", "default"),
    ("default", "base of the default"),
    ("default", "refined"),
    ("default", "universal, experts' recipe"),
    ("default, 4 × the zoo's steps", "universal, 4 × the zoo's steps"),
    ("universal, 4 × the zoo's steps", "universal"),
    ("default, 0.8 of its steps in the base", "universal"),
    ("default, 0.8 of its steps in the base", "default"),
    ("universal, from random weights", "universal"),
)


FIGURES, RESULTS = ROOT / "docs" / "figures", ROOT / "benchmarks" / "results" / "cpu"


def report(options: argparse.Namespace) -> None:
    for name in options.worlds:
        _report(name, options)
    # Of all worlds, also of those that were reported before, but for a method of before.
    paths = [path for path in sorted(RESULTS.glob("experts_*.json")) if not path.stem.endswith("-first")]
    results = [json.loads(path.read_text()) for path in paths]
    _save(to_png(partial(accuracy_against_latency, results)), FIGURES / "experts" / "accuracy_latency.png")


def _report(name: str, options: argparse.Namespace) -> None:
    folder = options.out / folder_name(name)
    opened = {
        seed: journal_at(name, path)
        for seed in sorted(options.seeds)
        if (path := folder / f"seed{seed}" / "journal.jsonl").exists()
    }
    # One that was only begun has no tasks yet.
    opened = {seed: journal for seed, journal in opened.items() if "tasks" in journal}
    journals = {seed: results_of(journal) for seed, journal in opened.items()}
    result = {
        "setting": {
            "world": asdict(WORLDS[name]),
            "seeds": sorted(journals),
            "held out": {seed: HELD_OUT[seed % len(HELD_OUT)] for seed in sorted(journals)},
            "command": _command(name, opened),
            "commit": code(),
        },
        "environment": environment(),
        "made": {
            seed: {k: v for k, v in found.items() if k.startswith("make")} for seed, found in journals.items()
        },
        "arms": {
            f"{split}, {images} images": _table(journals, f"{split} {images}")
            for images in IMAGES
            for split in SPLITS
        },
        "questions": _answers(journals),
        "explored": _explored(journals),
        "by known share": _by_known_share(journals),
        "latency": _latency(
            Prepared(WORLDS[name], min(journals), folder / f"seed{min(journals)}", options.files)
        ),
    }
    path = RESULTS / f"experts_{folder_name(name)}.json"
    _save(f"{json.dumps(result, indent=1)}\n".encode(), path)
    for images in IMAGES:
        figure = to_png(partial(accuracy_against_cost, result["arms"][f"known, {images} images"]))
        _save(figure, FIGURES / path.stem / f"known_{images}_images.png")
    for seed in journals:
        text = (folder / f"seed{seed}" / "journal.jsonl").read_bytes()
        _save(gzip.compress(text, mtime=0), path.with_name(f"{path.stem}_seed{seed}.jsonl.gz"))
    for split, table in result["arms"].items():
        for arm, points in table.items():
            print(f"{split:20}{arm:34}", "  ".join(f"J {j}: {p['text']}" for j, p in points.items()))
    for answer in result["questions"]:
        print(json.dumps(answer))


def _command(world: str, journals: Mapping[int, Journal]) -> str:
    """What runs all that these journals have."""
    parts = [
        part
        for part in PARTS
        if any(key.endswith(f" {part}") for journal in journals.values() for key in journal.records)
    ]
    words = ["--seeds", *map(str, journals), "--worlds", f'"{world}"', "--parts", *parts]
    return " ".join(("python benchmarks/experts run", *words))


def _save(content: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def _explored(journals: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for first, second in EXPLORED:
        for images in IMAGES:
            for split in SPLITS:
                scores = [scores_of(journals, f"{split} {images}", arm, "20") for arm in (first, second)]
                if (difference := paired(*scores)) is not None:
                    pair = {"first": first, "second": second, "split": split, "images": images}
                    found.append({**pair, **asdict(difference)})
    return found


def _by_known_share(journals: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Default minus universal at 20 steps, of tasks of all splits, by the share of classes that the zoo knows."""
    found = []
    for images in IMAGES:
        tasks = [
            (rows["default"]["20"]["choice"]["known_share"], f"{seed} {key}", seed, rows)
            for seed, made in journals.items()
            for key, rows in made.items()
            if key.split(" ")[1:2] == [str(images)]
        ]
        for low, high in ((0.0, 0.0), (0.01, 0.5), (0.51, 0.99), (1.0, 1.0)):
            some = [task for task in tasks if low <= task[0] <= high]
            scores = (
                {(key, seed): rows[arm]["20"]["accuracy"] for _, key, seed, rows in some}
                for arm in ("default", "universal")
            )
            if (difference := paired(*scores)) is not None:
                found.append({"images": images, "from": low, "to": high, **asdict(difference)})
    return found


def _latency(prepared: Prepared) -> dict[str, Any] | None:
    """Milliseconds for one image on one core, the dense and the pruned model in turn; None where the zoo is gone."""
    # Of any zoo with as many steps: their models have the same shapes.
    zoos = [Zoo(path) for path in sorted(prepared.folder.glob("clustered*")) if path.is_dir()]
    stored = next((found for zoo in zoos if (found := zoo.shared(START)) is not None), None)
    if stored is None:
        return None
    torch.set_num_threads(1)
    size = prepared.backbone.preprocessing.size
    models = {"dense": prepared.backbone.model.eval(), "pruned": stored.load().model}
    image, times = torch.randn(1, 3, size, size), {name: list[float]() for name in models}
    with torch.inference_mode():
        for _ in range(60):
            for name, model in models.items():
                began = time.perf_counter()
                model(image)
                times[name].append(1000 * (time.perf_counter() - began))
    return {
        name: {"median_ms": statistics.median(taken[10:]), "parameters": count_parameters(models[name])}
        for name, taken in times.items()
    }


def accuracy_against_latency(results: list[dict[str, Any]], theme: Theme) -> Figure:
    """Mean accuracy on tasks of known classes after 20 steps against what one image takes; dense: its ridge head.

    Of worlds whose latency is known. Latencies are compared within a world alone, where models were timed in turn.
    """
    figure, axes = new_figure(theme, 7.2, 3.8)
    split = f"known, {IMAGES[-1]} images"
    for position, (mark, arm) in enumerate(zip(MARKERS, ("default", "universal", DENSE), strict=False)):
        points = [
            (result["latency"]["dense" if arm == DENSE else "pruned"]["median_ms"], found[split][arm])
            for result in results
            if result["latency"] is not None and (found := result["arms"])
        ]
        axes.errorbar(
            [milliseconds for milliseconds, _ in points],
            [100 * steps["0" if arm == DENSE else "20"]["accuracy"] for _, steps in points],
            [100 * steps["0" if arm == DENSE else "20"]["error"] for _, steps in points],
            fmt=mark,
            ms=6,
            color=theme.colour(position),
            label=arm,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds for one image, one core")
    axes.set_ylabel(f"test accuracy (%), known classes, {IMAGES[-1]} images of each")
    add_legend(axes, theme)
    return figure


def accuracy_against_cost(arms: dict[str, dict[str, Any]], theme: Theme) -> Figure:
    """Mean accuracy of an arm after so many steps against the seconds of a task, and the dense model's.

    Of those arms that were run on all tasks.
    """
    figure, axes = new_figure(theme, 7.2, 4.0)
    # Of other tasks a mean is another one.
    tasks = arms["universal"]["20"]["tasks"]
    shown = [name for name, points in arms.items() if len(points) > 1 and points["20"]["tasks"] == tasks]
    for position, (mark, name) in enumerate(zip(MARKERS, shown, strict=False)):
        points = [
            (p["seconds a task"], 100 * p["accuracy"])
            for j, p in arms[name].items()
            if j != "auto" and p["tasks"] == tasks
        ]
        axes.plot(
            *zip(*points, strict=True), marker=mark, ms=5, lw=1.2, color=theme.colour(position), label=name
        )
    if (dense := arms.get(DENSE)) is not None:
        axes.axhline(100 * dense["0"]["accuracy"], color=theme.muted, lw=1, ls="--", label=DENSE)
    axes.set_xlabel("seconds a task, one core (0 and 20 steps)")
    axes.set_ylabel("test accuracy (%), classes that the zoo knows")
    add_legend(axes, theme)
    return figure


def scores_of(
    journals: dict[int, dict[str, Any]], split: str, arm: str, steps: str, what: str = "accuracy"
) -> Scores:
    """(task, training seed) → accuracy. Tasks of different seeds are different tasks."""
    return {
        (f"{seed} {key}", seed): rows[arm][steps].get(what, 0.0)
        for seed, found in journals.items()
        for key, rows in found.items()
        if key.startswith(f"{split} ") and steps in rows.get(arm, {})
    }


# Tasks of which a mean is shown: a journal may have a few units of arms that were dropped later.
_FEWEST = 5


def _table(journals: dict[int, dict[str, Any]], split: str) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for arm in NAMES:
        for steps in J:
            scores = scores_of(journals, split, arm, steps)
            if len(scores) < _FEWEST:
                continue
            mean = mean_of(scores)
            against = paired(scores, scores_of(journals, split, "universal", steps))
            text = mean.percent()
            if against is not None and arm != "universal":
                text += f" ({against.percent})"
            costs = scores_of(journals, split, arm, steps, "seconds").values()
            table.setdefault(arm, {})[steps] = {
                "tasks": len(scores),
                "accuracy": mean.value,
                "error": mean.error,
                "minus universal": None if against is None else asdict(against),
                "seconds a task": sum(costs) / len(costs),
                "text": text,
            }
    return table


def _answers(journals: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for question in QUESTIONS:
        first, second = (
            scores_of(journals, f"{question.split} {question.images}", arm, question.steps)
            for arm in (question.first, question.second)
        )
        over_tasks = paired(first, second)
        if over_tasks is None:
            continue
        by_seed = {
            seed: mean_of({k: v for k, v in first.items() if k[1] == seed}).value
            - mean_of({k: v for k, v in second.items() if k[1] == seed}).value
            for seed in sorted(journals)
        }
        over_seeds = paired({(s, 0): v for s, v in by_seed.items()}, {(s, 0): 0.0 for s in by_seed})
        found.append(
            {
                **asdict(question),
                "over tasks": asdict(over_tasks),
                "over seeds": asdict(over_seeds),
                "by seed": by_seed,
            }
        )
    superior = [answer for answer in found if answer["kind"] == "superior"]
    for answer, p in zip(superior, holm([a["over tasks"]["p"] for a in superior]), strict=True):
        answer["corrected p"] = p
        answer["holds"] = p < 0.05 and answer["over tasks"]["difference"] > 0
    for answer in found:
        if answer["kind"] == "not inferior":
            answer["holds"] = answer["over tasks"]["low"] > -MARGIN
    return found
