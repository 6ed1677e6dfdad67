"""Exported files compute what the model does, say what its card says, and open with nothing of this package."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import MODELS, NAMES, small_model
from tiny import tiny_images

from mvp_ext.deploy.export import ExportReport, export
from mvp_ext.deploy.exported import load_exported
from mvp_ext.model.card import ModelCard

for library in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(library, reason="the extra deploy is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}
# A ResNet of scope `inner` is in one format: nothing of it is not in the others.
FILES = [(*MODELS[0], ".onnx"), *((*model, suffix) for model in MODELS[1:] for suffix in RUNTIMES)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], ExportReport]:
    """Every small model in every format, in a folder of its own."""
    reports = {}
    for name, scope, suffix in FILES:
        folder = tmp_path_factory.mktemp(name)
        reports[name, scope, suffix] = export(small_model(name, scope), folder / f"m{suffix}")
    return reports


@pytest.mark.parametrize(("name", "scope", "suffix"), FILES)
def test_round_trip(
    plain: dict[tuple[str, str, str], ExportReport], name: str, scope: str, suffix: str
) -> None:
    small, report = small_model(name, scope), plain[name, scope, suffix]
    parts = set(report.path.parent.iterdir())
    assert parts == ({report.path, report.path.with_suffix(".bin")} if suffix == ".xml" else {report.path})
    assert report.bytes == sum(path.stat().st_size for path in parts)
    assert report.relative < 1e-4
    assert report.agreement == 1
    assert report.accuracy is None

    loaded = load_exported(report.path, threads=1)
    assert loaded.runtime == RUNTIMES[suffix]
    assert (loaded.precision, loaded.preprocess, loaded.softmax) == ("float32", False, False)
    assert loaded.card == small.card
    assert loaded.metadata.kept == {layer: units.tolist() for layer, units in small.mask.indices.items()}
    assert loaded.metadata.versions["torch"] == torch.__version__
    for batch in (1, 5):
        x = tiny_images(small.model, batch)[..., :32, :32]
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), small.model(x), rtol=1e-3, atol=1e-3)
    images = torch.randint(0, 256, (5, 40, 40, 3), dtype=torch.uint8)
    found, expected = loaded.predict(images, batch=2), small.predict(images)
    assert found.class_names == expected.class_names == NAMES
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-3, atol=1e-4)


def test_a_vit_of_patches_of_16_pixels(tmp_path: Path) -> None:
    small = small_model("vit_tiny_patch16_224", "heads+mlp", size=48, depth=1)
    assert export(small, tmp_path / "m.onnx").relative < 1e-4


def test_without_preprocessing_and_names_noise_is_enough(tmp_path: Path) -> None:
    small = replace(small_model("test_resnet", "inner", in_chans=1), card=ModelCard())
    small.model.pretrained_cfg = {"input_size": (1, 40, 40)}  # type: ignore[assignment]
    export(small, tmp_path / "m.pt2")
    loaded = load_exported(tmp_path / "m.pt2")
    assert loaded(torch.randn(3, 1, 40, 40)).shape == (3, 5)
    with pytest.raises(ValueError, match="does not say how it sees images"):
        loaded.predict(torch.zeros(1, 40, 40, 3, dtype=torch.uint8))


WITHOUT_US = """
import sys
onnx_file, xml_file, pt2_file = sys.argv[1:]
sys.modules["mvp_ext"] = sys.modules["timm"] = None
import torch
x = torch.load("x.pt")
y = [torch.export.load(pt2_file).module()(x)]
import onnxruntime, openvino
y.append(torch.from_numpy(onnxruntime.InferenceSession(onnx_file).run(["logits"], {"images": x.numpy()})[0]))
compiled = openvino.Core().compile_model(xml_file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
y.append(torch.from_numpy(compiled({"images": x.numpy()})["logits"]))
torch.save(torch.stack([each.detach() for each in y]), "y.pt")
"""


def test_files_need_nothing_of_this_package(
    plain: dict[tuple[str, str, str], ExportReport], tmp_path: Path
) -> None:
    small = small_model("test_resnet", "all")
    paths = [plain["test_resnet", "all", suffix].path for suffix in RUNTIMES]
    x = tiny_images(small.model, 3)[..., :32, :32]
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_US, *paths], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        expected = small.model(x)
    for found in torch.load(tmp_path / "y.pt"):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_files_do_not_tell_where_they_were_made(
    plain: dict[tuple[str, str, str], ExportReport],
) -> None:
    sources = str(Path(torch.__file__).parents[1]), str(Path(__file__).parents[1]), ".py"
    for report in plain.values():
        data = report.path.read_bytes()
        assert not [text for text in sources if text.encode() in data], report.path
