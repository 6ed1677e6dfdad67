"""Zoos of experts beside one universal model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvp_ext.app.results import count_text
from scripts.pages.common import CONTROL, FIGURES, link, machine, name_of, read, table


def experts_page(paths: Sequence[Path], page: Path) -> str:
    """A world a chapter: what was asked and answered, then every arm."""
    first, figure = ["# Experts by cluster"], FIGURES / "experts" / "accuracy_latency.png"
    if figure.exists():
        first += [
            "New tasks of classes that the zoo knows, 50 images of each; bars are standard errors over tasks:",
            f"![accuracy against latency]({link(figure, page)})",
        ]
    return "\n\n".join((*first, *(part for path in paths for part in _experts(path, page)))) + "\n"


def summary_of_experts(path: Path) -> str:
    """The README's answers: the default against universal at equal steps, and against one that is told the same."""
    result = read(path)
    found = {(a["split"], a["images"], a["second"]): a["over tasks"] for a in result["questions"]}

    def said(split: str, images: int, second: str = CONTROL) -> str:
        over = found[split, images, second]
        return _points(over["difference"], over["error"])

    images = sorted({images for _, images, _ in found})
    world, seeds = result["setting"]["world"], len(result["setting"]["seeds"])
    rows = (
        ("classes that the zoo knows", "known", CONTROL),
        (
            "the same, where universal is told what it knows of them",
            "known",
            "universal, head of what it knows",
        ),
        ("classes hidden from the zoo", "hidden", CONTROL),
        ("domains that nobody saw", "new", CONTROL),
    )
    lost = {a["split"] for a in result["questions"] if a["kind"] == "not inferior" and not a["holds"]}
    open_ = [title for title, split, _ in rows if split in lost]
    return "\n\n".join(
        (
            "Where tasks are of several kinds (photos, paintings, drawings, textures, digits), the default is a zoo of "
            f"experts. Experts minus universal, in points, scope `{world['scope']}`, keep {world['keep']:g}, 20 steps, "
            f"{seeds} training seeds:",
            table(
                ("new task of", *(f"{count} images a class" for count in images)),
                [(title, *(said(split, count, second) for count in images)) for title, split, second in rows],
            ),
            *([f"A loss of a point is not ruled out on {' and '.join(open_)}."] if open_ else []),
        )
    )


def edition(path: Path) -> tuple[bool, str]:
    """An earlier one comes last."""
    return path.stem.endswith("-first"), path.stem


def _experts(path: Path, page: Path) -> Iterator[str]:
    result = read(path)
    made, world, latency = result["setting"], result["setting"]["world"], result["latency"]
    seeds = ", ".join(map(str, made["seeds"]))
    title = f"{world['model']} at {world['size']} px, scope `{world['scope']}`, keep {world['keep']:g}"
    yield f"## {title}" + (", first edition" if edition(path)[0] else "")
    if edition(path)[0]:
        yield (
            "Of a method before today's: an expert's word took the labels' place where it erred no more often than a "
            "head of these images alone. With 10 images a class it was heard on 6 of 48 tasks of hidden classes, which "
            "look like others, and cost 4 points there; it now has a share, or none. What no question is about was run "
            "here alone."
        )
    yield (
        f"Training seeds {seeds}: each draws hidden classes and held-out domains, and makes the universal model and "
        f"the experts anew, all in as many steps (about {world['steps']:,}). Tasks bring 10 or 50 images of a class; "
        f"the zoo's have up to 200. `{made['command']}`, commit {made['commit']}; {machine(result['environment'])}; "
        f"`{name_of(path)}`."
    )
    if latency is not None:
        one, other = (
            f"{row['median_ms']:.1f} ms for one image on one core, {count_text(row['parameters'])} parameters"
            for row in (latency["pruned"], latency["dense"])
        )
        yield f"All pruned arms have the same shapes: {one}. The dense model: {other}."
    yield "### Asked before the seeds were run"
    yield (
        "At 20 steps a task; p over tasks, corrected over the questions of superiority (Holm); not inferior: the lower "
        "end of the 95 % interval over tasks is above −1 point. p over seeds, uncorrected, takes each training seed as "
        "one observation: with so few of them it is coarse, and decides nothing here."
    )
    yield table(
        (
            "tasks",
            "images a class",
            "question",
            "difference",
            "95 % interval",
            "by seed",
            "corrected p",
            "p over seeds",
            "holds",
        ),
        [_question(answer) for answer in result["questions"]],
    )
    if explored := result.get("explored"):
        yield "### Explored"
        yield (
            "Asked by nobody before: differences at 20 steps, ± standard error over tasks, uncorrected, under the "
            "first seed alone."
        )
        sets = list(dict.fromkeys((row["split"], row["images"]) for row in explored))
        pairs: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
        for row in explored:
            said = pairs.setdefault((row["first"], row["second"]), {})
            said[row["split"], row["images"]] = _points(row["difference"], row["error"])
        yield table(
            ("pair", *(f"{split}, {images}" for split, images in sets)),
            [
                (f"{first} − {second}", *(said.get(one, "") for one in sets))
                for (first, second), said in pairs.items()
            ],
        )
    yield "### Accuracy against the cost of a task"
    for figure in sorted((FIGURES / path.stem).glob("*.png")):
        yield f"![{figure.stem}]({link(figure, page)})"
    yield "### Every arm"
    yield (
        "Accuracy in %, mean ± standard error over tasks; in brackets its difference to the universal model at equal "
        "steps, on the tasks that both have. Some arms were run under the first seed alone. *auto*: as many steps as "
        "the rule gives each task. Seconds are a task's at 20 steps on one core of a busy machine, without what is "
        "made once."
    )
    for title, arms in result["arms"].items():
        steps = list(dict.fromkeys(j for points in arms.values() for j in points))
        yield f"#### {title.capitalize()} a class"
        yield table(
            ("arm", *(f"J {j}" for j in steps), "s a task"),
            [
                (
                    name,
                    *(points[j]["text"] if j in points else "" for j in steps),
                    f"{points['20']['seconds a task']:.1f}" if "20" in points else "",
                )
                for name, points in arms.items()
            ],
        )
    yield "### By what the zoo knows"
    yield table(
        ("images a class", "share of the classes known", "tasks", "default − universal"),
        [
            (
                str(row["images"]),
                f"{row['from']:.0%}" if row["from"] == row["to"] else f"{row['from']:.0%} to {row['to']:.0%}",
                str(row["tasks"]),
                _points(row["difference"], row["error"]),
            )
            for row in result["by known share"]
        ],
    )


def _question(answer: Mapping[str, Any]) -> tuple[str, ...]:
    over = answer["over tasks"]
    return (
        {"known": "known classes", "hidden": "hidden classes", "new": "new domains"}[answer["split"]],
        str(answer["images"]),
        f"{answer['first']} {'>' if answer['kind'] == 'superior' else '≥'} {answer['second']}",
        _points(over["difference"], over["error"]),
        f"[{100 * over['low']:+.1f}, {100 * over['high']:+.1f}]",
        ", ".join(f"{100 * value:+.1f}" for value in answer["by seed"].values()),
        f"{answer['corrected p']:.2g}" if "corrected p" in answer else "",
        f"{answer['over seeds']['p']:.2g}" if answer["kind"] == "superior" else "",
        "yes" if answer["holds"] else "no",
    )


def _points(difference: float, error: float | None) -> str:
    return f"{100 * difference:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
