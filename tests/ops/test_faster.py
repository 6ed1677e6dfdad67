"""Which way an op goes is tried where it runs, once a class, and is the user's to force."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mvp_ext.ops import faster, pruned_linear
from mvp_ext.ops.faster import decide, forget, kept_ways, known_way, size_class
from mvp_ext.ops.pruned_linear_plan import cpu_way

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MVP_FASTER", raising=False)
    forget()
    yield
    forget()


def sleeps(seconds: float, calls: list[str], name: str):
    def call() -> None:
        calls.append(name)
        time.sleep(seconds)

    return call


def ways(kernel: float, library: float) -> tuple[dict, list[str]]:
    calls: list[str] = []
    return {"kernel": sleeps(kernel, calls, "kernel"), "library": sleeps(library, calls, "library")}, calls


@pytest.mark.parametrize(
    ("kernel", "library", "expected"),
    [(1e-3, 3e-3, "kernel"), (3e-3, 1e-3, "library"), (2e-3, 2e-3, "kernel")],
)
def test_the_faster_way_is_taken_from_then_on(kernel, library, expected):
    tried, calls = ways(kernel, library)
    assert known_way(("op", 1)) is None
    assert decide(("op", 1), tried, "rule") == expected == known_way(("op", 1))
    # In turn, and for tens of milliseconds.
    assert calls[:4] == ["kernel", "library"] * 2
    assert len(calls) < 40
    torch.set_num_threads(2)
    assert known_way(("op", 1)) is None


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_never_5_percent_behind_the_better_way(seed, monkeypatch):
    """On timings that are known: whatever else a machine does adds to a call, about as often little as much."""
    draw = random.Random(seed)
    true = {"kernel": 1e-3 * draw.uniform(0.5, 2.0), "library": 1e-3}
    monkeypatch.setattr(faster, "_timed", lambda call: true[call()] * (1 + abs(draw.gauss(0, 0.05))))
    way = decide(("op", seed), {name: partial(str, name) for name in true}, "kernel")
    assert true[way] <= 1.05 * min(true.values())


def test_what_was_measured_is_kept_for_the_next_process():
    decide(("op", "float32", 1, True), ways(3e-3, 1e-3)[0], "kernel")
    forget()
    tried, calls = ways(1e-3, 3e-3)
    assert decide(("op", "float32", 1, True), tried, "kernel") == "library"
    assert calls == []
    (kept,) = kept_ways().values()
    assert kept["way"] == "library"
    assert kept["milliseconds"]["library"] < kept["milliseconds"]["kernel"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"[\\"op\\", 1]": {"way": "third"}}', "[" * 99_999])
def test_a_damaged_or_foreign_file_is_measured_again(text):
    faster._path().parent.mkdir(parents=True)
    faster._path().write_text(text)
    assert decide(("op",), ways(3e-3, 1e-3)[0], "kernel") == "library"
    assert json.dumps(["op", 1]) in kept_ways()


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert decide(("op",), ways(3e-3, 1e-3)[0], "kernel") == "library"
    assert known_way(("op",)) == "library"


@pytest.mark.parametrize(("asked", "way"), [("kernel", "kernel"), ("library", "library"), ("rule", "kernel")])
def test_the_environment_decides(monkeypatch, asked, way):
    monkeypatch.setenv("MVP_FASTER", asked)
    tried, calls = ways(3e-3, 1e-3)
    assert decide(("op",), tried, "kernel") == way
    assert calls == []
    assert kept_ways() == {}


def test_the_log_says_what_was_measured(monkeypatch, capfd):
    monkeypatch.setenv("MVP_FASTER", "log")
    decide(("op", 7), ways(3e-3, 1e-3)[0], "kernel")
    assert capfd.readouterr().err.startswith('mvp_ext: ["op", 7, 1]: kernel ')


def test_an_error_decides_nothing():
    def fails() -> None:
        raise IndexError("out of range")

    with pytest.raises(IndexError):
        decide(("op",), {"kernel": fails, "library": fails}, "kernel")
    assert known_way(("op",)) is None


def test_classes_of_sizes():
    assert [size_class(n) for n in (0, 1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 3, 3, 4, 4, 5]


# ---- pruned_linear

SHAPES = [(1, 24, 16), (17, 24, 16), (64, 40, 24)]


def case(rows: int, inputs: int, outputs: int, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs // 2, generator=draw).to(dtype)
    weight = torch.randn(outputs, inputs, generator=draw).to(dtype)
    bias, residual = (
        torch.randn(outputs, generator=draw).to(dtype),
        torch.randn(rows, outputs, generator=draw).to(dtype),
    )
    return x, weight, bias, torch.arange(0, outputs, 2), torch.arange(1, inputs, 2), residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["kernel", "library", "", "rule"])
def test_both_ways_compute_the_same(monkeypatch, way, shape, dtype):
    monkeypatch.setenv("MVP_FASTER", way)
    x, weight, bias, rows, columns, residual = case(*shape, dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    for kwargs in ({}, {"activation": "gelu"}, {"residual": residual}):
        expected = F.linear(x.double(), weight[rows][:, columns].double(), bias[rows].double())
        if kwargs.get("activation"):
            expected = F.gelu(expected)
        if "residual" in kwargs:
            expected = residual.double().index_add(1, rows, expected)
        got = pruned_linear(x, weight, bias, rows, columns, **kwargs)
        torch.testing.assert_close(got.double(), expected, **tolerance)
        again = pruned_linear(x, weight, bias, rows, columns, **kwargs)
        assert torch.equal(got, again)


def test_a_decision_is_remembered_until_it_is_forgotten(monkeypatch):
    taken: list[str] = []

    def spy(name: str):
        def run(x, weight, *others):
            taken.append(name)
            return F.linear(x, weight)

        return run

    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    arguments = (x, weight, None, None, None, 1, 1, None, spy("kernel"), spy("library"))
    for way in ("kernel", "library"):
        monkeypatch.setenv("MVP_FASTER", way)
        forget()
        assert cpu_way(*arguments) == way
        # Whatever the environment says later.
        monkeypatch.setenv("MVP_FASTER", "rule")
        assert cpu_way(*arguments) == way
    assert not taken


def test_a_call_out_of_range_is_an_error_before_anything_is_decided():
    x, weight, bias, rows, columns, _ = case(*SHAPES[0], torch.float32)
    with pytest.raises((IndexError, ValueError), match="out_index"):
        pruned_linear(x, weight, bias, rows + 16, columns)
    assert pruned_linear(x, weight, bias, rows, columns).shape == (1, 8)
