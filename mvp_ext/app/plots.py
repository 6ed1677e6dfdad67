"""The figures of a comparison, each in a light and a dark version, as SVG for the page and as PNG files.

Figures are made without pyplot: no global state, no window, any thread.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mvp_ext.app.results import ArmSummary, Results, chance_overlap, flops_text, learning_curve, summarise

# Beside the colours: an arm can be told apart without them.
MARKERS = "osD^vPX"
# A matrix of so many classes at most has its counts written in.
WRITTEN_CLASSES = 20
CHANCE = "independent draws: r/(2−r)"


@dataclass(frozen=True)
class Theme:
    """Colours on one surface; ``series`` were chosen to stay apart for colour-blind readers on that surface."""

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]

    def colour(self, position: int) -> str:
        return self.series[position % len(self.series)]


LIGHT = Theme(
    "light",
    "#fcfcfb",
    "#1c1c1a",
    "#75746e",
    "#e1e0d9",
    ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948", "#008300", "#75746e"),
)
DARK = Theme(
    "dark",
    "#1a1a19",
    "#f4f4f2",
    "#a3a29a",
    "#34342f",
    ("#3987e5", "#199e70", "#c98500", "#9085e9", "#e66767", "#4fa84f", "#a3a29a"),
)


def figures(results: Results) -> dict[str, Callable[[Theme], Figure]]:
    """Name → what draws it, for each figure that the results have data for."""
    arms = summarise(results)
    drawn: dict[str, Callable[[Theme], Figure]] = {}
    if any(len(learning_curve(arm["tasks"])) > 1 for arm in results["arms"]):
        drawn["accuracy"] = lambda theme: accuracy_against_steps(results, theme)
    if any(arm.flops > 0 for arm in arms):
        drawn["cost"] = lambda theme: accuracy_against_cost(arms, results.get("dense_accuracy"), theme)
    if results.get("overlap"):
        drawn["overlap"] = lambda theme: overlap_against_similarity(results, theme)
    if results.get("layers"):
        drawn["layers"] = lambda theme: kept_units(results, theme)
    if any(model["latency"] for model in results["models"].values()):
        drawn["latency"] = lambda theme: latency(results, theme)
    return drawn


def to_svg(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    """The figure on a transparent ground: the page's own surface shows."""
    # With a fixed salt the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "mvp_ext"}):
        return _saved(draw(theme), format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def to_png(draw: Callable[[Theme], Figure], theme: Theme = LIGHT, dpi: int = 130) -> bytes:
    """The figure on the theme's surface."""
    return _saved(draw(theme), format="png", facecolor=theme.surface, dpi=dpi)


def accuracy_against_steps(results: Results, theme: Theme) -> Figure:
    """Mean accuracy (band: ± s.e. over tasks) after so many fine-tuning steps, one line an arm."""
    figure, axes = new_figure(theme, 7.2, 3.8)
    last = 1.0
    for position, arm in enumerate(results["arms"]):
        curve = learning_curve(arm["tasks"])
        if not curve:
            continue
        steps = [step for step, _ in curve]
        means = [100 * m.value for _, m in curve]
        errors = [100 * (m.error or 0) for _, m in curve]
        colour = theme.colour(position)
        axes.plot(
            steps, means, color=colour, lw=2, ms=4, marker=MARKERS[position % len(MARKERS)], label=arm["name"]
        )
        axes.fill_between(
            steps,
            [m - e for m, e in zip(means, errors, strict=True)],
            [m + e for m, e in zip(means, errors, strict=True)],
            color=colour,
            alpha=0.15,
            lw=0,
        )
        last = max(last, *steps)
    dense_line(axes, results.get("dense_accuracy"), theme)
    # A from-scratch arm takes many times the steps: a linear axis would squeeze the others to a line.
    if last > 200:
        axes.set_xscale("symlog", linthresh=20)
        axes.set_xlim(left=-1)
        marks = [0, 10, *(m * 10**e for e in range(1, 7) for m in (2, 5, 10))]
        axes.set_xticks([mark for mark in marks if mark <= last], minor=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("fine-tuning steps of the target task")
    axes.set_ylabel("test accuracy (%)")
    add_legend(axes, theme)
    return figure


def accuracy_against_cost(arms: list[ArmSummary], dense_accuracy: float | None, theme: Theme) -> Figure:
    """Mean accuracy (bar: ± s.e. over tasks) against what one task's pruned model cost, one point an arm."""
    figure, axes = new_figure(theme, 7.2, 3.4)
    for position, arm in enumerate(arms):
        if arm.flops <= 0:
            continue
        axes.errorbar(
            arm.flops,
            100 * arm.accuracy.value,
            yerr=100 * (arm.accuracy.error or 0),
            color=theme.colour(position),
            marker=MARKERS[position % len(MARKERS)],
            ms=7,
            lw=1.5,
            capsize=3,
            ls="none",
            label=arm.name,
        )
    dense_line(axes, dense_accuracy, theme)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops_text(value)))
    axes.margins(x=0.15)
    low, high = axes.get_xlim()
    # On a long axis whole powers of ten are marks enough.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training, scoring and similarity FLOPs a task")
    axes.set_ylabel("test accuracy (%)")
    add_legend(axes, theme)
    return figure


def overlap_against_similarity(results: Results, theme: Theme) -> Figure:
    """IoU of two tasks' masks against the tasks' similarity, with the line of independent draws."""
    figure, axes = new_figure(theme, 7.2, 3.6)
    groups: dict[str, list[tuple[float, float]]] = {}
    for point in results["overlap"]:
        groups.setdefault(point.get("group", "pairs of tasks"), []).append(
            (point["similarity"], point["iou"])
        )
    for position, (name, points) in enumerate(groups.items()):
        axes.scatter(
            [similarity for similarity, _ in points],
            [iou for _, iou in points],
            s=18,
            alpha=0.7,
            lw=0,
            color=theme.colour(position),
            marker=MARKERS[position % len(MARKERS)],
            label=name,
            rasterized=len(points) > 2000,
        )
    chance = chance_overlap(results["keep"])
    axes.axhline(chance, color=theme.muted, lw=1.5, ls="--", label=f"{CHANCE} = {chance:.2f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("similarity of the two tasks")
    axes.set_ylabel("overlap of their masks (IoU)")
    add_legend(axes, theme)
    return figure


def kept_units(results: Results, theme: Theme) -> Figure:
    """Units of each layer of the dense model, and how many each arm keeps (arms that agree share a bar)."""
    layers = results["layers"]
    shared: dict[tuple[float, ...], list[str]] = {}
    for arm in layers[0]["kept"]:
        shared.setdefault(tuple(layer["kept"][arm] for layer in layers), []).append(arm)
    figure, axes = new_figure(theme, 7.2, 3.6)
    positions = range(len(layers))
    axes.bar(positions, [layer["units"] for layer in layers], width=0.8, color=theme.grid, label="dense")
    width = 0.7 / len(shared)
    order = [arm["name"] for arm in results["arms"]]
    for i, (kept, names) in enumerate(shared.items()):
        colour = theme.colour(order.index(names[0]) if names[0] in order else i)
        label = names[0] if len(names) == 1 else "all pruned" if len(shared) == 1 else ", ".join(names)
        axes.bar(
            [p + (i - (len(shared) - 1) / 2) * width for p in positions],
            kept,
            width=0.9 * width,
            color=colour,
            label=label,
        )
    axes.set_xticks(list(positions), [layer["name"] for layer in layers], rotation=45, ha="right")
    axes.grid(False, axis="x")
    axes.set_ylabel("units (filters, heads, neurons)")
    add_legend(axes, theme)
    return figure


def latency(results: Results, theme: Theme) -> Figure:
    """Median latency of each model (bar: p10 to p90), one panel a batch size."""
    models = {name: model for name, model in results["models"].items() if model["latency"]}
    batches = sorted({timed["batch"] for model in models.values() for timed in model["latency"]})
    figure, panels = _panels(theme, 7.2, 0.9 + 0.42 * len(models) * len(batches), len(batches))
    dense = (
        {timed["batch"]: timed["median_ms"] for timed in models["dense"]["latency"]}
        if "dense" in models
        else {}
    )
    for axes, batch in zip(panels, batches, strict=True):
        for position, (name, model) in enumerate(models.items()):
            timed = next((t for t in model["latency"] if t["batch"] == batch), None)
            if timed is None:
                continue
            median = timed["median_ms"]
            axes.barh(position, median, height=0.6, color=theme.muted if name == "dense" else theme.colour(0))
            axes.hlines(position, timed["p10_ms"], timed["p90_ms"], color=theme.ink, lw=1.2)
            text = f"{median:.3g} ms"
            if name != "dense" and batch in dense:
                text += f" ({dense[batch] / median:.2f}× as fast)"
            at = (max(median, timed["p90_ms"]), position)
            axes.annotate(
                text,
                at,
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=theme.ink,
                fontsize=8.5,
            )
        axes.set_yticks(range(len(models)), list(models))
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.grid(False, axis="y")
        axes.set_title(f"batch {batch}", loc="left", fontsize=9.5, color=theme.ink)
    panels[-1].set_xlabel("latency (ms): median, line from p10 to p90")
    return figure


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], theme: Theme) -> Figure:
    """Images of each class (rows) by the class that was predicted (columns); shade: share of the row."""
    side = 1.6 + max(0.22 * len(names), 1.6)
    figure, axes = new_figure(theme, side + 0.6, side)
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    shades = LinearSegmentedColormap.from_list("shares", [theme.surface, theme.colour(0)])
    axes.imshow(shares, cmap=shades, vmin=0, vmax=1)
    axes.grid(False)
    places = list(range(len(names)))
    # A dollar sign in a name is no formula.
    axes.set_xticks(places, names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    if len(names) <= WRITTEN_CLASSES:
        for at, row in enumerate(counts):
            for predicted, count in enumerate(row):
                if count:
                    ink = theme.surface if shares[at][predicted] > 0.5 else theme.ink
                    axes.text(predicted, at, str(count), ha="center", va="center", fontsize=7, color=ink)
    axes.set_xlabel("predicted")
    axes.set_ylabel("folder")
    return figure


def new_figure(theme: Theme, width: float, height: float) -> tuple[Figure, Axes]:
    """One panel in the page's style; sizes in inches."""
    figure, axes = _panels(theme, width, height, 1)
    return figure, axes[0]


def _panels(theme: Theme, width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for axes in panels:
        axes.set_facecolor("none")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.grid)
        axes.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=8.5)
        axes.xaxis.label.set_color(theme.ink)
        axes.yaxis.label.set_color(theme.ink)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(True, color=theme.grid, lw=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def dense_line(axes: Axes, accuracy: float | None, theme: Theme) -> None:
    """The dense model's accuracy, where it is known."""
    if accuracy is not None:
        axes.axhline(100 * accuracy, color=theme.muted, lw=1.2, ls=":", label="dense model")


def add_legend(axes: Axes, theme: Theme) -> None:
    """Outside, at the right: no line can hide it."""
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.ink,
        borderaxespad=0,
    )


def _saved(figure: Figure, **how: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **how)
    return buffer.getvalue()
