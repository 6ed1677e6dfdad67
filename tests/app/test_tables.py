"""One table in three forms."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mvp_ext.app.tables import Table

TABLE = Table(
    (("model", "left"), ("median ms (p10–p90)", "right")),
    (("a | <b> [red]", "1.5 (1.4–1.7)"), ("", "30 (29–33)"), ("c", "2 (1–3)")),
    "Latency [ms]",
)


def printed(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_markdown() -> None:
    assert TABLE.markdown().splitlines() == [
        "| model | median ms (p10–p90) |",
        "| --- | ---: |",
        r"| a \| <b> [red] | 1.5 (1.4–1.7) |",
        "|  | 30 (29–33) |",
        "| c | 2 (1–3) |",
    ]
    assert Table((("a\nb", "left"),), ()).markdown() == "| a b |\n| --- |"


def test_html() -> None:
    html = TABLE.html()
    assert html.startswith("<table><thead><tr><th class='left'>model</th><th class='right'>median ms")
    assert "<tr><td class='left'>a | &lt;b&gt; [red]</td><td class='right'>1.5 (1.4–1.7)</td></tr>" in html
    assert html.count("<tr>") == 4


def test_terminal() -> None:
    """Text is no markup; a line stands between groups of rows; headings wrap to the width of their numbers."""
    wide = printed(TABLE, 100)
    assert "Latency [ms]" in wide
    assert "a | <b> [red]" in wide
    assert sum("├" in line for line in wide.splitlines()) == 1
    assert [line.split("┃")[2].strip() for line in wide.splitlines() if "┃" in line] == [
        "median ms",
        "(p10–p90)",
    ]
    folded = printed(TABLE, 20)
    assert "…" not in folded
    assert max(map(len, folded.splitlines())) <= 20
    assert printed(Table((("n", "right"),), (("1",), ("2",))), 30).count("├") == 0


def test_rows_fit_their_columns() -> None:
    with pytest.raises(ValueError, match=r"expected rows of 2 cells, got 1: \['x'\]"):
        Table(TABLE.columns, (("x",),))


def test_a_table_without_rows_or_headings() -> None:
    assert "no" in printed(Table((("no", "left"), ("", "right")), ()), 30)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_many_columns_stand_below_each_other_and_are_all_there(width: int) -> None:
    """Each part has the first column, and no word is broken that has room."""
    columns = [("arm", "left"), *((f"accuracy {number}", "right") for number in range(9))]
    rows = [("iterative from scratch", *(f"{number}.5 ± 0.{number}" for number in range(9)))] * 2
    text = printed(Table(columns, rows, "title"), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("title") == 1
    for number in range(9):
        assert text.count(f"{number}.5 ± 0.{number} ") == 2
    if width >= 60:
        assert text.count("iterative from scratch") >= 2
