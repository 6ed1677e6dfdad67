"""Writes the README's measured tables and docs/study.md from the committed result files, or checks (``--check``) that
they agree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
OPS = (
    *("meta_vote", "importance", "pack", "merge", "pruned_linear"),
    *("pruned_attention", "pruned_conv2d", "residual_add"),
)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def comparison(path: Path) -> str:
    from mvp_ext.app.report import summary_table
    from mvp_ext.app.results import load_results

    results = load_results(path)
    made = summary_table(results)
    columns = [heading for heading, _ in made.columns]
    tasks = len(results["arms"][0]["tasks"])
    title = f"**{results['title']}**, keep {results['keep']:g}, {tasks} held-out tasks"
    zoo = results.get("zoo", {}).get("entries", "?")
    figures = sorted((ROOT / "docs" / "figures" / path.stem).glob("*.png"))
    links = ", ".join(f"[{f.stem}]({f.relative_to(ROOT).as_posix()})" for f in figures)
    source = f"{path.relative_to(ROOT).as_posix()}: `{results.get('command', '')}`"
    return (
        f"{title}, a zoo of {zoo} ({source}).\n\n"
        + table(columns, made.rows)
        + (f"\n\nFigures: {links}." if links else "")
    )


STUDY = RESULTS / "study_cpu.json"
STUDY_PAGE = ROOT / "docs" / "study.md"
README_ARMS = {
    "dense, ridge head", "dense fine-tuned", "universal", "universal, refined's rate", "universal, one entry's cost",
    "mvp refined, weighted", "mvp specialised + score", "elastic + score", "iterative, full", "mvp", "mvp plain",
    "one-shot taylor", "Torch-Pruning Taylor", "random sub-network", "from scratch",
}  # fmt: skip


def study_summary(results: dict[str, Any]) -> str:
    """The README's part: a verdict a hypothesis, and the tables of tasks that share classes with their zoo."""
    verdicts = [(v["name"], v["claim"], v["verdict"]) for v in results["verdicts"]]
    columns, shown = results["table columns"]["arms"], [0, 1, 2, 3, 4, 6, 7, 8]
    page = STUDY_PAGE.relative_to(ROOT).as_posix()
    parts = [
        f"**The study**: every claim of the method beside the controls that could beat it ([{page}]({page}), from "
        f"{STUDY.relative_to(ROOT).as_posix()}).",
        table(("", "claim", "verdict"), verdicts),
        f"At J = {results['config']['steps']} steps; differences are paired over tasks. In the tables p is corrected "
        f"(Holm) within a table, in the verdicts over all questions that they ask. All arms: {page}.",
    ]
    for name, rows in results["tables"].items():
        world, _, split = name.partition(", ")
        if rows and results["worlds"][world]["kinds"][split] == "shared":
            parts.append(
                f"**{name}**: {results['worlds'][world]['model']}, keep {results['worlds'][world]['keep']:g}"
            )
            rows = [[row[i] for i in shown] for row in rows if row[0] in README_ARMS]
            parts.append(table([columns[i] for i in shown], rows))
    return "\n\n".join(parts)


def study_page(results: dict[str, Any]) -> str:
    """docs/study.md."""
    config, columns = results["config"], results["table columns"]
    parts = [
        "# The study",
        f"{results['title']}. Made from {STUDY.relative_to(ROOT).as_posix()} by scripts/readme_tables.py; that file "
        f"was made from the run's journal by `{results['command']}` at commit {results['commit']}, "
        f"{results['created'][:10]}. How to repeat it: "
        "[benchmarks/README.md](../benchmarks/README.md).",
        "## Verdicts",
    ]
    for v in results["verdicts"]:
        parts.append(f"**{v['name']}: {v['claim']}: {v['verdict']}.**")
        parts += ["\n".join(f"- {sentence}" for sentence in v["sentences"])] if v["sentences"] else []
    parts += [
        "## Tables",
        f"All at J = {config['steps']} steps and the world's own keep ratio; best arm first, by the paired difference: "
        "arms that ran on fewer tasks have means of other tasks. p is corrected (Holm) within a table; in the verdicts "
        "above over all questions that they ask.",
    ]
    for name, rows in results["tables"].items():
        if rows:
            world = results["worlds"][name.partition(",")[0]]
            parts.append(f"**{name}** ({world['model']}, keep {world['keep']:g})")
            parts.append(table(columns["arms"], rows))
    if results["time to accuracy"]:
        parts.append("## Cost to reach full iterative pruning's accuracy")
        parts.append(results["table notes"]["time"])
        parts.append(table(columns["time"], results["time to accuracy"]))
    parts += [
        "## One factor at a time",
        results["table notes"]["factors"],
    ]
    for world, rows in results["factors"].items():
        if rows:
            parts += [f"**{world}, shared**", table(columns["factors"], rows)]
    parts.append("## Figures")
    for figure in sorted((ROOT / "docs" / "figures" / "study").glob(f"{results['name']}_*.png")):
        parts.append(f"![{figure.stem}](figures/study/{figure.name})")
    parts.append("## Read this before quoting it")
    parts.append("\n".join(f"- {sentence}" for sentence in results["limits"]))
    done = ", ".join(f"{p['part']} {p['done']}/{p['total']}" for p in results["parts"])
    parts.append(f"Units of work done, by part: {done}.")
    return "\n\n".join(parts) + "\n"


def latency(paths: Sequence[Path]) -> str:
    rows = []
    for path in paths:
        result = json.loads(path.read_text())
        models = result["models"]
        for name, model in models.items():
            if name == "dense" or "torch-pruning" in name:
                continue
            for timed in model["latency"]:
                peer = models.get(f"{name}, torch-pruning")
                other = next(
                    (x["median_ms"] for x in (peer or {}).get("latency", ()) if x["batch"] == timed["batch"]),
                    None,
                )
                rows.append(
                    (
                        f"{result['setting']['model']} ({result['setting']['scope']}), {name}",
                        str(timed["batch"]),
                        f"{models['dense']['flops'] / model['flops']:.2f}×",
                        f"{timed['median_ms']:.1f} ms",
                        f"{timed['speed_up']:.2f}×",
                        "" if timed["share_of_saving"] is None else f"{timed['share_of_saving']:.0%}",
                        "" if other is None else f"{other / timed['median_ms']:.2f}×",
                    )
                )
    columns = (
        "model",
        "batch",
        "fewer FLOPs",
        "median latency",
        "against dense",
        "saving that became time",
        "against Torch-Pruning's same shapes",
    )
    sources = ", ".join(p.relative_to(ROOT).as_posix() for p in paths)
    return f"**Latency** at 224 × 224 on two cores, timed in turn ({sources}).\n\n" + table(columns, rows)


def ops(paths: Sequence[Path]) -> str:
    """What was promised of the ops' speed, how much of it is kept, and every promise that is not."""
    summary, missed = [], []
    for path in paths:
        result = json.loads(path.read_text())
        promises = [promise for row in result["rows"] for promise in _promises(row)]
        broken = [promise for promise in promises if promise[2] < promise[3]]
        link = f"[{result['op']}]({path.relative_to(ROOT).as_posix()})"
        summary.append((link, str(len(result["rows"])), str(len(promises)), str(len(promises) - len(broken))))
        missed += [
            (result["op"], case, against, f"{got:.2f}", f"{floor:g}") for case, against, got, floor in broken
        ]
    return (
        "**Ops** on two threads, against what a user would write, in turn in one run. A promise is a least ratio of a "
        "peer's time to ours, or a least share of the memory bandwidth; the files have every case with p10 and p90.\n\n"
        + table(("op", "cases", "promises", "kept"), summary)
        + "\n\n<details><summary>the promises that are not kept</summary>\n\n"
        + table(("op", "case", "against", "×", "promised"), missed)
        + "\n\n</details>"
    )


def _promises(row: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    for peer, floor in row["floors"].items():
        yield row["case"], peer, row["ratios"][peer], floor
    limit = row.get("limit") or {}
    if limit.get("floor"):
        yield row["case"], f"{limit['name']} bandwidth", limit["share"], limit["floor"]


def render() -> str:
    sections = []
    if STUDY.exists():
        sections.append(study_summary(json.loads(STUDY.read_text())))
    comparisons = [
        p for p in [*sorted(RESULTS.glob("compare_*.json")), RESULTS / "demo_digits.json"] if p.exists()
    ]
    sections += [comparison(p) for p in comparisons]
    if found := sorted(RESULTS.glob("latency_*.json")):
        sections.append(latency(found))
    if found := [RESULTS / f"{op}.json" for op in OPS if (RESULTS / f"{op}.json").exists()]:
        sections.append(ops(found))
    return "\n\n".join(sections)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    pages = {readme: f"{head}{BEGIN}\n{render()}\n{END}{tail}"}
    if STUDY.exists():
        pages[STUDY_PAGE] = study_page(json.loads(STUDY.read_text()))
    if "--check" not in sys.argv[1:]:
        for page, new in pages.items():
            page.write_text(new, encoding="utf-8")
        return 0
    stale = [page for page, new in pages.items() if not page.exists() or page.read_text("utf-8") != new]
    for page in stale:
        print(f"{page.name}: not what the result files say; run python scripts/readme_tables.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
