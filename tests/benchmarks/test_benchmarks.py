"""The benchmarks of the CUDA kernels, as far as they can be tested without a GPU: that they run, what they sum up."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from bench_merge import Task, find_positions, moved_bytes  # noqa: E402
from cuda_bench import summary  # noqa: E402
from models import Cut  # noqa: E402

GPU_CHECK = ROOT / "scripts" / "gpu_check.sh"
SCRIPTS = sorted((ROOT / "benchmarks").glob("bench_*_cuda.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_dry_run(script: Path, tmp_path: Path) -> None:
    """Every contender and check of every case, called once on the CPU; nothing is written."""
    done = subprocess.run(
        [sys.executable, str(script), "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the calls are tiny: threads would wait for each other
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^\w+: [1-9]\d* cases ran once$", done.stdout, re.MULTILINE), done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_check_is_bash_and_runs_every_benchmark() -> None:
    done = subprocess.run(["bash", "-n", str(GPU_CHECK)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (ops,) = re.findall(r"^ *ops=\((.*)\)$", GPU_CHECK.read_text(), re.MULTILINE)
    assert sorted(f"bench_{op}_cuda" for op in ops.split()) == [script.stem for script in SCRIPTS]
    (shares,) = re.findall(r"^ *shares=\((.*)\)$", GPU_CHECK.read_text(), re.MULTILINE)
    assert len(shares.split()) == len(ops.split())


def test_what_merge_moves() -> None:
    """A weight [4, 3, 2, 1] of float32 and its bias; rows 0, 1, 3 are wanted, and columns 0 and 2.

    The first voter has rows 0 and 3 with column 2, the second row 1 with both."""

    def cut(rows: list[int], columns: list[int]) -> Cut:
        index = torch.tensor(rows)
        return Cut([torch.zeros(4, 3, 2, 1), torch.zeros(4)], [index, index], [torch.tensor(columns), None])

    weights = torch.ones(2)
    task = Task(
        cut([0, 1, 3], [0, 2]), [cut([0, 3], [1, 2]), cut([1, 2], [0, 2])], [[], []], weights, [1.0, 1.0]
    )
    # Of the weight: 2 and 2 words of the voters, 2 of the base, 6 of the result; of the bias 2, 1, none and 3.
    assert moved_bytes(task, find_positions(task)) == 4 * (2 * (2 + 2 + 2 + 6) + (2 + 1 + 3))


def row(case: str, median: float, **more: Any) -> dict[str, Any]:
    times = {"p10": median, "median": median, "p90": median, "rounds": 7}
    return {"case": case, "device_us": {"ours": times}, "ratios": {}, "goals": {}, "most_us": None, **more}


def write(folder: Path, op: str, rows: list[dict[str, Any]], **more: Any) -> None:
    content = {"op": op, "environment": {}, "rows": rows, "left_out": [], "failed": {}, **more}
    (folder / f"{op}.json").write_text(json.dumps(content))


def cells(printed: str) -> list[list[str]]:
    """The table's lines, without their frame."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a kind of goal: how many cases reach it, and the case that is furthest from it."""
    write(
        tmp_path,
        "meta_vote",
        [
            row("small", 4.0, ratios={"loop": 80.0, "sort": 3.0}, goals={"loop": 50.0}, most_us=10.0),
            row("large", 12.5, ratios={"loop": 40.0}, goals={"loop": 50.0}, most_us=10.0),
        ],
        failed={"wrong": "AssertionError: not equal"},
        left_out=["late", "later"],
    )
    share = {"share": 0.91, "least": 0.8}
    write(tmp_path, "merge", [row("a", 30.0, share_of_copy=share), row("b", 2.0, share_of_copy=share)])
    unwanted = {"share": 0.5, "least": None}
    write(tmp_path, "pack", [row("c", 1.0, share_of_copy=unwanted)])
    write(tmp_path, "models", [], failed={"resnet18": "OutOfMemoryError: of all"})
    (tmp_path / "other.json").write_text("{}")

    assert summary(tmp_path) == 2
    printed = capsys.readouterr().out
    assert tmp_path.name in printed.splitlines()[0]
    assert cells(printed) == [
        ["merge", "≥ 0.8 of copy", "0.91", "2 of 2", "0.91: a"],
        ["meta_vote", "≥ 50 × loop", "40 – 80", "1 of 2", "40: large"],
        ["", "≤ 10 µs", "4 – 12.5", "1 of 2", "12.5: large"],
        ["", "failed", "1 cases", "", "wrong"],
        ["", "left out", "2 cases", "", "late"],
        ["models", "failed", "1 cases", "", "resnet18"],
    ]
