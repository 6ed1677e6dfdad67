"""The study's tables, as rows of text: arms at the default point, one factor at a time, and time to accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mvp_ext.app.results import Mean, flops_text, seconds_text

from .arms import ARMS
from .stats import mean_of
from .summary import Answers
from .verdicts import Difference, Questions

CONTROL = "universal"
FACTORS = {
    "keep": "keep",
    "steps": "J =",
    "neighbours": "N =",
    "pick": "neighbours:",
    "similarity": "similarity:",
}
Columns = Sequence[tuple[str, str]]  # (heading, "left" or "right")


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


def arm_rows(answers: Answers, world: str, split: str) -> list[list[str]]:
    """One row an arm at the default point, best first, and the dense model."""
    questions = Questions(answers)
    about = answers.worlds[world]
    differences = {
        arm: questions.ask(world, split, arm, CONTROL) if arm != CONTROL else None
        for arm in answers.arms(world, split)
    }
    questions.correct()
    ranked = []
    for arm, found in differences.items():
        runs = answers.runs(world, split, arm)
        cost = {k: sum(r[k] for r in runs.values()) / len(runs) for k in ("steps", "flops", "seconds")}
        once = answers.shared_cost(world, arm)["seconds"]
        rate = about["chosen"].get(arm)
        row = [
            arm,
            _mean(runs).percent(),
            *_difference_texts(found),
            _counts_text(runs),
            f"{cost['steps']:g}",
            flops_text(cost["flops"]),
            seconds_text(cost["seconds"]),
            seconds_text(once) if once else "",
            f"{rate:g}" if rate else "",
        ]
        # By the paired difference: arms that ran on fewer tasks have means of other tasks. One that shares no run with
        # the control comes after those that do.
        alone = found is None and arm != CONTROL
        rank = found.paired.difference if found else 0.0 if arm == CONTROL else _mean(runs).value
        ranked.append(((alone, -rank), row))
    rows = [row for _, row in sorted(ranked, key=lambda item: item[0])]
    if rows and (dense := about["dense"].get(split)):
        blank = [""] * (len(COLUMNS) - 3)
        rows.append(["dense, ridge head", f"{100 * sum(dense) / len(dense):.1f}", "", *blank])
    return rows


FACTOR_COLUMNS = (
    ("factor", "left"),
    ("arm", "left"),
    ("accuracy (%)", "right"),
    (f"minus {CONTROL} there", "right"),
    ("p, corrected", "right"),
    ("minus itself at the default", "right"),
    ("p, corrected", "right"),
    ("tasks, runs", "right"),
    ("FLOPs a task", "right"),
)
FACTOR_NOTE = (
    "One factor differs from the table above, the others have their defaults. Each difference is over the tasks and "
    "seeds that both sides have; p is corrected (Holm) within this table."
)


def factor_rows(answers: Answers, world: str) -> list[list[str]]:
    """One row an arm and a value of a factor that is not the default, on tasks that share classes with the zoo."""
    questions, asked = Questions(answers), []
    for factor, name in FACTORS.items():
        found = {arm: answers.values(world, "shared", arm, factor) for arm in ARMS}
        default = getattr(answers.factors(world), factor)
        for value in dict.fromkeys(v for values in found.values() for v in values):
            for arm in [arm for arm, values in found.items() if value in values and value != default]:
                there = {factor: value}
                runs = answers.runs(world, "shared", arm, **there)
                if runs == answers.runs(world, "shared", arm):
                    # The factor is nothing to this arm.
                    continue
                control = None
                if arm != CONTROL:
                    control = questions.ask(world, "shared", arm, CONTROL, there, there)
                itself = questions.ask(world, "shared", arm, arm, there)
                asked.append((f"{name} {value}", arm, runs, control, itself))
    questions.correct()
    return [
        [
            title,
            arm,
            _mean(runs).percent(),
            *_difference_texts(control),
            *_difference_texts(itself),
            _counts_text(runs),
            flops_text(sum(run["flops"] for run in runs.values()) / len(runs)),
        ]
        for title, arm, runs, control, itself in asked
    ]


TIME_TITLE = "Cost to reach full iterative pruning's accuracy"
TIME_NOTE = (
    "The smallest number of steps that was run at which the mean is at least iterative pruning's. Few arms were run "
    "with fewer steps than the default, and those on fewer tasks. What is made once for all tasks is not in it."
)
TIME_COLUMNS = (
    ("world", "left"),
    ("arm", "left"),
    ("steps", "right"),
    ("FLOPs a task", "right"),
    ("time a task", "right"),
    ("above it by", "right"),
    ("tasks, runs", "right"),
)


def time_rows(answers: Answers) -> list[list[str]]:
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
                    counts = _counts_text({k: runs[k] for k in common})
                    rows.append([world, arm, *costs, f"{100 * margin:+.1f}", counts])
                    break
    return rows


Runs = Mapping[tuple[int, int], Mapping[str, float]]  # (task, seed) → row


def _mean(runs: Runs) -> Mean:
    return mean_of({key: run["accuracy"] for key, run in runs.items()})


def _counts_text(runs: Runs) -> str:
    return f"{len({task for task, _ in runs})}, {len(runs)}"


def _difference_texts(found: Difference | None) -> tuple[str, str]:
    """The difference and its corrected p."""
    return ("", "") if found is None else (found.paired.percent, f"{found.adjusted:.2g}")
