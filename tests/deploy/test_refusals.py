"""What cannot be exported or opened is named in one line, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits_task
from small_models import small_model
from torch import Tensor

from mvp_ext.data.tasks import TaskData
from mvp_ext.deploy import export as module
from mvp_ext.deploy.export import export
from mvp_ext.deploy.exported import load_exported
from mvp_ext.deploy.graph import deployable

for library in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(library, reason="the extra deploy is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SUFFIXES = (".onnx", ".xml", ".pt2")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def other_classes() -> TaskData:
    return digits_task((3, 4, 5)).split()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.tflite", {}, "expected a name that ends in .onnx or .xml or .pt2, got"),
        ("m", {"to": "openvino"}, "expected a name that ends in .xml, got"),
        ("m.onnx", {"to": "tflite"}, "expected one of onnx, openvino, pt2, got 'tflite'"),
        ("m.onnx", {"precision": "float16"}, "expected one of float32, bfloat16, int8, got 'float16'"),
        ("m.onnx", {"precision": "bfloat16"}, "onnx has no bfloat16: ONNX Runtime has no convolutions"),
        ("m.pt2", {"precision": "int8"}, "pt2 has no int8"),
        ("m.onnx", {"precision": "int8"}, "int8 is calibrated on the task's training images, got none"),
        ("m.pt2", {"data": other_classes()}, "expected the classes of the model's outputs"),
    ],
)
def test_refusals_leave_nothing(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(small_model("test_resnet", "inner"), tmp_path / name, **options)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("suffix", [".xml", ".pt2"])
def test_a_file_of_another_function_is_not_put_in_place(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, *args: Any, **kwargs: Any) -> Any:
        graph = deployable(model, *args, **kwargs)
        graph.model.fc.bias.data[0] += 3
        return graph

    small = small_model("test_resnet", "inner")
    export(small, tmp_path / f"m{suffix}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(module, "deployable", wrong)
    with pytest.raises(ValueError, match="it computes something else than the model"):
        export(small, tmp_path / f"m{suffix}")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_both_parts_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where older ones were, those."""
    replace, small = os.replace, small_model("test_resnet", "inner")

    def full_disk(source: Any, target: Any) -> None:
        if str(target).endswith("m.xml") and ".old" not in str(source):
            raise OSError("no space left on device")
        replace(source, target)

    for old in ({}, {"m.xml": b"old", "m.bin": b"old, too"}):
        for name, data in old.items():
            (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="no space"):
            export(small, tmp_path / "m.xml")
        monkeypatch.undo()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_files_of_others_are_named(tmp_path: Path) -> None:
    program = torch.export.export(Doubled(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "other.pt2")
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "other.onnx")  # type: ignore[union-attr]
    import openvino

    openvino.save_model(openvino.Core().read_model(tmp_path / "other.onnx"), tmp_path / "other.xml")
    for suffix in SUFFIXES:
        with pytest.raises(ValueError, match=rf"other\{suffix}: not a file that mvp_ext exported"):
            load_exported(tmp_path / f"other{suffix}")
        (tmp_path / f"damaged{suffix}").write_bytes(b"PK\x03\x04 not what it seems")
        with pytest.raises(ValueError, match=rf"damaged\{suffix}: not a"):
            load_exported(tmp_path / f"damaged{suffix}")
        with pytest.raises(FileNotFoundError):
            load_exported(tmp_path / f"none{suffix}")
    (tmp_path / "other.bin").unlink()
    with pytest.raises(ValueError, match=r"other\.xml: not a"):
        load_exported(tmp_path / "other.xml")


def test_a_wrong_batch_is_named(tmp_path: Path) -> None:
    export(small_model("test_resnet", "inner"), tmp_path / "m.pt2")
    loaded = load_exported(tmp_path / "m.pt2")
    for wrong in (
        torch.zeros(1, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(3, 32, 32),
        torch.zeros(0, 3, 32, 32),
    ):
        with pytest.raises(ValueError, match=r"ExportedModel: images: expected torch.float32 \[B, C, S, S\]"):
            loaded(wrong)
    with pytest.raises(ValueError, match="threads: expected at least 1"):
        load_exported(tmp_path / "m.pt2", threads=0)
