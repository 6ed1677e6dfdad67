"""Every code block of the README and of docs/ runs, page by page and from top to bottom, as a reader would run it.

What stands above a block, invisible on the page, may say ``<!-- no test: reason -->``, or ``<!-- test: code -->``:
Python that brings what the reader already has. Blocks of text show layouts and output; other languages are not allowed.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stand_ins import install, make_photos
from typer.testing import CliRunner

from mvp_ext.app import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>no test|test):(?P<note>(?:(?!-->).)*)-->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
# Blocks that install, build, or need a GPU or a Ray. No other may be left out.
NOT_RUN = {"README.md": 1, "docs/quickstart.md": 1, "docs/cuda.md": 1, "docs/workers.md": 4}


class Block(NamedTuple):
    language: str
    code: str
    setup: str
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    """A page's blocks of code, each after empty lines, so that a traceback names the page's line."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        before = "\n" * text.count("\n", 0, found.start("code"))
        setup = (found["note"] or "") if found["kind"] == "test" else ""
        yield Block(found["language"], before + found["code"], setup, found["kind"] != "no test")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run_commands(code: str) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "mvp-ext", f"{line}: only mvp-ext can run here; say why the block is no test"
            result = CliRunner().invoke(cli.app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name_of)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if not block.runs or block.language == "text":
            continue
        exec(block.setup, names)
        if block.language == "bash":
            run_commands(block.code)
        else:
            exec(compile(block.code, str(page), "exec"), names)


def test_no_block_is_left_out_in_silence() -> None:
    languages = {(name_of(page), block.language) for page in PAGES for block in blocks(page)}
    assert {language for _, language in languages} <= {"python", "bash", "text"}, languages
    left_out = Counter(name_of(page) for page in PAGES for block in blocks(page) if not block.runs)
    assert left_out == NOT_RUN
    for page in PAGES:
        fences = len(re.findall(r"^\s*(?:```|~~~)", page.read_text(encoding="utf-8"), re.M))
        assert fences == 2 * len(list(blocks(page))), f"{page}: a fence that is no block of its own"
        outside = BLOCK.sub("", page.read_text(encoding="utf-8"))
        assert not re.search(r"^\n {4}(?![ *-])\S", outside, re.M), (
            f"{page}: indented code is not seen here; fence it"
        )
