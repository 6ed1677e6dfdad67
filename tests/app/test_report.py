"""The page stands alone, says the numbers, and is honest about them."""

from __future__ import annotations

import json
import math
import random
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mvp_ext.app import plots, report, results

ARMS = ("MVP", "universal", 'one-shot <Taylor> & "co"', "random", "IFP from scratch")


def made_results() -> dict[str, Any]:
    """Four tasks, five arms; every number is known."""
    noise = random.Random(0)
    arms = []
    for position, name in enumerate(ARMS):
        steps = 400 if name.startswith("IFP") else 60
        tasks = [
            {
                "task": f"task {i}",
                "accuracy": 0.9 - 0.1 * position + 0.01 * i + 0.02 * (i % 2) * position,
                "history": [
                    [s, 0.5 + 0.3 * s / steps - 0.05 * position] for s in range(0, steps + 1, steps // 4)
                ],
                "cost": {
                    "steps": steps,
                    "flops": 1e12 * (position + 1.5),
                    "seconds": 2.5 * (position + 1),
                },
            }
            for i in range(4)
        ]
        arms.append({"name": name, "model": "pruned", "tasks": tasks})
    pairs = [(noise.uniform(-2, 0), noise.gauss(0, 0.02)) for _ in range(60)]
    return {
        "format": 1,
        "title": "MVP on digits & co",
        "created": "2026-01-01",
        "command": "mvp-ext demo --out 'a <b>'",
        "environment": {"torch": "2.13.0", "cpu": "<script>alert(1)</script>"},
        "setting": {"data": "digits (5 classes a task)", "architecture": "resnet18"},
        "keep": 0.3,
        "models": {
            "dense": model(11_200_000, 2_000_000_000, 10.0),
            "pruned": model(1_500_000, 400_000_000, 4.0),
        },
        "arms": arms,
        "dense_accuracy": 0.951,
        "overlap": [{"similarity": s, "iou": 0.3 + 0.05 * s + e} for s, e in pairs],
        "layers": [
            {"name": f"layer{i}", "units": 64 * i, "kept": dict.fromkeys(ARMS, 16 * i)} for i in (1, 2, 3)
        ],
        "zoo": {"entries": 24, "seconds": 100.0, "flops": 3e14, "accuracy": 0.94},
        "notes": ["Six tasks only."],
    }


def model(parameters: int, flops: int, ms: float) -> dict[str, Any]:
    timed = [
        {
            "batch": b,
            "p10_ms": 0.9 * ms * b,
            "median_ms": ms * b,
            "p90_ms": 1.2 * ms * b,
            "throughput": 1e3 / ms,
        }
        for b in (1, 32)
    ]
    return {"parameters": parameters, "flops": flops, "latency": timed}


@pytest.fixture(scope="module")
def page() -> str:
    return report.render_report(made_results())


def test_the_page_loads_nothing(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]|<script|<link|<iframe|@import|url\(", page)
    assert "default-src 'none'" in page
    sources = re.findall(r"(?:src|srcset)='([^']*)'", page)
    assert len(sources) == 2 * 5
    assert all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    for source in sources:
        svg = b64decode(source.partition(",")[2]).decode()
        assert svg.startswith("<?xml")
        assert not re.search(r"href=['\"]https?:", svg)


def test_light_and_dark_are_two_figures(page: str) -> None:
    figure = re.search(
        r"<picture><source media='\(prefers-color-scheme: dark\)' srcset='(.*?)'><img src='(.*?)'", page
    )
    assert figure is not None
    dark, light = (b64decode(uri.partition(",")[2]).decode() for uri in figure.groups())
    assert plots.DARK.ink in dark
    assert plots.LIGHT.ink in light
    assert plots.LIGHT.ink not in dark


def test_the_page_has_the_numbers(page: str) -> None:
    # 0.90, 0.91, 0.92, 0.93: mean 91.5, s.e. sqrt(5/3)/2 = 0.6
    assert "91.5 ± 0.6" in page
    # against the second: 0.1, 0.08, 0.1, 0.08 → 9.0 ± 0.6
    assert "+9.0 ± 0.6" in page
    for number in (
        "95.1",
        "11.2 M",
        "1.5 M",
        "2 GFLOP",
        "400 MFLOP",
        "1.5 TFLOP",
        "2.50×, 2.50×",
        "2.5 s",
        "13%",
        "20%",
    ):
        assert number in page, number


def test_names_are_escaped(page: str) -> None:
    assert "one-shot &lt;Taylor&gt; &amp; &quot;co&quot;" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<Taylor>" not in page


def test_the_page_is_honest(page: str) -> None:
    assert "flatters voting" in page
    assert "A re-implementation from the abstract and secondary sources; hyper-parameters are ours" in page
    assert "own numbers were not verified" in page
    assert "chance 0.18" in page
    assert "24 entries" in page
    assert "in no arm&#x27;s cost" in page
    other = made_results() | {"setting": {"data": "CIFAR-100"}}
    assert "flatters voting" not in report.render_report(other)


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ([0.1, 0.1, 0.12], "MVP is more accurate than other"),
        ([-0.1, -0.1, -0.12], "MVP is less accurate than other"),
        ([-0.1, 0.1, 0.02], "No clear difference between MVP and other"),
        # Two standard errors and more, but of two tasks.
        ([0.05, 0.06], "No clear difference between MVP and other"),
        ([0.1], "on one task, which proves nothing"),
    ],
)
def test_findings_know_noise(differences: list[float], sentence: str) -> None:
    cost = {"steps": 1, "flops": 1.0, "seconds": 1.0}
    data = made_results()
    data["arms"] = [
        {
            "name": name,
            "model": "pruned",
            "tasks": [{"task": i, "accuracy": a, "cost": cost} for i, a in enumerate(values)],
        }
        for name, values in (("MVP", [0.8] * len(differences)), ("other", [0.8 - d for d in differences]))
    ]
    (finding,) = report.findings(data, results.summarise(data))
    assert sentence in finding


def test_least_results_make_a_page() -> None:
    data = made_results()
    for key in ("overlap", "layers", "zoo", "notes", "dense_accuracy", "environment", "command"):
        del data[key]
    data["models"] = {name: m | {"latency": []} for name, m in data["models"].items()}
    data["arms"] = [
        {"name": "only", "model": "pruned", "tasks": [{"task": "a", "accuracy": 0.5, "cost": {}}]}
    ]
    page = report.render_report(data)
    assert "50.0" in page
    assert "<picture>" not in page


def test_figures_are_saved_as_png(tmp_path: Path) -> None:
    path = report.save_report(made_results(), tmp_path / "new" / "report.html", figures=tmp_path / "figures")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    files = sorted(tmp_path.glob("figures/*.png"))
    assert [f.stem for f in files] == ["accuracy", "cost", "latency", "layers", "overlap"]
    assert all(f.read_bytes().startswith(b"\x89PNG") and f.stat().st_size < 150_000 for f in files)


def test_the_same_results_give_the_same_page(page: str) -> None:
    assert report.render_report(json.loads(json.dumps(made_results()))) == page


def test_terminal_table() -> None:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.summary_table(made_results()))
    text = console.export_text()
    assert "91.5 ± 0.6" in text
    assert "dense model" in text


def test_results_file_round_trip(tmp_path: Path) -> None:
    results.save_results(made_results(), tmp_path / "a" / "results.json")
    assert results.load_results(tmp_path / "a" / "results.json") == made_results()


def test_a_write_that_fails_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, file = tmp_path / "report.html", tmp_path / "results.json"
    report.save_report(made_results(), page)
    results.save_results(made_results(), file)
    before = page.read_bytes(), file.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mvp_ext.storage.os.fsync", full)
    other = made_results() | {"title": "another"}
    for save in (lambda: report.save_report(other, page), lambda: results.save_results(other, file)):
        with pytest.raises(OSError, match="No space left"):
            save()
    assert (page.read_bytes(), file.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "expected a dictionary of format 1, got 2"),
        ({"arms": []}, "expected at least one"),
        ({"models": {"pruned": {}}}, "expected one named dense"),
        ({"arms": [{"name": "x", "model": "none", "tasks": [1]}]}, "arm x: no measurement of its model none"),
        ({"arms": [{"name": "x", "model": "dense", "tasks": []}]}, "arm x: expected at least one task"),
    ],
)
def test_what_is_no_results(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.render_report(made_results() | change)


def test_what_experts_told_is_said() -> None:
    """On two of four tasks; an arm that heard none says nothing."""
    made = made_results()
    shares = ((1.0, 1.0), (0.5, 0.6), (0.5, 0.0), (0.0, 0.0))
    for task, (known, told) in zip(made["arms"][0]["tasks"], shares, strict=True):
        task["choice"] = {"known_share": known, "known_by_expert": {}, "told_by_experts": told}
    made["arms"][1]["tasks"][0]["choice"] = {"left_out_error": 0.1, "steps": 40}
    (sentence,) = report.said_by_experts(made)
    assert sentence.startswith("MVP: ")
    assert "50% of a task's classes" in sentence
    assert "told 40% of the training images, on 2 of 4 tasks" in sentence
    assert "on 2 of 4 tasks" in report.render_report(made)
    assert report.said_by_experts(made_results()) == []


def test_a_file_that_is_no_results(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is not a results file"):
        results.load_results(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a dictionary of format 1, got list"):
        results.load_results(tmp_path / "y.json")


def test_chance_line_is_what_independent_draws_give() -> None:
    units, keep = 4000, 0.3
    draw = random.Random(0)
    a, b = (set(draw.sample(range(units), int(keep * units))) for _ in range(2))
    assert len(a & b) / len(a | b) == pytest.approx(results.chance_overlap(keep), abs=0.02)


def test_learning_curve_uses_common_steps() -> None:
    tasks = [{"history": [[0, 0.2], [5, 0.4], [10, 0.6]]}, {"history": [[0, 0.4], [10, 0.8]]}]
    curve = results.learning_curve(tasks)
    assert [step for step, _ in curve] == [0, 10]
    assert [m.value for _, m in curve] == pytest.approx([0.3, 0.7])


def test_mean_and_units() -> None:
    assert results.Mean.of([0.5]).error is None
    assert results.Mean.of([0.0, 1.0]).error == pytest.approx(math.sqrt(0.5 / 2))
    assert [results.seconds_text(s) for s in (0.35, 2.5, 45, 200, 7300)] == [
        "350 ms",
        "2.5 s",
        "45 s",
        "3 min 20 s",
        "2 h 01 min",
    ]
    assert results.rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert results.rank_correlation([1, 1, 1], [1, 2, 3]) is None
