"""Means, paired tests and their correction. Tasks are what is drawn at random: seeds of one task are averaged first."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mvp_ext.app.results import Mean

Scores = Mapping[tuple[Hashable, int], float]  # (task, seed) → accuracy


@dataclass(frozen=True)
class Paired:
    """A paired difference over tasks.

    Attributes:
        difference, error: mean over tasks and its standard error (None for one task).
        low, high: 95 % interval of the mean over tasks, by the t distribution, like p; both the mean for one task.
        p: two-sided paired t-test over tasks; 1 where it cannot be made (fewer than two tasks, or all differences 0).
        tasks, runs: tasks, and (task, seed) pairs that both sides have.
    """

    difference: float
    error: float | None
    low: float
    high: float
    p: float
    tasks: int
    runs: int

    @property
    def percent(self) -> str:
        """``+1.3 ± 0.4``, in percentage points."""
        return Mean(self.difference, self.error).percent(sign=True)


def by_task(scores: Scores) -> dict[Hashable, float]:
    """Each task's mean over its seeds."""
    grouped: dict[Hashable, list[float]] = {}
    for (task, _), value in scores.items():
        grouped.setdefault(task, []).append(value)
    return {task: math.fsum(values) / len(values) for task, values in grouped.items()}


def mean_of(scores: Scores) -> Mean:
    """Mean and standard error over tasks."""
    return Mean.of(list(by_task(scores).values()))


def paired(first: Scores, second: Scores) -> Paired | None:
    """``first`` − ``second`` over the tasks and seeds that both have; None where they share none."""
    common = first.keys() & second.keys()
    if not common:
        return None
    per_task = by_task({key: first[key] - second[key] for key in common})
    differences = np.array([per_task[task] for task in sorted(per_task, key=repr)])
    freedom = len(differences) - 1
    found = Mean.of(differences.tolist())
    mean, error = found.value, found.error
    half = float(stats.t.ppf(0.975, freedom)) * error if error else 0.0
    p = 1.0
    if error:
        p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    elif error == 0 and mean != 0:
        # The same difference on every task.
        p = 0.0
    return Paired(mean, error, mean - half, mean + half, p, len(differences), len(common))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: family-wise adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def mantel(x: np.ndarray, y: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Spearman's correlation of two symmetric matrices' pairs, and its one-sided p by permuting the objects.

    Pairs of tasks share tasks, so that an ordinary test of the correlation would see too many observations.
    """
    upper = np.triu_indices(len(x), 1)
    ranked = stats.rankdata(x[upper])
    observed = float(np.corrcoef(ranked, stats.rankdata(y[upper]))[0, 1])
    generator, hits = np.random.default_rng(seed), 0
    for _ in range(draws):
        order = generator.permutation(len(x))
        hits += np.corrcoef(ranked, stats.rankdata(y[np.ix_(order, order)][upper]))[0, 1] >= observed - 1e-12
    return observed, (hits + 1) / (draws + 1)
