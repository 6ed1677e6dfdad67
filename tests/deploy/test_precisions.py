"""int8 and bfloat16: smaller, about as good, and said to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digits import digits_task, tiny_backbone
from small_models import small_model
from tiny import tiny_images

from mvp_ext.deploy.export import export
from mvp_ext.deploy.exported import load_exported
from mvp_ext.deploy.graph import deployable
from mvp_ext.deploy.onnx_file import to_onnx
from mvp_ext.deploy.quantize import quantized
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.result import Result
from mvp_ext.pruning.settings import Settings

for library in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(library, reason="the extra deploy is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained() -> Result:
    """Tells three digits apart."""
    settings = Settings(scope="all")
    return prune(tiny_backbone(), digits_task(), None, settings, method="random", steps=20)


def weights(path: Path) -> int:
    """Bytes of the part that holds them: of so small a model, an ``.xml`` is mostly graph."""
    return (path.with_suffix(".bin") if path.suffix == ".xml" else path).stat().st_size


@pytest.mark.parametrize(("suffix", "preprocess"), [(".onnx", True), (".xml", False)])
def test_int8_is_smaller_and_as_good(trained: Result, suffix: str, preprocess: bool, tmp_path: Path) -> None:
    plain = export(trained, tmp_path / f"plain{suffix}")
    small = export(trained, tmp_path / f"small{suffix}", precision="int8", preprocess=preprocess)
    assert small.images == plain.images == 30
    assert small.accuracy_before == plain.accuracy == pytest.approx(trained.accuracy)
    assert small.accuracy is not None
    # Two of 30 images.
    assert small.accuracy >= trained.accuracy - 0.07
    assert small.relative > 10 * plain.relative
    assert weights(small.path) < 0.5 * weights(plain.path)
    assert load_exported(small.path).precision == "int8"


@pytest.mark.parametrize(
    ("name", "scope", "left_out"), [("test_resnet", "all", 1), ("test_vit", "heads+mlp", 2)]
)
def test_int8_is_what_holds_the_work(name: str, scope: str, left_out: int) -> None:
    """All layers with weights, but for the classifier and a patch embedding, both sides of them in bytes."""
    small = small_model(name, scope)
    x = tiny_images(small.model, 20)[..., :32, :32]
    graph_of = deployable(small.model, small.card)
    program = torch.export.export(graph_of, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    graph = quantized(to_onnx(program, "logits"), x).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    in_bytes = [
        node
        for node in graph.node
        if all(makers.get(of) == "DequantizeLinear" for of in node.input[:2])
        and node.op_type in ("Conv", "Gemm", "MatMul")
    ]
    layers = [m for m in small.model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(in_bytes) == len(layers) - left_out


@pytest.mark.parametrize("suffix", [".xml", ".pt2"])
def test_bfloat16_is_half_as_large(trained: Result, suffix: str, tmp_path: Path) -> None:
    plain = export(trained, tmp_path / f"plain{suffix}")
    half = export(trained, tmp_path / f"half{suffix}", precision="bfloat16")
    assert weights(half.path) < 0.7 * weights(plain.path)
    assert half.relative > 10 * plain.relative
    loaded = load_exported(half.path)
    assert loaded.precision == "bfloat16"
    assert loaded(torch.randn(2, 3, 32, 32)).dtype is torch.float32


def test_the_order_of_the_classes_of_data_does_not_matter(trained: Result, tmp_path: Path) -> None:
    data = digits_task().split()
    turned = {f"{which}_labels": (getattr(data, f"{which}_labels") + 1) % 3 for which in ("train", "test")}
    other = replace(data, class_names=(data.class_names[2], *data.class_names[:2]), **turned)
    small = trained.checkpoint()
    assert export(small, tmp_path / "m.pt2", data=other).accuracy == pytest.approx(trained.accuracy)
