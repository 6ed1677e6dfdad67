"""A table, made once, for a page of Markdown, for HTML and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from mvp_ext.app.console import plain

Side = Literal["left", "right"]
# What a column takes beside its text: a space on both sides, and a line.
_FRAME = 3


@dataclass(frozen=True)
class Table:
    """Rows of text. ``rich``'s console prints it as it is.

    Attributes:
        columns: (heading, side) of each column: text stands left, numbers right.
        rows: one cell a column. A row whose first cell is empty belongs to the row above.
        title: shown above it in a terminal.
    """

    columns: Sequence[tuple[str, Side]]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Table: expected rows of {len(self.columns)} cells, got {len(row)}: {list(row)}"
                )

    def markdown(self) -> str:
        """Without the title, and without a line break at its end."""
        rules = ["---:" if side == "right" else "---" for _, side in self.columns]
        lines = [[heading for heading, _ in self.columns], rules, *self.rows]
        return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)

    def html(self) -> str:
        """A ``table`` element without the title; cells have the classes ``left`` and ``right``."""
        head = "".join(f"<th class='{side}'>{escape(heading)}</th>" for heading, side in self.columns)
        body = "".join(f"<tr>{self._html_cells(row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _html_cells(self, row: Sequence[str]) -> str:
        return "".join(
            f"<td class='{side}'>{escape(cell)}</td>"
            for cell, (_, side) in zip(row, self.columns, strict=True)
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """In a terminal too narrow for all columns, as several tables, each with the first column.

        Headings of numbers are no wider than these; what still does not fit is folded, never left out.
        """
        headings, widths = [], []
        for position, (heading, side) in enumerate(self.columns):
            widest = max((cell_len(plain(row[position])) for row in self.rows), default=0)
            if side == "right":
                heading = "\n".join(wrap(heading, max([1, widest, *map(len, heading.split())])))
            headings.append(plain(heading))
            # Long texts are folded.
            widths.append(min(max(widest, *map(cell_len, headings[-1].split("\n"))), options.max_width // 2))
        title = Text(plain(self.title), style="table.title") if self.title else None
        for columns in _blocks([width + _FRAME for width in widths], options.max_width - 1):
            table = RichTable(title=title, title_justify="left")
            title = None
            for position in columns:
                table.add_column(Text(headings[position]), justify=self.columns[position][1], overflow="fold")
            grouped = any(not row[0] for row in self.rows)
            for row in self.rows:
                if grouped and row[0]:
                    table.add_section()
                table.add_row(*(Text(plain(row[position])) for position in columns))
            yield table


def _blocks(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns that fit beside each other, the first among them every time."""
    blocks = [[0]]
    for position in range(1, len(widths)):
        used = sum(widths[column] for column in blocks[-1])
        if len(blocks[-1]) > 1 and used + widths[position] > room:
            blocks.append([0])
        blocks[-1].append(position)
    return blocks


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
