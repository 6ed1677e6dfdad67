"""Signs of life: what is said of long work in a log and in a terminal, and the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mvp_ext.app import progress
from mvp_ext.app.progress import Work, progress_bar


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_follows_from_what_this_run_did() -> None:
    clock = Clock()
    work = Work(100, clock)
    # Made by an earlier run: done when it is first heard of.
    work.advance("a", 50, 50)
    clock.now = 1.0
    work.advance("b", 0, 50)
    assert "left" not in work.times()
    clock.now = 11.0
    work.advance("b", 10, 50)
    assert work.overall == (60, 100)
    # 10 steps in 11 s; 40 are left.
    assert work.times() == "11 s so far, about 44 s left"
    assert work.line("zoo") == "zoo: b 10/50; in all 60/100 (60%); 11 s so far, about 44 s left"


def test_a_plan_that_was_too_small_grows() -> None:
    work = Work(5, Clock())
    work.advance("a", 8, 8)
    assert work.overall == (8, 8)


def test_of_several_parts_and_no_plan_no_estimate() -> None:
    clock = Clock()
    work = Work(None, clock)
    work.advance("", 0, 4)
    clock.now = 2.0
    work.advance("", 1, 4)
    assert work.line("fine-tuning") == "fine-tuning 1/4; 2.0 s so far, about 6.0 s left"
    work.advance("other", 1, 4)
    assert "left" not in work.times()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr("mvp_ext.app.console.console", Console(file=file, width=120))
    monkeypatch.setattr(progress, "console", Console(file=file, width=120))
    return file


def test_a_log_gets_a_line_every_few_seconds(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(progress, "Work", lambda total: Work(total, clock))
    with progress_bar("zoo", 1000) as advance:
        for step in range(1000):
            clock.now += 0.1
            advance("[red]a\x1b", step + 1, 1000)
    lines = log.getvalue().splitlines()
    # 100 seconds, a line every five.
    assert 19 <= len(lines) <= 21
    assert all(line.startswith(r"zoo: [red]a\x1b ") for line in lines)
    assert "1000/1000 (100%)" in lines[-1]


def test_short_work_says_how_it_ended(log: io.StringIO) -> None:
    with progress_bar("prune") as advance:
        advance("task", 3, 3)
    assert log.getvalue().startswith("prune: task 3/3; ")


def test_a_terminal_has_a_bar_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=100, force_terminal=True))
    with progress_bar("zoo", 20) as advance:
        for name in "ab":
            for step in range(10):
                advance(f"[red]{name}", step + 1, 10)
    shown = file.getvalue()
    assert "20/20" in shown
    assert "zoo: [red]b" in shown
