"""The journal: torn and damaged lines, several writers, other identities, files of version 0.1."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from pathlib import Path

import pytest

from mvp_ext.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deeper" / "journal.jsonl"


def keys(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(Journal(path).records)


def test_a_torn_line_is_passed_over_and_never_glued_to(path: Path) -> None:
    journal = Journal(path)
    journal.append("a", {"accuracy": 1.0}, 0.5)
    with open(path, "ab") as file:
        file.write(b'{"key": "b", "result": {"accu')
    again = Journal(path)
    assert list(again.records) == ["a"]
    with pytest.warns(UserWarning, match=r"journal\.jsonl: passed over 1 damaged line"):
        again.append("c", {}, 0.1)
    with pytest.warns(UserWarning, match=r"journal\.jsonl: passed over 1 damaged line"):
        journal.refresh()
    assert list(journal.records) == list(again.records) == keys(path) == ["a", "c"]
    journal.append("a", {"accuracy": 0.0}, 0.5)  # whoever was first stays
    assert journal.result("a") == {"accuracy": 1.0}
    assert keys(path) == ["a", "c"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"key": "b", "result": "\xff\xfe"}',
        b"\xc3",
        b"\0" * 512,
        b"[1, 2]",
        b"3",
        b'"key"',
        b'{"key": "b"}',
        b'{"key": ["b"], "result": 1}',
        b'{"result": 1}',
        b"[" * 100_000,
    ],
    ids=repr,
)
def test_a_damaged_line_blocks_nothing(path: Path, line: bytes) -> None:
    Journal(path).append("a", 1)
    with open(path, "ab") as file:
        file.write(line + b"\n" + line + b"\n")
    with pytest.warns(UserWarning, match=r"journal\.jsonl: passed over 2 damaged line") as caught:
        journal = Journal(path)
    assert len(caught) == 1
    journal.append("c", 2)
    assert keys(path) == ["a", "c"]


def test_a_line_that_is_being_written_counts_when_it_is_whole(path: Path) -> None:
    journal = Journal(path)
    journal.append("a", 1)
    with open(path, "ab", buffering=0) as file:
        file.write(b'{"key": "b", "res')
        journal.refresh()
        assert "b" not in journal
        file.write(b'ult": 2}\n')
    journal.refresh()
    assert journal.result("b") == 2


def _write(path: Path, writer: int, count: int) -> None:
    journal = Journal(path)
    for i in range(count):
        journal.append(f"{writer}-{i}", "x" * 5000)


def test_several_processes_write_whole_lines(path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=_write, args=(path, writer, 20)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {writer.exitcode for writer in writers} == {0}
    assert {json.loads(line)["key"] for line in path.read_text().splitlines()} == set(Journal(path).records)
    assert set(Journal(path).records) == {f"{writer}-{i}" for writer in range(4) for i in range(20)}


def test_a_key_is_claimed_by_one(path: Path) -> None:
    first, second = Journal(path), Journal(path)
    with first.claim("a") as mine, second.claim("a") as theirs, second.claim("b") as other:
        assert (mine, theirs, other) == (True, False, True)
    first.append("a", {}, 0.0)
    with second.claim("a") as late:
        assert not late


def test_results_of_another_identity_do_not_count(path: Path) -> None:
    ours, theirs = Journal(path, {"keep": (0.3,)}), Journal(path, {"keep": (0.5,)})
    ours.append("a", 1)
    theirs.append("a", 2)
    theirs.append("b", 3)
    assert ours.result("a") == 1
    assert theirs.result("a") == 2
    again = Journal(path, {"keep": [0.3]})
    assert {key: again.result(key) for key in again.records} == {"a": 1}
    assert not Journal(path).records


def test_a_file_of_version_0_1_is_taken_up(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"identity": {"keep": 0.3}, "key": "a", "run": {"accuracy": 0.5}}) + "\n")
    journal = Journal(path, {"keep": 0.3})
    journal.append("b", {})
    assert Journal(path, {"keep": 0.3}).result("a") == {"accuracy": 0.5}
    assert list(Journal(path, {"keep": 0.3}).records) == ["a", "b"]


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, {"keep": 0.3})
    with journal.claim("a") as mine:
        assert mine
    journal.append("a", 1)
    journal.refresh()
    assert journal.result("a") == 1
    with journal.claim("a") as mine:
        assert not mine
    assert not list(tmp_path.iterdir())
