"""The ops' benchmarks, as far as they can be tested without a GPU: that they run, what they write and sum up."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import harness  # noqa: E402
from bench_merge import MergeCase, find_positions, moved_bytes  # noqa: E402
from models import Cut  # noqa: E402
from results import machine_folder, read_results, summary  # noqa: E402

GPU_CHECK = ROOT / "scripts" / "gpu_check.sh"
SCRIPTS = sorted((ROOT / "benchmarks").glob("bench_*.py"))
# They work on the CPU wherever the models are.
NOT_ON_A_GPU = {"bench_bundles", "bench_neighbours"}
CPU_RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc"


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> Callable[..., str]:
    """Runs a script in an empty folder and says what it printed; in this process, as importing torch takes longer."""

    # What a script sets for its process is put back.
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)

    def run_script(script: Path, *options: str) -> str:
        # The calls are tiny: threads would wait for each other.
        monkeypatch.setattr(sys, "argv", [str(script), "--threads", "1", *options])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.mark.parametrize(
    ("script", "device"),
    [
        pytest.param(script, device, id=f"{script.stem}-{device}")
        for script in SCRIPTS
        for device in ("cpu", "cuda")
        if device == "cpu" or script.stem not in NOT_ON_A_GPU
    ],
)
def test_dry_run(script: Path, device: str, run: Callable[..., str], tmp_path: Path) -> None:
    """Every contender and check of every case, called once on the CPU; nothing is written."""
    printed = run(script, "--device", device, "--dry-run")
    assert re.search(r"^\w+: [1-9]\d* cases ran once$", printed, re.MULTILINE), printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "options", "written"),
    [
        ("large.py", (), {"large.json"}),
        ("scale.py", (), {"scale.json"}),
        ("images.py", ("--without", "memory", "torchvision"), {"images.json"}),
        ("deployed.py", ("--work", "work"), {"deployed_test_resnet.json", "accuracy_latency.png"}),
        (
            "runtimes.py",
            ("--only", "vit_tiny", "--without", "compile", "openvino", "onnxruntime"),
            {"runtimes_vit_tiny_patch16_224.json"},
        ),
        (
            "runtimes.py",
            (
                "--only",
                "vit_tiny",
                "--memory",
                "--threads",
                "1",
                "--without",
                "compile",
                "openvino",
                "onnxruntime",
            ),
            {"memory_vit_tiny_patch16_224.json"},
        ),
    ],
)
def test_whole_models_run_dry(
    script: str, options: tuple[str, ...], written: set[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--dry-run", "--out", "out", *options]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in (tmp_path / "out").iterdir()} == written


def test_cpu_and_gpu_write_one_form(run: Callable[..., str], tmp_path: Path) -> None:
    """A run on the CPU and a GPU's dry run: the same keys, and on the GPU a call's time beside."""
    script = ROOT / "benchmarks" / "bench_residual_add.py"
    on_cpu, on_gpu = tmp_path / "cpu.json", tmp_path / "gpu.json"
    options = ("--only", "small: NCHW", "--seconds", "0", "--out", str(on_cpu))
    assert "small: NCHW" in run(script, *options)
    options = ("--device", "cuda", "--dry-run", "--only", "tokens", "--out", str(on_gpu))
    run(script, *options)

    cpu, gpu = json.loads(on_cpu.read_text()), json.loads(on_gpu.read_text())
    assert cpu.keys() == gpu.keys()
    (cpu_row,), (gpu_row,) = cpu["rows"], gpu["rows"]
    assert gpu_row.keys() - cpu_row.keys() == {"call_us"}
    assert not cpu_row.keys() - gpu_row.keys()
    for key in ("case", "times_us", "ratios", "floors", "moved_bytes", "gb_per_s", "limit", "cold"):
        assert type(cpu_row[key]) is type(gpu_row[key])
    assert cpu_row["limit"].keys() == gpu_row["limit"].keys()
    assert cpu_row["times_us"]["copy"].keys() == gpu_row["times_us"]["ours"].keys()
    assert cpu_row["times_us"]["ours"]["rounds"] >= 9
    assert gpu_row["call_us"].keys() == gpu_row["times_us"].keys() - {"copy"}
    assert {"torch.compile", "ours, CUDA graph"} <= gpu_row["ratios"].keys()
    assert (cpu["device"], cpu["dry_run"], gpu["device"], gpu["dry_run"]) == ("cpu", False, "cuda", True)
    # One reader; and what it read is what was written.
    read = {results.device: results for results in read_results(tmp_path)}
    assert [read[device].to_json() for device in ("cpu", "cuda")] == [cpu, gpu]
    assert read["cpu"].command.startswith(
        "python benchmarks/bench_residual_add.py --threads 1 --only 'small: NCHW'"
    )
    assert [promise.unit for promise in read["cuda"].rows[0].promises()] == ["× index_add, relu", "of copy"]


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.stem != "bench_models"], ids=lambda path: path.stem
)
def test_committed_results_are_of_this_form(script: Path) -> None:
    """Those of the CPU, which are older than the GPU's."""
    file = CPU_RESULTS / f"{script.stem.removeprefix('bench_')}.json"
    content = json.loads(file.read_text())
    (results,) = read_results(file)
    assert results.op == content["op"] == file.stem
    assert results.device == "cpu"
    assert not results.dry_run
    assert re.fullmatch(r"[0-9a-f]{12}\+?", results.commit)
    assert results.command.startswith(f"python benchmarks/{script.name}")
    assert results.created.startswith("202")
    assert [row.to_json() for row in results.rows] == content["rows"]
    assert any(list(row.promises()) for row in results.rows)


@pytest.mark.parametrize(
    ("cpu", "folder"),
    [
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "intel-xeon-platinum-8488c"),
        ("AMD EPYC 9R14 96-Core Processor", "amd-epyc-9r14"),
        ("", "cpu"),
    ],
)
def test_each_processor_has_a_folder(monkeypatch: pytest.MonkeyPatch, cpu: str, folder: str) -> None:
    monkeypatch.setattr("results.cpu_name", lambda: cpu)
    assert machine_folder().name == folder


def test_a_folder_is_read_and_another_form_refused(tmp_path: Path) -> None:
    """Results of other kinds lie in the folder too; a key that is not of the form is a mistake."""
    assert [r.op for r in read_results(CPU_RESULTS)] == sorted(
        script.stem.removeprefix("bench_") for script in SCRIPTS if script.stem != "bench_models"
    )
    write(tmp_path, "pack", [{**row("a", 1.0), "device_us": {}}])
    with pytest.raises(TypeError, match="device_us"):
        read_results(tmp_path)


def bench(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> harness.Bench:
    threads = str(torch.get_num_threads())
    words = ["bench_x.py", "--threads", threads, "--seconds", "0", "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", words)
    return harness.Bench("x")


def test_a_case_fails_alone_and_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is there after each case; a failure is in it, and in the exit status."""

    def wrong() -> None:
        raise AssertionError("not equal\nand more")

    out = tmp_path / "x.json"
    x = torch.ones(64)
    timed = bench(monkeypatch, out)
    timed.case("wrong", x.sum, {}, check=wrong)
    assert read_results(out)[0].failed == {"wrong": "AssertionError: not equal"}
    timed.case("right", x.sum, {"peer": x.sum, "none": None}, floors={"peer": 2, "none": 3}, most_us=1e6)
    (results,) = read_results(out)
    assert [(r.case, r.floors, list(r.ratios)) for r in results.rows] == [("right", {"peer": 2}, ["peer"])]
    with pytest.raises(SystemExit, match="1 cases failed: wrong"):
        timed.finish()
    assert "right" in capsys.readouterr().out


def test_a_budget_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = bench(monkeypatch, tmp_path / "x.json", "--budget", "0", "--only", "a")
    assert not timed.wants("a", "b", "and a")
    timed.finish()
    assert read_results(tmp_path / "x.json")[0].left_out == ["a", "and a"]
    assert "no time for 2 cases: a, and a" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        bench(monkeypatch, tmp_path / "x.json", "--device", "cuda")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_check_is_bash_and_runs_every_benchmark() -> None:
    done = subprocess.run(["bash", "-n", str(GPU_CHECK)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (ops,) = re.findall(r"^ *ops=\((.*)\)$", GPU_CHECK.read_text(), re.MULTILINE)
    assert {f"bench_{op}" for op in ops.split()} == {script.stem for script in SCRIPTS} - NOT_ON_A_GPU
    (shares,) = re.findall(r"^ *shares=\((.*)\)$", GPU_CHECK.read_text(), re.MULTILINE)
    assert len(shares.split()) == len(ops.split())


def test_what_merge_moves() -> None:
    """A weight [4, 3, 2, 1] of float32 and its bias; rows 0, 1, 3 are wanted, and columns 0 and 2.

    The first voter has rows 0 and 3 with column 2, the second row 1 with both."""

    def cut(rows: list[int], columns: list[int]) -> Cut:
        index = torch.tensor(rows)
        return Cut([torch.zeros(4, 3, 2, 1), torch.zeros(4)], [index, index], [torch.tensor(columns), None])

    weights = torch.ones(2)
    task = MergeCase(
        cut([0, 1, 3], [0, 2]), [cut([0, 3], [1, 2]), cut([1, 2], [0, 2])], [[], []], weights, [1.0, 1.0]
    )
    # Of the weight: 2 and 2 words of the voters, 2 of the base, 6 of the result; of the bias 2, 1, none and 3.
    assert moved_bytes(task, find_positions(task)) == 4 * (2 * (2 + 2 + 2 + 6) + (2 + 1 + 3))


def row(case: str, median: float, **more: Any) -> dict[str, Any]:
    times = {"p10": median, "median": median, "p90": median, "rounds": 7}
    return {"case": case, "times_us": {"ours": times}, "ratios": {}, "floors": {}, **more}


def write(folder: Path, op: str, rows: list[dict[str, Any]], **more: Any) -> None:
    origin = {"created": "", "command": "", "commit": "", "environment": {}}
    content = {"op": op, "device": "cuda", **origin, "rows": rows, "left_out": [], "failed": {}, **more}
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
            row("small", 4.0, ratios={"loop": 80.0, "sort": 3.0}, floors={"loop": 50.0}, most_us=10.0),
            row("large", 12.5, ratios={"loop": 40.0}, floors={"loop": 50.0}, most_us=10.0),
        ],
        failed={"wrong": "AssertionError: not equal"},
        left_out=["late", "later"],
    )
    share = {"name": "copy", "share": 0.91, "floor": 0.8}
    write(tmp_path, "merge", [row("a", 30.0, limit=share), row("b", 2.0, limit=share)])
    write(tmp_path, "pack", [row("c", 1.0, limit={"name": "copy", "share": 0.5, "floor": None})])
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


def test_a_row_of_coverage() -> None:
    """A tiny transformer goes all the way, and a model that is refused says why."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch_pruning")
    import coverage

    row = coverage.measure_row("test_vit")
    assert row["whole"], row["reasons"]
    assert row["scope"] == "heads+mlp"
    assert row["flops"]["ours"] < 0.7 * row["flops"]["dense"]
    assert {"dense", "ours"} <= row["latency_ms"].keys()
    refused = coverage.measure_row("nf_resnet26")
    assert not refused["whole"]
    assert refused["scopes"] == []
    assert "StdConv2d" in refused["reasons"]["found"]
    said = coverage.summary({"test_vit": row, "nf_resnet26": refused})
    assert "whole: 1 of 2 of timm, 0 of 0 from elsewhere" in said
    assert "accepted, and not exact: none" in said
