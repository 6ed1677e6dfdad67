"""``mvp-ext export``: what it says, and what it refuses in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run
from digits import digits_task, tiny_backbone

from mvp_ext.app.export_command import described
from mvp_ext.deploy.export import ExportReport
from mvp_ext.deploy.exported import load_exported
from mvp_ext.pruning.prune import prune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a small model of three digits."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    prune(tiny_backbone(), digits_task(), None, method="random", steps=1).save(path)
    return path


def test_checked_on_images_of_the_models_classes(small: Path, tmp_path: Path) -> None:
    said = run(f"export {small} --out {tmp_path}/new/m.pt2 --data digits --preprocess --softmax").output
    assert "against PyTorch on 107 images: largest difference" in said
    assert "100.0 % of labels agree" in said
    assert said.splitlines()[-1].startswith("accuracy ")
    loaded = load_exported(tmp_path / "new" / "m.pt2")
    assert (loaded.preprocess, loaded.softmax) == (True, True)


def test_beside_the_model_and_on_noise(small: Path) -> None:
    said = run(f"export {small} --to pt2").output
    assert "images of noise" in said
    assert load_exported(small.with_suffix(".pt2")).precision == "float32"
    before = small.with_suffix(".pt2").read_bytes()
    assert "give --force to replace it" in run(f"export {small} --to pt2 --precision bfloat16", 2).output
    assert small.with_suffix(".pt2").read_bytes() == before
    run(f"export {small} --to pt2 --precision bfloat16 --force")
    assert load_exported(small.with_suffix(".pt2")).precision == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "export: which format? Give --to onnx|openvino|pt2"),
        ("--to tflite", "export: to: expected one of onnx, openvino, pt2, got 'tflite'"),
        ("--out {}/m.tflite", "export: path: expected a name that ends in .onnx or .xml or .pt2"),
        ("--to pt2 --out {}/m.onnx", "export: path: expected a name that ends in .pt2"),
        ("--out {}/m.pt2 --precision int4", "export: precision: expected one of float32, bfloat16, int8"),
        ("--out {}/m.pt2 --precision int8", "export: precision: pt2 has no int8"),
        ("--out {}/m.onnx --precision int8", "int8 is calibrated on the task's training images"),
        ("--out {}/m.onnx --precision bfloat16", "onnx has no bfloat16"),
    ],
)
def test_refusals_are_one_line(options: str, message: str, small: Path, tmp_path: Path) -> None:
    said = run(f"export {small} {options.format(tmp_path)}", code=2)
    assert said.output.startswith("error: export: ")
    assert message in said.output
    assert len(said.output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_last_line_says_when_more_than_a_point_is_lost() -> None:
    report = ExportReport(Path("m.onnx"), 1_250_000, "int8", 1000, 0.5, 0.05, 0.97, 0.9, 0.889)
    first, accuracy, last = described(report)
    assert first.startswith("m.onnx: 1.25 MB, int8; against PyTorch on 1000 images")
    assert accuracy == "accuracy 90.0 % → 88.9 %"
    assert last == "int8 cost 1.1 points of accuracy"
    assert described(replace(report, accuracy=0.891))[-1] == "accuracy 90.0 % → 89.1 %"
