"""What an interrupted comparison finds of its finished runs: runs.jsonl after a kill, a bad disk, an older version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from digits import digits_task

from mvp_ext.app.comparison import FinishedRuns

IDENTITY = {"options": {"keep": 0.3, "batches": (1, 32)}}


def test_a_torn_line_costs_no_other_run(tmp_path: Path) -> None:
    path, task = tmp_path / "runs.jsonl", digits_task()
    FinishedRuns(path, IDENTITY).put(task, "random", {"accuracy": 0.5})
    with open(path, "ab") as file:
        file.write(b'{"identity": {"op')
    with pytest.warns(UserWarning, match=r"runs\.jsonl: passed over 1 damaged line"):
        FinishedRuns(path, IDENTITY).put(task, "ifp", {"accuracy": 0.7})
    with pytest.warns(UserWarning, match=r"runs\.jsonl: passed over 1 damaged line"):
        again = FinishedRuns(path, IDENTITY)
    assert again.get(task, "random") == {"accuracy": 0.5}
    assert again.get(task, "ifp") == {"accuracy": 0.7}
    assert again.get(task, "one_shot") is None
    assert again.get(digits_task((3, 4)), "random") is None


def test_bytes_that_are_no_text_block_nothing(tmp_path: Path) -> None:
    path, task = tmp_path / "runs.jsonl", digits_task()
    FinishedRuns(path, IDENTITY).put(task, "random", {"accuracy": 0.5})
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    with pytest.warns(UserWarning, match=r"runs\.jsonl: passed over 1 damaged line"):
        runs = FinishedRuns(path, IDENTITY)
    assert runs.get(task, "random") == {"accuracy": 0.5}


def test_runs_of_version_0_1_are_taken_up(tmp_path: Path) -> None:
    path, task = tmp_path / "runs.jsonl", digits_task()
    key = f"{task.fingerprint} {task.name} random"
    path.write_text(json.dumps({"identity": IDENTITY, "key": key, "run": {"accuracy": 0.5}}) + "\n")
    assert FinishedRuns(path, IDENTITY).get(task, "random") == {"accuracy": 0.5}
    assert FinishedRuns(path, {"options": {"keep": 0.5}}).get(task, "random") is None
