"""The study: claims and verdicts, tables, figures; and what the README shows of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvp_ext.app.results import count_text
from scripts.pages.common import CONTROL, FIGURES, link, machine, name_of, read, table

OURS = "mvp refined, weighted"
README_ARMS = {
    "dense, ridge head": "dense model, a new head",
    CONTROL: "**one universal pruned model**, the control to beat",
    OURS: "**our default**: nearest entries vote",
    "iterative, full": "pruned from scratch for the task",
    "one-shot taylor": "pruned in one shot",
    "random sub-network": "random sub-network",
}


def summary(study: Mapping[str, Any]) -> str:
    """The README's table: two worlds of one study, and what its rows do not say."""
    tables = {
        world: {row[0]: row for row in study["tables"][f"{world}, shared"]} for world in ("cifar", "domains")
    }
    made = study["worlds"]["cifar"]["latency"]
    rows = []
    for arm, title in README_ARMS.items():
        one, several = tables["cifar"][arm], tables["domains"].get(arm)
        model = made["dense" if arm.startswith("dense") else "keep 0.1"]
        latency = next(timed["median_ms"] for timed in model["latency"] if timed["batch"] == 1)
        rows.append(
            (
                title if one[5] in ("", str(study["config"]["steps"])) else f"{title}, {one[5]} steps",
                one[1],
                several[1] if several else "",
                f"{latency:.1f} ms",
                one[7],
                count_text(model["parameters"]),
            )
        )
    columns = (
        "",
        "accuracy (%), one distribution",
        "several domains",
        "latency",
        "time a task",
        "parameters",
    )
    smaller = next(row for row in study["factors"]["domains"] if row[:2] == ["keep 0.05", OURS])
    fresh = next(row for row in study["tables"]["domains, fresh"] if row[0] == OURS)
    made_once = {arm: tables["cifar"][arm][8] for arm in (CONTROL, OURS)}
    return "\n\n".join(
        (
            table(columns, rows),
            f"ResNet-18 at 64 pixels, scope `inner`, keep {study['worlds']['cifar']['keep']:g}, "
            f"{study['config']['steps']} steps a task, one CPU core, latency of one image; mean ± standard error over "
            "tasks of CIFAR-100, and of CIFAR-100's groups, digits and clothes. Time is for the first column's tasks, "
            f"and without what is made once: {made_once[CONTROL]} (universal), {made_once[OURS]} (ours).",
            "Our default minus the universal model, in points: on one distribution it is level "
            f"({tables['cifar'][OURS][2]}) and costs more, so take `method=\"universal\"` there; on several domains "
            f"{tables['domains'][OURS][2]}, on fresh tasks of them {fresh[2]}, at keep 0.05 {smaller[3]}.",
        )
    )  # fmt: skip


def verdicts(study: Mapping[str, Any]) -> str:
    return table(("", "claim", "verdict"), [(v["name"], v["claim"], v["verdict"]) for v in study["verdicts"]])


def study_page(path: Path, page: Path) -> str:
    study = read(path)
    config, columns = study["config"], study["table columns"]
    commit = study.get("judged at commit")
    again = f"; judged again at commit {commit}, by `python benchmarks/study judge`" if commit else ""
    parts = [
        "# The study",
        f"{study['title']}. Made by scripts/result_pages.py from `{name_of(path)}`, which `{study['command']}` "
        f"made from the run's journal at commit {study['commit']}, {study['created'][:10]} "
        f"({machine(study['environment'])}){again}. `benchmarks/README.md` says how to repeat it.",
        "## Verdicts",
    ]
    for v in study["verdicts"]:
        parts.append(f"**{v['name']}: {v['claim']}: {v['verdict']}.**")
        parts += ["\n".join(f"- {sentence}" for sentence in v["sentences"])] if v["sentences"] else []
    parts += [
        "## Tables",
        f"All at J = {config['steps']} steps and the world's own keep ratio; best arm first, by the paired difference: "
        "arms that ran on fewer tasks have means of other tasks. p is corrected (Holm) within a table; in the verdicts "
        "above over all questions that they ask.",
    ]
    for name, rows in study["tables"].items():
        if rows:
            world = study["worlds"][name.partition(",")[0]]
            parts += [f"**{name}** ({world['model']}, keep {world['keep']:g})", table(columns["arms"], rows)]
    if study["time to accuracy"]:
        parts += [
            "## Cost to reach full iterative pruning's accuracy",
            study["table notes"]["time"],
            table(columns["time"], study["time to accuracy"]),
        ]
    parts += ["## One factor at a time", study["table notes"]["factors"]]
    for world, rows in study["factors"].items():
        if rows:
            parts += [f"**{world}, shared**", table(columns["factors"], rows)]
    parts.append("## Figures")
    for figure in sorted((FIGURES / "study").glob(f"{study['name']}_*.png")):
        parts.append(f"![{figure.stem}]({link(figure, page)})")
    parts += ["## Read this before quoting it", "\n".join(f"- {sentence}" for sentence in study["limits"])]
    done = ", ".join(f"{p['part']} {p['done']}/{p['total']}" for p in study["parts"])
    return "\n\n".join([*parts, f"Units of work done, by part: {done}."]) + "\n"
