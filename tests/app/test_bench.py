"""The bench over runtimes: every cell is there, measured or with the reason why not."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits_task, tiny_backbone

from mvp_ext.app.bench import Grid, bench, bench_table, checkpoint_of, pruned_copies, reasons
from mvp_ext.model import measure
from mvp_ext.model.card import ModelCard
from mvp_ext.train.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 32, 32)
QUICK = Grid(batches=(1,), threads=(1,), seconds=0.0)


def test_threads_are_set_and_told(models: Any) -> None:
    result = bench(models[0], {}, SHAPE, replace(QUICK, threads=(1, 2)))
    assert [x["threads"] for x in result["models"]["dense"]["latency"]] == [1, 2]
    assert torch.get_num_threads() == 1
    assert "threads" in dict(bench_table(result).columns)


@pytest.fixture
def models() -> tuple[Any, dict[str, Any]]:
    backbone = tiny_backbone()
    copies = pruned_copies(backbone.model, [0.5])
    dense = checkpoint_of(backbone.model, backbone.preprocessing)
    return dense, {name: checkpoint_of(copy, backbone.preprocessing) for name, copy in copies.items()}


def test_every_cell_is_measured_or_has_a_reason(models: Any) -> None:
    grid = Grid(("eager", "optimized"), ("float32", "bfloat16", "int8"), (1, 3), (1,), seconds=0.0)
    result = bench(*models, SHAPE, grid)
    assert list(result["models"]) == ["dense", "keep 0.5"]
    for model in result["models"].values():
        cells = {(x["runtime"], x["precision"], x["threads"], x["batch"]) for x in model["latency"]}
        assert cells == set(itertools.product(grid.runtimes, ("float32", "bfloat16"), (1,), (1, 3)))
        assert {(x["runtime"], x["precision"]) for x in model["left_out"]} == {
            ("eager", "int8"),
            ("optimized", "int8"),
        }
        assert all("has no int8" in x["why"] for x in model["left_out"])
    dense, small = (result["models"][name] for name in ("dense", "keep 0.5"))
    saved = 1 - small["flops"] / dense["flops"]
    for one, other in zip(dense["latency"], small["latency"], strict=True):
        assert one["runtime"] == other["runtime"]
        assert one["speed_up"] == 1
        assert other["speed_up"] == pytest.approx(one["median_ms"] / other["median_ms"])
        assert other["share_of_saving"] == pytest.approx((1 - other["median_ms"] / one["median_ms"]) / saved)
        assert other["bytes"] < one["bytes"]
    # Two models in two runtimes have no int8: two reasons, four rows of the table.
    lines = reasons(result)
    assert len(lines) == 2
    assert all("dense, keep 0.5" in line for line in lines)
    table = bench_table(result)
    assert sum("not measured" in row for row in table.rows) == 4
    assert len(table.rows) == 2 * (2 * 2 * 2 + 2)
    assert {"runtime", "MB on disk"} <= {heading for heading, _ in table.columns}


def test_dense_and_pruned_take_turns_in_all_runtimes(models: Any, monkeypatch: Any) -> None:
    loops: list[list[Any]] = []

    def timed(runs: Any, **how: Any) -> Any:
        loops.append(sorted(key[:2] for key in runs))
        return time_in_turn(runs, **how)

    time_in_turn = measure.time_in_turn
    monkeypatch.setattr(measure, "time_in_turn", timed)
    bench(*models, SHAPE, replace(QUICK, runtimes=("eager", "optimized")))
    assert loops == [sorted(itertools.product(models[1].keys() | {"dense"}, ("eager", "optimized")))]


def test_in_eager_mode_alone_the_table_tells_of_no_runtimes(models: Any) -> None:
    table = bench_table(bench(*models, SHAPE, QUICK))
    assert {"runtime", "threads", "MB on disk", "accuracy", "peak MB"}.isdisjoint(h for h, _ in table.columns)


def test_peers_run_in_eager_mode_alone(models: Any) -> None:
    peer = pruned_copies(models[0].model, [0.5])["keep 0.5"]
    grid = replace(QUICK, runtimes=("eager", "optimized"))
    result = bench(*models, SHAPE, grid, peers={"theirs": peer})
    theirs = result["models"]["theirs"]
    assert [x["runtime"] for x in theirs["latency"]] == ["eager"]
    assert theirs["left_out"] == []


def test_accuracy_is_that_of_the_task(models: Any) -> None:
    dense, others = models
    data, see = digits_task().split(), dense.card.preprocessing
    model = others["keep 0.5"].model
    torch.manual_seed(0)
    model.reset_classifier(3)
    # Outputs in another order than the task's classes.
    small = replace(others["keep 0.5"], card=ModelCard(see, tuple(reversed(data.class_names))))
    grid = replace(QUICK, runtimes=("eager", "optimized"), precisions=("float32",))
    found = bench(dense, {"small": small}, SHAPE, grid, data=data)["models"]
    turned = replace(data, test_labels=2 - data.test_labels)
    expected = evaluate(model, turned, see).accuracy
    assert [x["accuracy"] for x in found["small"]["latency"]] == pytest.approx([expected] * 2)
    assert [x["accuracy"] for x in found["dense"]["latency"]] == [None] * 2


def test_what_is_not_installed_is_a_row(models: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = bench(*models, SHAPE, replace(QUICK, runtimes=("eager", "openvino")))
    for model in result["models"].values():
        assert [x["runtime"] for x in model["latency"]] == ["eager"]
        assert [(x["runtime"], "pip install" in x["why"]) for x in model["left_out"]] == [("openvino", True)]


def test_int8_without_a_task_is_calibrated_on_noise(models: Any) -> None:
    pytest.importorskip("onnxruntime", reason="the extra deploy is not installed")
    pytest.importorskip("onnx", reason="the extra deploy is not installed")
    grid = replace(QUICK, runtimes=("onnxruntime",), precisions=("float32", "int8"))
    result = bench(models[0], {}, SHAPE, grid)
    assert result["int8_calibrated_on"] == "noise"
    full, small = result["models"]["dense"]["latency"]
    assert (full["precision"], small["precision"]) == ("float32", "int8")
    assert small["bytes"] < 0.7 * full["bytes"]


def test_a_budget_ends_it(models: Any) -> None:
    result = bench(*models, SHAPE, replace(QUICK, budget=0.0))
    for model in result["models"].values():
        assert model["latency"] == []
        assert {x["why"] for x in model["left_out"]} == {"no time left of 0 seconds"}
    assert len(bench_table(result).rows) == 2


def test_reasons_name_no_folder_of_this_machine(models: Any, monkeypatch: Any) -> None:
    def refuse(small: Any, runtime: str, folder: Path, **_: Any) -> None:
        raise ValueError(f"export: {folder / 'model.onnx'}: not written")

    monkeypatch.setattr("mvp_ext.app.bench.prepare", refuse)
    result = bench(*models, SHAPE, replace(QUICK, runtimes=("eager",), precisions=("float32",)))
    found = [cell["why"] for model in result["models"].values() for cell in model["left_out"]]
    assert set(found) == {"export: 0/model.onnx: not written", "export: 1/model.onnx: not written"}


def test_the_slowest_are_left_out_first(models: Any, monkeypatch: Any) -> None:
    """Where the time is enough for some."""
    monkeypatch.setattr(measure, "MIN_ROUNDS", 10**9)
    result = bench(*models, SHAPE, replace(QUICK, budget=100.0))
    assert all(model["latency"] == [] for model in result["models"].values())
    assert all("no time left" in x["why"] for m in result["models"].values() for x in m["left_out"])
