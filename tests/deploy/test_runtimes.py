"""Every runtime computes what the model does; what a runtime does not have is an error that says so."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import nn

from mvp_ext.deploy import runtimes
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.surgery import prune_model

pytestmark = pytest.mark.usefixtures("one_thread")
INSTALLED = ["eager", "optimized", *(name for name in ("onnxruntime", "openvino") if find_spec(name))]


@pytest.fixture
def small() -> Any:
    model = tiny_model("test_resnet").eval()
    structure = find_structure(model, "all")
    mask = Mask.random(structure, 0.4, seed=0, align=1)
    see = Preprocessing(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return PrunedCheckpoint(prune_model(model, mask), mask, structure, card=ModelCard(see))


@pytest.mark.parametrize("runtime", INSTALLED)
def test_runtimes_compute_what_the_model_does(small: Any, runtime: str, tmp_path: Path) -> None:
    images = tiny_images(small.model)
    with torch.no_grad():
        expected = small.model(images)
    prepared = runtimes.prepare(small, runtime, tmp_path)
    assert prepared.bytes == sum(
        path.stat().st_size for path in tmp_path.iterdir() if path.stem == prepared.path.stem
    )
    torch.testing.assert_close(prepared.open(1)(images), expected, rtol=1e-3, atol=1e-3)


def test_compile(small: Any, tmp_path: Path) -> None:
    """A smaller model: compiling takes its time."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.randn(2, 3, 8, 8)
    run = runtimes.prepare(replace(small, model=model), "compile", tmp_path).open()
    with torch.no_grad():
        torch.testing.assert_close(run(images), model(images))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("runtime", ["eager", "optimized"])
def test_bfloat16_takes_half_the_bytes(small: Any, runtime: str, tmp_path: Path) -> None:
    images = tiny_images(small.model)
    full = runtimes.prepare(small, runtime, tmp_path)
    half = runtimes.prepare(small, runtime, tmp_path, precision="bfloat16")
    assert half.bytes < 0.6 * full.bytes
    got, expected = half.open()(images), full.open()(images)
    assert got.dtype == torch.bfloat16
    assert float((got - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert next(small.model.parameters()).dtype == torch.float32


def test_what_a_runtime_does_not_have(small: Any, tmp_path: Path) -> None:
    for runtime, precision, message in (
        ("eager", "int8", "eager has no int8"),
        ("onnxruntime", "bfloat16", "onnxruntime has no bfloat16"),
        ("magic", "float32", "runtime: expected one of eager"),
        ("eager", "float8", "precision: expected one of float32"),
    ):
        with pytest.raises(ValueError, match=message):
            runtimes.prepare(small, runtime, tmp_path, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_is_not_installed(small: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install"):
        runtimes.prepare(small, "onnxruntime", tmp_path)


def test_peak_memory_grows_with_the_batch(small: Any, tmp_path: Path) -> None:
    prepared = runtimes.prepare(small, "eager", tmp_path)
    one, many = (runtimes.peak_memory(prepared, (3, 64, 64), batch, 1) for batch in (1, 64))
    # The weights, and at least the stem's output of 64 images.
    assert one > prepared.bytes
    assert many > one + 63 * 16 * 32 * 32 * 4 * 0.5
