"""A bundle as one ONNX file: an output for each task, which says what the bundle says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_bundle import IMAGES, checkpoint, with_head

from mvp_ext.deploy import export_bundle as module
from mvp_ext.deploy.bundle import Bundle, load_bundle, save_bundle
from mvp_ext.deploy.export_bundle import export_bundle, is_exported_bundle, load_exported_bundle
from mvp_ext.deploy.exported import load_exported

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_thread")

# Names that graphs have, too, and one that no graph has.
TASKS = {"linear": 3, "conv2d": 5, "val_0": 2, "b, ü/'x'": 4}


def bundle(
    path: Path, name: str = "test_resnet", scope: str | None = None, own: tuple[str, ...] = ()
) -> Bundle:
    base = checkpoint(name, scope)
    save_bundle([with_head(base, task, k, statistics=task in own) for task, k in TASKS.items()], path)
    return load_bundle(path)


@pytest.mark.parametrize(
    ("name", "scope", "own", "preprocess"),
    [
        ("test_resnet", "all", ("conv2d",), False),
        ("test_resnet", "inner", (), True),
        ("test_vit", "heads+mlp", (), False),
    ],
)
def test_outputs_are_the_bundles(
    name: str, scope: str, own: tuple[str, ...], preprocess: bool, tmp_path: Path
) -> None:
    tasks = bundle(tmp_path / "tasks", name, scope, own)
    report = export_bundle(tasks, tmp_path / "tasks.onnx", preprocess=preprocess)
    assert report.bytes == (tmp_path / "tasks.onnx").stat().st_size
    # One backbone for each set of statistics, and little else.
    weights = sum(t.numel() * t.element_size() for t in (*tasks.shared.state.values(), *tasks.linear))  # type: ignore[union-attr]
    assert report.bytes < (1 + len(own)) * weights + 100_000
    assert report.agreement == 1
    assert report.relative < 1e-4
    assert [o.name for o in onnx.load(tmp_path / "tasks.onnx").graph.output] == list(TASKS)
    found = load_exported_bundle(tmp_path / "tasks.onnx", threads=1)
    assert found.tasks == tasks.tasks
    assert found.cards == tasks.cards
    assert found.kept == {layer: units.tolist() for layer, units in tasks.mask.indices.items()}
    images = list(IMAGES)
    everything, expected = found.predict(images, batch=2), tasks.predict(images)
    for task in TASKS:
        torch.testing.assert_close(
            everything[task].probabilities, expected[task].probabilities, atol=1e-4, rtol=1e-4
        )
        assert everything[task].class_names == expected[task].class_names
    torch.testing.assert_close(
        found.predict(images, "conv2d").probabilities, everything["conv2d"].probabilities
    )


def test_what_is_no_bundle_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    tasks = bundle(tmp_path / "tasks")
    with pytest.raises(ValueError, match=r"expected a name that ends in \.onnx"):
        export_bundle(tasks, tmp_path / "tasks.xml")
    export_bundle(tasks, tmp_path / "tasks.onnx")
    assert is_exported_bundle(tmp_path / "tasks.onnx")
    with pytest.raises(ValueError, match="load_exported_bundle opens it"):
        load_exported(tmp_path / "tasks.onnx")
    with pytest.raises(ValueError, match=r"expected one of linear, .* got 'x'"):
        load_exported_bundle(tmp_path / "tasks.onnx").predict(IMAGES, "x")
    with pytest.raises(FileNotFoundError):
        load_exported_bundle(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"bad\.onnx: not an ONNX file"):
        load_exported_bundle(tmp_path / "bad.onnx")
    # What computes something else is not put in place.
    before = (tmp_path / "tasks.onnx").read_bytes()
    split = module._split

    def wrong(model: Any, which: Bundle) -> None:
        split(model, which)
        for node in model.graph.node:
            if node.op_type == "Relu":
                node.op_type = "Neg"

    monkeypatch.setattr(module, "_split", wrong)
    with pytest.raises(ValueError, match=r"not written: .* something else"):
        export_bundle(tasks, tmp_path / "tasks.onnx")
    assert (tmp_path / "tasks.onnx").read_bytes() == before
