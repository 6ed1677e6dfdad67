"""Backbones: what is saved comes back, other people's weights fit or are refused, input sizes are right."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from digits import digits_task, equal_weights, tiny_backbone, train_batch
from tiny import tiny_model
from torch import nn

from mvp_ext.model.create import create_model
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.storage import FileFormatError
from mvp_ext.train.backbone import (
    Backbone,
    autocast,
    extract_features,
    forward_features,
    load_backbone,
    set_head,
)
from mvp_ext.train.heads import LinearHead

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = pytest.mark.parametrize("name", ["test_resnet", "test_vit"])


def outputs(backbone: Backbone):
    size = backbone.preprocessing.size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return backbone.model.eval()(images)


def weights_file(model: nn.Module, path):
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


# ---- save and load


@NAMES
def test_saved_backbones_come_back(tmp_path, name):
    """Weights, preprocessing, class names, and the arguments the model was made with (test_vit has 4 heads, not 2)."""
    backbone = tiny_backbone(name)
    backbone.classes = ("a", "b", "c", "d", "é")
    backbone.save(tmp_path / "b.safetensors")
    loaded = load_backbone(tmp_path / "b.safetensors")
    assert loaded.preprocessing == backbone.preprocessing
    assert loaded.classes == backbone.classes
    assert loaded.architecture == name
    assert not loaded.model.training
    assert torch.equal(outputs(loaded), outputs(backbone))


def test_a_saved_vit_at_another_size(tmp_path):
    backbone = tiny_backbone("test_vit")
    backbone.save(tmp_path / "b.safetensors")
    loaded = load_backbone(tmp_path / "b.safetensors", image_size=64)
    assert loaded.preprocessing.size == 64
    assert outputs(loaded).shape == (2, 5)
    loaded.save(tmp_path / "larger.safetensors")
    assert torch.equal(outputs(load_backbone(tmp_path / "larger.safetensors")), outputs(loaded))


def test_damaged_missing_and_foreign_files(tmp_path):
    path = tmp_path / "b.safetensors"
    with pytest.raises(FileNotFoundError):
        load_backbone(path)
    tiny_backbone().save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="damaged"):
        load_backbone(path)
    weights_file(tiny_model("test_resnet"), path)
    with pytest.raises(FileFormatError, match="not a file of mvp_ext"):
        load_backbone(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.safetensors"
    tiny_backbone().save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mvp_ext.storage.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tiny_backbone("test_vit").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ---- by name, with plain weights


def test_by_name():
    backbone = load_backbone("test_resnet", num_classes=7, image_size=48, mean=(0.1, 0.2, 0.3))
    assert outputs(backbone).shape == (2, 7)
    declared = Preprocessing.of(backbone.model)
    assert backbone.preprocessing == Preprocessing(48, (0.1, 0.2, 0.3), declared.std)
    with pytest.raises(ValueError, match=r"no model named 'test_resnot'; close names: .*test_resnet"):
        load_backbone("test_resnot")
    with pytest.raises(ValueError, match="image_size: expected at least 1, got 0"):
        load_backbone("test_resnet", image_size=0)


def test_a_head_has_the_features_that_are_left():
    """timm makes a new one by a number that it keeps of the dense model."""
    model = tiny_backbone("test_resnet").model
    model.fc = nn.Linear(40, 5)
    head = LinearHead(torch.ones(2, 40), torch.ones(2))
    set_head(model, head)
    assert torch.equal(model.fc.weight, head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_weights_of_any_float_type(tmp_path, dtype):
    model = tiny_model("test_resnet", num_classes=6)
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    safetensors.torch.save_file(rounded, tmp_path / "w.safetensors")
    backbone = load_backbone("test_resnet", weights=tmp_path / "w.safetensors", image_size=32)
    state = backbone.model.state_dict()
    assert all(torch.equal(state[k], v.float() if v.is_floating_point() else v) for k, v in rounded.items())
    assert outputs(backbone).shape == (2, 6)  # the classifier says how many classes


def test_plain_weights_of_a_vit_then_resized(tmp_path):
    model = create_model("test_vit", num_classes=3)
    path = weights_file(model, tmp_path / "w.safetensors")
    backbone = load_backbone("test_vit", weights=path, image_size=32)
    assert backbone.preprocessing.size == 32
    assert backbone.model.patch_embed.grid_size == (2, 2)
    assert outputs(backbone).shape == (2, 3)


def test_wrong_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match=r"weights: .*w\.safetensors: no such file"):
        load_backbone("test_resnet", weights=path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(FileFormatError, match=r"weights: .*damaged, or not a safetensors file"):
        load_backbone("test_resnet", weights=path)
    weights_file(tiny_model("test_vit"), path)
    with pytest.raises(ValueError, match=r"expected a state dict of test_resnet; .*conv1"):
        load_backbone("test_resnet", weights=path)
    state = tiny_model("test_resnet").state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(3, 3)
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match=r"size mismatch for layer1\.0\.conv1\.weight"):
        load_backbone("test_resnet", weights=path)


# ---- sizes and preprocessing


def test_a_vits_size_is_a_multiple_of_its_patch():
    with pytest.raises(
        ValueError, match="image_size: expected a multiple of the model's patch of 16, got 40"
    ):
        load_backbone("test_vit", image_size=40)
    assert load_backbone("test_vit", image_size=48).model.patch_embed.grid_size == (3, 3)


def test_preprocessing_is_what_timm_declares():
    resnet, vit = create_model("test_resnet"), tiny_model("test_vit", img_size=48)
    config = resnet.pretrained_cfg
    assert Preprocessing.of(resnet) == Preprocessing(
        config["input_size"][-1], tuple(config["mean"]), tuple(config["std"])
    )
    assert Preprocessing.of(vit).size == 48  # as built, not as declared


def test_wrap():
    model = tiny_model("test_resnet")
    backbone = Backbone.wrap(model)
    assert backbone.model is model
    assert Backbone.wrap(backbone) is backbone
    with pytest.raises(TypeError, match=r"expected a timm model .*, got Linear"):
        Backbone.wrap(nn.Linear(2, 2))
    json.dumps(backbone.describe())


# ---- features and heads


@NAMES
def test_features_are_what_the_classifier_sees(name):
    backbone = tiny_backbone(name)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = forward_features(backbone.model, images)
        torch.testing.assert_close(backbone.model.get_classifier()(features), backbone.model(images))
    assert features.shape == (2, backbone.model.num_features)


@NAMES
def test_set_head(name):
    backbone = tiny_backbone(name)
    head = LinearHead(torch.randn(3, backbone.model.num_features), torch.randn(3))
    set_head(backbone.model, head)
    data = digits_task().split()
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    assert backbone.model.num_classes == 3
    with torch.no_grad():
        torch.testing.assert_close(backbone.model.get_classifier()(features), head(features))
    with pytest.raises(ValueError, match=r"set_head: \w+: expected one linear classifier of 2 features"):
        set_head(backbone.model, LinearHead(torch.randn(3, 2), torch.randn(3)))


def test_no_images_no_features():
    backbone = tiny_backbone()
    none = torch.empty(0, 8, 8, 3, dtype=torch.uint8)
    assert len(extract_features(backbone.model, none, backbone.preprocessing)) == 0


@NAMES
def test_features_do_not_depend_on_mode_or_chunk(name, monkeypatch):
    backbone, data = tiny_backbone(name), digits_task().split()
    model = backbone.copy_model().train()
    whole = extract_features(model, data.train_images, backbone.preprocessing, "float32")
    assert model.training
    assert equal_weights(model, backbone.model)
    monkeypatch.setattr("mvp_ext.train.backbone.FEATURE_BATCH", 5)
    chunks = extract_features(model, data.train_images, backbone.preprocessing, "float32")
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        direct = forward_features(model.eval(), train_batch(data, backbone))
    torch.testing.assert_close(whole, direct, rtol=1e-4, atol=1e-4)


def test_autocast():
    with autocast("cpu", "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("cpu", "bfloat16"):
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="precision: expected auto, bfloat16 or float32, got 'fp8'"):
        autocast("cpu", "fp8")
