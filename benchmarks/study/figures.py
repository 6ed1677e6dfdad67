"""The study's figures, in the style of the package's own page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mvp_ext.app.plots import MARKERS, Theme, add_legend, dense_line, new_figure
from mvp_ext.app.results import flops_text, seconds_text

from .stats import Scores, mean_of
from .summary import Answers
from .verdicts import layer_overlaps

Draw = Callable[[Theme], Figure]
LINES = 7  # arms a figure can show and still be read


def figures(answers: Answers) -> dict[str, tuple[str, Draw, str]]:
    """File name → (title, what draws it, caption), for each figure that there are data for."""
    drawn: dict[str, tuple[str, Draw, str]] = {}
    for world, about in answers.worlds.items():
        for factor, label, log in (
            ("steps", "fine-tuning steps J of the target task", True),
            ("neighbours", "neighbours N", False),
            ("keep", "share of units kept", True),
        ):
            lines, ceiling = _lines(answers, world, factor)
            if lines:
                drawn[f"{world}_{factor}"] = (
                    f"{world}: accuracy against {label}",
                    lambda theme, lines=lines, label=label, log=log, c=ceiling: _curves(
                        theme, lines, label, log, c
                    ),
                    "Mean over the held-out tasks that all points share; bands are ± one standard error over tasks. "
                    "The dense model has a ridge head and is not fine-tuned.",
                )
        for which, label in (("seconds", "time a task (s)"), ("flops", "FLOPs a task")):
            points, ceiling = _points(answers, world, which)
            if len(points) > 1:
                drawn[f"{world}_{which}"] = (
                    f"{world}: accuracy against {label}",
                    lambda theme, p=points, label=label, which=which, c=ceiling: _scatter(
                        theme, p, label, which, c
                    ),
                    "Everything spent on one task after the shared models are there: dense pass, similarity, scoring, "
                    "merge, training, heads. What is made once is in the table. Lines join an arm's numbers of steps; "
                    "all points are of the same tasks.",
                )
        if overlap := about.get("overlap"):
            drawn[f"{world}_overlap"] = (
                f"{world}: overlap of masks per layer",
                lambda theme, o=overlap: _overlap(theme, o),
                "IoU of two zoo tasks' masks: mean of the most and the least similar third of pairs; the dashed line "
                "is two independent draws (r/(2−r)), the dotted one the same task pruned with two seeds.",
            )
            drawn[f"{world}_similarity"] = (
                f"{world}: overlap against similarity",
                lambda theme, o=overlap: _similarity(theme, o),
                "Each point is a pair of zoo tasks, for the shallower and the deeper half of the layers.",
            )
        if latency := about.get("latency"):
            drawn[f"{world}_latency"] = (
                f"{world}: latency against accuracy",
                lambda theme, world=world, m=latency: _pareto(theme, answers, world, m),
                "Median latency of one forward pass at batch 1; equal shapes share one measurement; timed in turn.",
            )
    return drawn


Points = dict[str, list[tuple[float, float, float]]]  # arm → (value, mean, error)


def _lines(answers: Answers, world: str, factor: str) -> tuple[Points, float | None]:
    """Accuracy at each value of a factor, over the runs that all arms and values share, and the dense model's there.

    Lines of different tasks could not be compared.
    """
    scores: dict[str, dict[float, Scores]] = {}
    for arm in answers.arms(world, "shared"):
        values = [v for v in answers.values(world, "shared", arm, factor) if not isinstance(v, str)]
        found = {float(v): answers.scores(world, "shared", arm, **{factor: v}) for v in values}
        if len(found) > 1 and any(s != found[float(values[0])] for s in found.values()):
            scores[arm] = found
    scores = dict(list(scores.items())[:LINES])
    common = _shared([s for found in scores.values() for s in found.values()])
    if not common:
        return {}, None
    lines = {
        arm: [(value, *_percent(score, common)) for value, score in found.items()]
        for arm, found in scores.items()
    }
    return lines, _dense(answers, world, common)


def _shared(scores: Sequence[Scores]) -> set[Any]:
    return set.intersection(*(set(s) for s in scores)) if scores else set()


def _dense(answers: Answers, world: str, runs: set[Any]) -> float | None:
    """Mean accuracy of the dense model on the tasks of these runs."""
    known = answers.worlds[world]["dense"].get("shared", [])
    tasks = {task for task, _ in runs if task < len(known)}
    return sum(known[task] for task in tasks) / len(tasks) if tasks else None


def _percent(scores: Scores, runs: set[Any]) -> tuple[float, float]:
    """Mean and standard error over tasks of these runs."""
    mean = mean_of({k: scores[k] for k in runs})
    return 100 * mean.value, 100 * (mean.error or 0.0)


def _curves(theme: Theme, lines: Any, label: str, log: bool, ceiling: float | None) -> Figure:
    figure, axes = new_figure(theme, 7.2, 3.8)
    for position, (arm, points) in enumerate(lines.items()):
        x, y, e = zip(*points, strict=True)
        colour = theme.colour(position)
        axes.plot(x, y, color=colour, lw=2, ms=4, marker=MARKERS[position % len(MARKERS)], label=arm)
        low, high = ([a + s * b for a, b in zip(y, e, strict=True)] for s in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    if log:
        axes.set_xscale("symlog", linthresh=10 if "steps" in label else 0.05)
    ticks = sorted({x for points in lines.values() for x, *_ in points})
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    dense_line(axes, ceiling, theme)
    axes.set_xlabel(label)
    axes.set_ylabel("test accuracy (%)")
    add_legend(axes, theme)
    return figure


def _points(answers: Answers, world: str, which: str) -> tuple[Points, float | None]:
    """Cost and accuracy at each number of steps, most accurate arms first, over the runs that all share, and the dense
    model's there."""
    found = {
        arm: [
            answers.runs(world, "shared", arm, steps=j) for j in answers.values(world, "shared", arm, "steps")
        ]
        for arm in answers.arms(world, "shared")
    }
    common = _shared([runs for several in found.values() for runs in several])
    points: Points = {}
    for arm, several in found.items() if common else ():
        for runs in several:
            cost = sum(runs[k][which] for k in common) / len(common)
            point = (cost, *_percent({k: r["accuracy"] for k, r in runs.items()}, common))
            if point not in points.setdefault(arm, []):
                points[arm].append(point)
    ranked = sorted(points.items(), key=lambda item: -max(y for _, y, _ in item[1]))
    return dict(ranked[: 2 * LINES]), _dense(answers, world, common)


def _scatter(theme: Theme, points: Any, label: str, which: str, ceiling: float | None) -> Figure:
    figure, axes = new_figure(theme, 7.2, 4.6)
    for position, (arm, values) in enumerate(points.items()):
        x, y, e = zip(*values, strict=True)
        style = {"color": theme.colour(position), "marker": MARKERS[(position // 2) % len(MARKERS)], "ms": 6}
        axes.errorbar(x, y, yerr=e, lw=1.2, capsize=2, ls="-" if len(x) > 1 else "none", label=arm, **style)
    axes.set_xscale("log")
    text = flops_text if which == "flops" else seconds_text
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.minorticks_off()
    dense_line(axes, ceiling, theme)
    axes.set_xlabel(label)
    axes.set_ylabel("test accuracy (%)")
    add_legend(axes, theme)
    return figure


def _overlap(theme: Theme, overlap: Any) -> Figure:
    figure, axes = new_figure(theme, 7.2, 3.6)
    layers = layer_overlaps(overlap)
    x = range(len(layers))
    for position, (key, label) in enumerate(
        (("similar", "most similar third"), ("dissimilar", "least similar third"))
    ):
        y = [layer[key] for layer in layers]
        axes.plot(x, y, color=theme.colour(position), marker=MARKERS[position], lw=2, ms=5, label=label)
    axes.plot(x, [layer["chance"] for layer in layers], color=theme.muted, ls="--", label="independent draws")
    if layers[0]["two seeds"] is not None:
        axes.plot(
            x,
            [layer["two seeds"] for layer in layers],
            color=theme.ink,
            ls=":",
            label="two seeds of one task",
        )
    axes.set_xticks(list(x), [layer["layer"] for layer in layers], rotation=45, ha="right")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("overlap of masks (IoU)")
    add_legend(axes, theme)
    return figure


def _similarity(theme: Theme, overlap: Any) -> Figure:
    figure, axes = new_figure(theme, 7.2, 3.6)
    half = len(overlap["layers"]) // 2
    x = [similarity for *_, similarity in overlap["pairs"]]
    parts: Sequence[tuple[str, slice]] = (
        ("shallower half", slice(0, half)),
        ("deeper half", slice(half, None)),
    )
    for position, (label, part) in enumerate(parts):
        y = [sum(ious[part]) / len(ious[part]) if ious[part] else 0.0 for ious in overlap["ious"]]
        colour, marker = theme.colour(position), MARKERS[position]
        axes.scatter(x, y, s=18, alpha=0.7, lw=0, color=colour, marker=marker, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("similarity of the two tasks (proxy-LEEP, mean of both directions)")
    axes.set_ylabel("overlap of masks (IoU)")
    add_legend(axes, theme)
    return figure


def _pareto(theme: Theme, answers: Answers, world: str, latency: Any) -> Figure:
    figure, axes = new_figure(theme, 7.2, 3.8)

    def at_one(name: str) -> float:
        return next(t["median_ms"] for t in latency[name]["latency"] if t["batch"] == 1)

    default = answers.results["default arm"]
    arms = [a for a in (default, "mvp", "universal", "one-shot taylor", "Torch-Pruning Taylor") if a]
    for position, arm in enumerate(dict.fromkeys(arms)):
        points = []
        for keep in answers.values(world, "shared", arm, "keep"):
            name = f"Torch-Pruning, keep {keep:g}" if arm.startswith("Torch") else f"keep {keep:g}"
            scores = answers.scores(world, "shared", arm, keep=keep)
            if name in latency and scores:
                points.append((at_one(name), 100 * mean_of(scores).value))
        if points:
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, color=theme.colour(position), marker=MARKERS[position], lw=1.5, ms=6, label=arm)
    dense = answers.worlds[world]["dense"].get("shared")
    if dense:
        axes.plot(
            at_one("dense"),
            100 * sum(dense) / len(dense),
            "*",
            color=theme.ink,
            ms=11,
            label="dense + ridge head",
        )
    axes.set_xlabel("latency of one image (ms, median)")
    axes.set_ylabel("test accuracy (%)")
    add_legend(axes, theme)
    return figure
