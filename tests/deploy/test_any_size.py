"""With the preprocessing in the graph a file takes bytes of any size, and gives what the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import NAMES, small_model

from mvp_ext.deploy.export import export
from mvp_ext.deploy.exported import load_exported
from mvp_ext.deploy.graph import deployable

for library in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(library, reason="the extra deploy is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_with_preprocessing_it_takes_images_of_any_size(suffix: str, tmp_path: Path) -> None:
    small = small_model("test_resnet", "all")
    export(small, tmp_path / f"m{suffix}", preprocess=True, softmax=True)
    loaded = load_exported(tmp_path / f"m{suffix}")
    graph = deployable(small.model, small.card, preprocess=True, softmax=True)
    for shape in [(1, 32, 32), (3, 20, 70), (2, 101, 50)]:
        images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
        found = loaded(images)
        torch.testing.assert_close(found.sum(1), torch.ones(len(found)))
        torch.testing.assert_close(found, graph(images), rtol=1e-3, atol=1e-4)
    # One image after the other is brought to one size first, as for the model itself.
    mixed = [torch.randint(0, 256, (*shape, 3), dtype=torch.uint8) for shape in [(40, 50), (32, 32)]]
    found, expected = loaded.predict(mixed), small.predict(mixed)
    assert found.class_names == expected.class_names == NAMES
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-3, atol=1e-4)
