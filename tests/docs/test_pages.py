"""What pages and picture promise beside their examples: the API is whole, the picture's bars are what was measured."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

import mvp_ext

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_has_a_place_in_the_reference() -> None:
    pages = (ROOT / "docs" / "api").glob("*.md")
    shown = {
        name for page in pages for name in re.findall(r"^::: mvp_ext\.(\w+)$", page.read_text("utf-8"), re.M)
    }
    assert shown == set(mvp_ext.__all__)


def test_docstrings_are_markdown() -> None:
    """Sphinx's roles would be shown as they are."""
    for path in (ROOT / "mvp_ext").rglob("*.py"):
        assert not re.search(r":(meth|class|func|mod|attr):`", path.read_text("utf-8")), path


def test_the_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_bars_of_the_picture_are_what_was_measured() -> None:
    picture = (ROOT / "docs" / "assets" / "mvp.svg").read_text("utf-8")
    widths = {
        name: float(re.findall(rf'id="{name}-latency"[^>]* width="([\d.]+)"', picture)[0])
        for name in ("dense", "pruned")
    }
    study = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "study_cpu.json").read_text("utf-8"))
    measured = study["worlds"]["cifar"]["latency"]
    dense, pruned = (measured[name]["latency"][0]["median_ms"] for name in ("dense", "keep 0.1"))
    assert widths["pruned"] / widths["dense"] == pytest.approx(pruned / dense, rel=0.02)


def test_nothing_is_loaded_from_the_network() -> None:
    for path in [ROOT / "docs" / "assets" / "mvp.svg", ROOT / "docs" / "assets" / "site.css"]:
        addresses = set(re.findall(r"https?://[^\"') ]+", path.read_text("utf-8")))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path


def test_another_device_gets_pages_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.spec_from_file_location("result_pages", ROOT / "scripts" / "result_pages.py")
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    cpu, gpu = ROOT / "benchmarks" / "results" / "amd-epyc", tmp_path / "gpu"
    gpu.mkdir()
    for name in ("pack.json", "latency_resnet18.json"):
        shutil.copy(cpu / name, gpu)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    pages = script.render()
    speed = pages[ROOT / "docs" / "results" / "gpu" / "speed.md"]
    assert "## Pruned models" in speed
    assert "### pack" in speed
    assert "[gpu: speed](gpu/speed.md)" in pages[ROOT / "docs" / "results" / "index.md"]
