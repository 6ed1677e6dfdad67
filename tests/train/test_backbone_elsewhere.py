"""Backbones of others go all the way: wrapped, saved, pruned for a task, loaded, asked, exported; folders; commands."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import run
from digits import digits_task, few_digits
from others import HUGGINGFACE, OWN, TORCHVISION, huggingface, own

from mvp_ext.deploy.export import export
from mvp_ext.deploy.exported import load_exported
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.elsewhere import adapter as adapters
from mvp_ext.model.elsewhere.adapter import register_backbone
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.pruning.prune import prune
from mvp_ext.train.backbone import Backbone, load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    register_backbone(OWN)


def backbone_of(name: str) -> Backbone:
    """Of any model of ``others``, for images of 32 pixels."""
    if name == "own":
        return Backbone.wrap(own(), adapter=OWN)
    if name in HUGGINGFACE:
        return Backbone.wrap(huggingface(name))
    backbone = Backbone.wrap(TORCHVISION[name][0]())
    seen = replace(backbone.preprocessing, size=32)
    seen.declare(backbone.model)
    return Backbone(backbone.model, seen)


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IMAGES)


@pytest.mark.parametrize("name", [*HUGGINGFACE, "mobilenet_v3_small", "own"])
def test_all_the_way(name: str, tmp_path: Path) -> None:
    backbone = backbone_of(name)
    backbone.check()
    backbone.save(tmp_path / "b.safetensors")
    loaded = load_backbone(tmp_path / "b.safetensors")
    assert loaded.preprocessing == backbone.preprocessing
    assert torch.equal(outputs(loaded.model), outputs(backbone.model))
    result = prune(backbone, digits_task(), method="random", steps=1)
    result.save(tmp_path / "small.safetensors")
    small = load_pruned(tmp_path / "small.safetensors")
    assert torch.equal(outputs(small.model), outputs(result.model))
    assert sum(p.numel() for p in small.model.parameters()) < sum(
        p.numel() for p in backbone.model.parameters()
    )
    predicted = small.predict(few_digits().test_images[:3])
    assert len(predicted.probabilities) == 3


def test_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra deploy is not installed")
    prune(backbone_of("siglip"), digits_task(), method="random", steps=0).save(tmp_path / "small.safetensors")
    small = load_pruned(tmp_path / "small.safetensors")
    export(small, tmp_path / "small.onnx")
    images = few_digits().test_images[:3]
    expected, got = (m.predict(images).probabilities for m in (small, load_exported(tmp_path / "small.onnx")))
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=1e-3, atol=1e-4)


# ---- folders of transformers' format


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a classifier, as its own library saves it."""
    module: Any = huggingface("vit_classifier")
    module.config.id2label = dict(enumerate(("ant", "bee", "cat", "dog", "eel")))
    module.save_pretrained(tmp_path / "folder")
    seen = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 32, "width": 32}}
    (tmp_path / "folder" / "preprocessor_config.json").write_text(json.dumps(seen))
    return tmp_path / "folder"


def test_a_folder(folder: Path) -> None:
    backbone = load_backbone(f"hf:{folder}")
    assert backbone.classes == ("ant", "bee", "cat", "dog", "eel")
    assert backbone.preprocessing == Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.no_grad():
        expected = huggingface("vit_classifier")(IMAGES).logits
    assert torch.equal(outputs(backbone.model), expected)
    assert load_backbone(f"hf:{folder}", num_classes=3).model.num_classes == 3


@pytest.mark.parametrize("name", [n for n in HUGGINGFACE if not n.endswith("classifier")])
def test_folders_of_encoders(name: str, tmp_path: Path) -> None:
    module: Any = huggingface(name)
    module.save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}", image_size=32)
    assert torch.equal(outputs(backbone.model), outputs(Backbone.wrap(module).model))


def test_the_image_encoder_of_a_folder_with_texts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    texts = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    module = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=texts, vision_config=HUGGINGFACE["clip"][1])
    ).eval()
    module.save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    with torch.no_grad():
        expected = module.vision_model(IMAGES).pooler_output
    assert torch.equal(outputs(backbone.model), expected)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_nothing_of_a_folder_runs(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    change(folder, auto_map={"AutoModelForImageClassification": "evil.Model"}, _attn_implementation="x/y")
    change(
        folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}, dtype="float16"
    )
    backbone = load_backbone(f"hf:{folder}")
    assert next(backbone.model.parameters()).dtype is torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architectures": ["BertModel"], "model_type": "bert"},
            r"expected a model of kind vit, .*got 'bert'",
        ),
        ({"hidden_size": 2**40}, r"config\.json: hidden_size: 1099511627776 is not a value"),
        ({"num_hidden_layers": 3}, r"its weights are not whole: .*layers\.2"),
        ({"hidden_size": 64}, r"folder: not a ViTForImageClassification: |its weights are not whole"),
        ({"id2label": {"a": "ant"}}, r"config\.json: id2label: expected a name for each of 0, 1"),
    ],
)
def test_folders_that_are_refused(values: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **values)
    with pytest.raises(ValueError, match=message):
        load_backbone(f"hf:{folder}")


def test_folders_without_what_is_needed(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_backbone(f"hf:{folder}/nothing")
    with pytest.raises(ValueError, match="a folder has its own weights"):
        load_backbone(f"hf:{folder}", pretrained=True)
    with pytest.raises(ValueError, match="expected 32, for which alone the model was built, got 64"):
        load_backbone(f"hf:{folder}", image_size=64)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="got an adapter of some: merge them first"):
        load_backbone(f"hf:{folder}")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected its weights as model\.safetensors"):
        load_backbone(f"hf:{folder}")


def test_without_transformers_the_remedy_is_named(folder: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import mvp_ext\n"
        f"try: mvp_ext.load_backbone('hf:{folder}')\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'mvp_ext[hf]'" in done.stdout


# ---- torchvision


def test_weights_of_torchvisions_model(tmp_path: Path) -> None:
    module = TORCHVISION["mobilenet_v3_small"][0]()
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(module.state_dict(), path)
    name = "torchvision:mobilenet_v3_small"
    backbone = load_backbone(name, weights=path, image_size=32)
    assert backbone.architecture == name
    with torch.no_grad():
        assert torch.equal(outputs(backbone.model), module(IMAGES))
    with pytest.raises(ValueError, match=r"expected a state dict of torchvision:resnet18"):
        load_backbone("torchvision:resnet18", weights=path)


# ---- commands


def test_commands_take_folders_and_torchvisions_names(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(TORCHVISION["mobilenet_v3_small"][0]().state_dict(), weights)
    rest = "--data digits --classes 1,2,3 --method random --steps 0 --force"
    for model in (
        f"hf:{folder}",
        f"torchvision:mobilenet_v3_small --weights {weights} --image-size 32",
    ):
        run(f"prune --model {model} {rest} --out {tmp_path}/small.safetensors")
        assert load_pruned(tmp_path / "small.safetensors").class_names == ("1", "2", "3")
    said = run(
        f"prune --model torchvision:mobilenet_v3_small {rest} --out {tmp_path}/small.safetensors", code=2
    )
    assert "which weights?" in said.output
    said = run(f"prune --model hf:{folder} --weights {weights} {rest} --out {tmp_path}/s.safetensors", code=2)
    assert "is a folder with its own weights" in said.output
