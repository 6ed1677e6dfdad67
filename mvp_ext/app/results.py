"""The results of a comparison as plain data (JSON), and what is computed from them: means, standard errors, costs.

A results file is a dictionary; keys marked ? may be missing::

    format: 1
    title, command, created: str            environment: {name: text}         notes?: [sentence, …]
    setting: {name: value}                  what was compared on what, printed as it is
    keep: share of the units kept, in (0, 1]
    models: {"dense": Measurement.to_dict(), "pruned": …}       sizes and latencies, measured in turn
    arms: [{name, model: key of models, tasks: [{task, accuracy, history: [[step, accuracy], …],
            cost: {steps, flops, seconds}}, …]}, …]             the first: the one at issue
    dense_accuracy?: mean accuracy of the dense model on the same tasks
    overlap?: [{similarity, iou, group?}, …]                    one point a pair of tasks
    layers?: [{name, units, kept: {arm: count}}, …]
    zoo?: {entries, seconds, flops, accuracy}                   what the voters cost, and how good they are

Accuracies are shares in [0, 1]; FLOPs count a multiply-add as two.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvp_ext.model.mask import Mask
from mvp_ext.storage import write_atomic

FORMAT = 1
# Of more classes the worst are named.
NAMED_CLASSES = 10
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """A mean over tasks and its standard error.

    Attributes:
        value: the mean.
        error: its standard error; None for a single task.
    """

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value."""
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return cls(mean, None)
        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        return cls(mean, math.sqrt(variance / n))

    def percent(self, *, sign: bool = False) -> str:
        """As percentage points: ``93.1 ± 0.4``."""
        text = f"{100 * self.value:+.1f}" if sign else f"{100 * self.value:.1f}"
        return text if self.error is None else f"{text} ± {100 * self.error:.1f}"


def p_value(differences: Sequence[float]) -> float | None:
    """Two-sided, of a t-test of paired differences against none; None of fewer than two, or of equal ones."""
    if len(differences) < 2 or len(set(differences)) < 2:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its tasks.

    Attributes:
        name: the arm's.
        model: whose measurement in the results is its model's.
        tasks: how many it ran on.
        accuracy: top-1, in [0, 1].
        difference: accuracy of the first arm minus this one's, task by task; None for the first.
        p: of that difference, from a paired t-test over tasks; None where there is none.
        steps: optimizer steps a task, on average.
        flops: floating-point operations a task.
        seconds: time a task.
    """

    name: str
    model: str
    tasks: int
    accuracy: Mean
    difference: Mean | None
    p: float | None
    steps: float
    flops: float
    seconds: float


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results file; ValueError if it is not one."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from None
    return dict(check_results(results))


def save_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write a results file, whole or not at all; its parent folders are made.

    Raises:
        ValueError: ``results`` are none.
        OSError: the file could not be written; what was there is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(check_results(results), indent=1, ensure_ascii=False)
    write_atomic(path, f"{text}\n".encode())


def check_results(results: Any) -> Results:
    """The results, if they have what every report needs; ValueError names what is missing."""
    if not isinstance(results, Mapping) or results.get("format") != FORMAT:
        got = results.get("format") if isinstance(results, Mapping) else type(results).__name__
        raise ValueError(f"results: expected a dictionary of format {FORMAT}, got {got}")
    missing = {"title", "keep", "models", "arms", "setting"} - set(results)
    if missing:
        raise ValueError(f"results: missing {', '.join(sorted(missing))}")
    if "dense" not in results["models"]:
        raise ValueError(f"results: models: expected one named dense, got {sorted(results['models'])}")
    if not results["arms"]:
        raise ValueError("results: arms: expected at least one")
    for arm in results["arms"]:
        if not arm["tasks"]:
            raise ValueError(f"results: arm {arm['name']}: expected at least one task")
        if arm["model"] not in results["models"]:
            raise ValueError(f"results: arm {arm['name']}: no measurement of its model {arm['model']}")
    return results


def summarise(results: Results) -> list[ArmSummary]:
    """Each arm's mean over its tasks, in the order of the file; costs are means a task."""
    first = {t["task"]: t["accuracy"] for t in results["arms"][0]["tasks"]}
    summaries = []
    for position, arm in enumerate(results["arms"]):
        tasks = arm["tasks"]
        paired = [first[t["task"]] - t["accuracy"] for t in tasks if t["task"] in first]
        costs = [t["cost"] for t in tasks]
        summaries.append(
            ArmSummary(
                name=arm["name"],
                model=arm["model"],
                tasks=len(tasks),
                accuracy=Mean.of([t["accuracy"] for t in tasks]),
                difference=Mean.of(paired) if position and paired else None,
                p=p_value(paired) if position else None,
                steps=_mean(costs, "steps"),
                flops=_mean(costs, "flops"),
                seconds=_mean(costs, "seconds"),
            )
        )
    return summaries


def learning_curve(tasks: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mean]]:
    """Mean accuracy at each step that every task's history has."""
    histories = [dict(t.get("history", ())) for t in tasks]
    common = set.intersection(*map(set, histories)) if histories else set()
    return [(step, Mean.of([h[step] for h in histories])) for step in sorted(common)]


def chance_overlap(keep: float) -> float:
    """IoU that two independent draws of a share ``keep`` of the units have, about: r / (2 − r)."""
    return keep / (2 - keep)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's; None for fewer than three points or a constant."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)


def flops_text(flops: float) -> str:
    """``1.8 GFLOP``."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.3g} {prefix}FLOP"
    return f"{flops:.3g} FLOP"


def count_text(count: float) -> str:
    """``11.2 M``."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {prefix}"
    return f"{count:.3g}"


def seconds_text(seconds: float) -> str:
    """``350 ms``, ``12 s`` or ``3 min 20 s``."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def kept_text(mask: Mask) -> str:
    """``0.29 of all units, 0.25 to 0.31 of a layer``: rounding makes it another share than was asked for."""
    shares = [float(bits.float().mean()) for bits in mask.layers.values()]
    return f"{mask.keep:.3g} of all units, {min(shares):.3g} to {max(shares):.3g} of a layer"


def class_accuracy_text(names: Sequence[str], accuracies: Sequence[float | None]) -> str:
    """``cat 91 %, dog 88 %``; of many classes the worst."""
    known = [(value, name) for name, value in zip(names, accuracies, strict=True) if value is not None]
    shown = known if len(known) <= NAMED_CLASSES else sorted(known)[:NAMED_CLASSES]
    text = ", ".join(f"{name} {value:.0%}" for value, name in shown)
    return text if shown is known else f"the worst of {len(known)}: {text}"


def _mean(costs: Sequence[Mapping[str, float]], key: str) -> float:
    return math.fsum(cost.get(key, 0.0) for cost in costs) / len(costs)
