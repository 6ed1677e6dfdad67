"""Single runs of `mvp-ext compare` and `mvp-ext demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mvp_ext.app.report import summary_table
from mvp_ext.app.results import load_results
from scripts.pages.common import FIGURES, link, machine, name_of


def comparisons_page(paths: Sequence[Path], page: Path) -> str:
    parts = [
        "# Comparisons",
        "Each is one run of one command, with one seed and one learning rate for all arms: read differences of a point "
        "or two accordingly. The [study](study.md) tests the claims; the first two tables are of the plain method, "
        "and the demo's digits are too easy to tell much.",
    ]
    for path in paths:
        results = load_results(path)
        entries = results.get("zoo", {}).get("entries", "?")
        parts += [
            f"## {results['title']}",
            f"Keep {results['keep']:g}, {len(results['arms'][0]['tasks'])} held-out tasks, a zoo of {entries}. "
            f"`{name_of(path)}`, {machine(results['environment'])}:",
            f"```text\n{results.get('command', '')}\n```",
            summary_table(results).markdown(),
        ]
        figures = sorted((FIGURES / path.stem).glob("*.png"))
        parts += [f"![{results['title']}: {figure.stem}]({link(figure, page)})" for figure in figures]
    return "\n\n".join(parts) + "\n"
