"""Writes what is measured into the README's table and docs/results/, or checks (``--check``) that they agree.

Everything comes from committed files. Each folder of benchmarks/results/ is a device; docs/results/<device>/ gets

    study.md          from study_*.json          claims, verdicts, tables, figures
    experts.md        from experts_*.json        experts by cluster, and what is asked of them
    comparisons.md    from compare_*.json, demo_*.json
    speed.md          from deployed_*.json, latency_*.json, runtimes_*.json, memory_*.json and each op's file

and docs/scale.md its tables from results/cpu/scale.json and images.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import read_results  # noqa: E402
from scripts.pages import comparisons, coverage, experts, scale, speed, study  # noqa: E402
from scripts.pages.common import RESULTS, link, name_of, read  # noqa: E402

PAGES = ROOT / "docs" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
# The README's table and the list of verdicts show this study.
SHOWN = RESULTS / "cpu" / "study_cpu.json"
SCALE = RESULTS / "cpu" / "scale.json"
IMAGES = RESULTS / "cpu" / "images.json"
EXPERTS = RESULTS / "cpu" / "experts_diverse.json"
PAGE_TITLES = {
    "study": "every claim of the method beside the controls that could beat it",
    "comparisons": "single runs of `mvp-ext compare` and `mvp-ext demo`",
    "speed": "latency of pruned models, and every op against what a user would write",
    "coverage": "which backbones can be cut, exactly and all the way",
    "experts": "zoos of experts beside one universal model, where tasks differ: when the vote pays",
}


def render() -> dict[Path, str]:
    """Every page that is written from result files, and its text."""
    pages = {}
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        here = PAGES / folder.name
        for path in sorted(folder.glob("study_*.json")):
            pages[here / "study.md"] = study.study_page(path, here / "study.md")
        if found := sorted(folder.glob("experts_*.json"), key=experts.edition):
            pages[here / "experts.md"] = experts.experts_page(found, here / "experts.md")
        compared = [*sorted(folder.glob("compare_*.json")), *sorted(folder.glob("demo_*.json"))]
        if compared:
            pages[here / "comparisons.md"] = comparisons.comparisons_page(compared, here / "comparisons.md")
        if (path := folder / "coverage.json").exists():
            pages[here / "coverage.md"] = coverage.coverage_page(path, here / "coverage.md")
        ops = [result for result in read_results(folder) if not result.dry_run]
        if ops or any([*folder.glob("latency_*.json"), *folder.glob("runtimes_*.json")]):
            pages[here / "speed.md"] = speed.speed_page(folder, ops, here / "speed.md")
    index, readme, shown = PAGES / "index.md", ROOT / "README.md", read(SHOWN)
    listed = [
        f"- [{page.parent.name}: {page.stem}]({link(page, index)}): {PAGE_TITLES[page.stem]}"
        for page in pages
    ]
    pages[index] = _between(index, "\n\n".join(("\n".join(listed), study.verdicts(shown), speed.promises())))
    pages[readme] = _between(readme, f"{study.summary(shown)}\n\n{experts.summary_of_experts(EXPERTS)}")
    measured = f"{scale.scale(SCALE)}\n\n{scale.images(IMAGES)}"
    pages[ROOT / "docs" / "scale.md"] = _between(ROOT / "docs" / "scale.md", measured)
    return pages


def _between(page: Path, new: str) -> str:
    head, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    pages = render()
    if "--check" not in sys.argv[1:]:
        for page, new in pages.items():
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(new, encoding="utf-8")
        return 0
    stale = [page for page, new in pages.items() if not page.exists() or page.read_text("utf-8") != new]
    for page in stale:
        print(f"{name_of(page)}: not what the result files say; run python scripts/result_pages.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
