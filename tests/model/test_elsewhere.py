"""Models of others: what is cut of them is cut exactly, and their files say no more than they may."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from others import HUGGINGFACE, OWN, TORCHVISION, huggingface, own
from torch import nn

from mvp_ext import storage
from mvp_ext.model import checkpoint
from mvp_ext.model.create import create_empty, create_model
from mvp_ext.model.create_args import check_args, create_args
from mvp_ext.model.elsewhere import adapter as adapters
from mvp_ext.model.elsewhere.adapter import Adapter, register_backbone
from mvp_ext.model.elsewhere.create import wrap
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.model.surgery import masked_model, prune_model
from mvp_ext.storage import FileFormatError

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_cut_exactly(model: nn.Module, scope: str) -> None:
    """Several random masks, in eval and train mode; a mask changes the outputs (a test that cannot fail is none)."""
    structure = find_structure(model, scope)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        dense = copy.deepcopy(model).double()(images)
        for seed in range(2):
            mask = Mask.random(structure, 0.3 + 0.3 * seed, seed, align=1)
            masked = masked_model(model, mask, structure=structure).double()
            cut = prune_model(copy.deepcopy(model), mask, structure=structure).double()
            for training in (False, True):
                results = []
                for each in (masked, cut):
                    torch.manual_seed(0)
                    results.append(copy.deepcopy(each).train(training)(images))
                expected, got = results
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
            assert (masked(images) - dense).abs().max() > 1e-4 * dense.abs().max()


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_hugging_faces_models_are_cut_exactly(name: str) -> None:
    model = wrap(huggingface(name))
    for scope in HUGGINGFACE[name][2]:
        assert_cut_exactly(model, scope)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_models_are_cut_exactly(name: str) -> None:
    make, scopes = TORCHVISION[name]
    model = wrap(make())
    for scope in scopes:
        assert_cut_exactly(model, scope)


def test_a_module_of_ones_own_is_cut_exactly() -> None:
    assert_cut_exactly(wrap(own(), OWN), "mlp")


@pytest.mark.parametrize(("make", "output"), [("vit_classifier", "logits"), ("resnet_classifier", "logits")])
def test_outputs_are_those_of_the_module(make: str, output: str) -> None:
    module = huggingface(make)
    images = torch.randn(2, 3, 32, 32)
    before = {name: type(part) for name, part in module.named_modules()}
    model = wrap(module)
    with torch.no_grad():
        assert torch.equal(model(images), getattr(module(images), output))
    assert before == {name: type(part) for name, part in module.named_modules()}
    # The same tensors.
    shared = {p.data_ptr() for p in module.parameters()}
    assert all(p.data_ptr() in shared for p in model.parameters())


def test_a_vits_features_are_its_class_token() -> None:
    module: Any = huggingface("vit")
    images = torch.randn(2, 3, 32, 32)
    model = wrap(module)
    with torch.no_grad():
        assert torch.equal(model(images), module(images).last_hidden_state[:, 0])
    assert model.model.pooler is None
    assert module.pooler is not None


def test_attention_of_an_unknown_implementation_stays_whole() -> None:
    model = wrap(huggingface("vit"))
    for part in model.model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation_internal = "mine"
    with pytest.raises(
        UnsupportedModelError, match=r"expected attn_implementation .*, got 'mine'.*use scope"
    ):
        find_structure(model, "heads")


# ---- built again


@pytest.mark.parametrize("name", [n for n in HUGGINGFACE if n.endswith("classifier")] + ["clip", "swin"])
def test_hugging_faces_models_are_built_again_of_a_few_values(name: str) -> None:
    model = wrap(huggingface(name))
    arguments = create_args(model, find_structure(model))
    assert check_args(arguments) == arguments
    built = create_empty(arguments)
    checkpoint.check_fidelity("test", model, built, arguments)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvisions_models_are_recognised(name: str) -> None:
    model = wrap(TORCHVISION[name][0]())
    assert create_args(model, find_structure(model)) == {
        "name": f"torchvision:{name}",
        "num_classes": 5,
        "in_chans": 3,
    }


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "swin_t", "convnext_tiny"])
def test_torchvisions_larger_models_are_known(name: str) -> None:
    empty = create_empty({"name": f"torchvision:{name}", "num_classes": 7, "in_chans": 3})
    assert empty.num_classes == 7
    assert empty.head.weight.is_meta
    assert Preprocessing.of(empty).size == 224


def test_torchvisions_model_of_another_shape_says_that_it_cannot_be_saved() -> None:
    model = wrap(TORCHVISION["swin"][0]())
    with pytest.raises(ValueError, match=r"SwinTransformer: nothing says how it is built again"):
        create_args(model, find_structure(model))


def test_a_module_of_ones_own_is_built_again_where_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    model = wrap(own(), OWN)
    with pytest.raises(ValueError, match=r"'own:ownnet': expected an adapter of this name"):
        create_args(model, find_structure(model))
    register_backbone(OWN)
    arguments = create_args(model, find_structure(model))
    assert arguments == {"name": "own:ownnet", "num_classes": 5, "in_chans": 3}
    checkpoint.check_fidelity("test", model, create_empty(arguments), arguments)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "stem"}, r"OwnNet: head 'stem': expected a plain Linear there, got Conv2d"),
        ({"head": "nothing"}, r"head 'nothing': expected a plain Linear there, got Identity"),
        (
            {"features": lambda module, x: module.tokens(x)},
            r"features: expected \[1, D\] of one image, got \[1, 64",
        ),
        ({"features": lambda module, x: module.missing(x)}, r"no features of images of 32 pixels: .*missing"),
        (
            {"head": "out", "features": lambda module, x: x.mean((2, 3))},
            r"out: expected a classifier of the 3",
        ),
    ],
)
def test_adapters_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(own(), Adapter(Preprocessing(32), **options))


def test_adapters_without_what_they_need() -> None:
    with pytest.raises(ValueError, match=r"Adapter: name: expected .* got '\.\./x'"):
        Adapter(Preprocessing(32), name="../x", build=own)
    with pytest.raises(ValueError, match=r"Adapter: mine: expected build"):
        Adapter(Preprocessing(32), name="mine")
    with pytest.raises(ValueError, match=r"register_backbone: expected an adapter with a name"):
        register_backbone(Adapter(Preprocessing(32)))
    with pytest.raises(
        TypeError, match=r"expected a timm model .*, or an adapter beside the model, got OwnNet"
    ):
        wrap(own())


def test_models_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"torchvision has no classification model named 'resnet19'"):
        create_model("torchvision:resnet19")
    with pytest.raises(ValueError, match=r"'hf:somewhere' is a folder with weights: load_backbone reads it"):
        create_model("hf:somewhere")
    with pytest.raises(ValueError, match=r"torchvision:resnet18: in_chans: expected 3, got 1"):
        create_model("torchvision:resnet18", in_chans=1)


def test_classes_of_transformers_that_are_not_known_are_refused() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    config = transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    with pytest.raises(
        ValueError, match=r"expected a class of transformers that is known here .*, got BeitModel"
    ):
        wrap(transformers.BeitModel(config))


HOSTILE = [
    {"name": "transformers:AutoModel"},
    {"name": "transformers:ViTModel.from_pretrained"},
    {"name": "transformers:"},
    {"name": "torchvision:"},
    {"name": "torchvision:../x"},
    {"name": "hf:folder"},
    {"name": "own:"},
    {"pretrained": True},
    {"weights": "DEFAULT"},
    {"num_classes": 10**12},
    {"config": "ViTConfig"},
    {"config": {"auto_map": {"AutoModel": "evil.Model"}}},
    {"config": {"_name_or_path": "someone/model"}},
    {"config": {"_attn_implementation": "someone/kernels"}},
    {"config": {"quantization_config": {}}},
    {"config": {"dtype": "float16"}},
    {"config": {"hidden_size": 2**40}},
    {"config": {"num_hidden_layers": True}},
    {"config": {"num_hidden_layers": 10**6}},
    {"config": {"hidden_act": "xielu"}},
    {"config": {"hidden_act": ["gelu"]}},
    {"config": {"depths": [2] * 100}},
    {"config": {"layer_type": "__import__"}},
    {"config": {"layer_norm_eps": "1e-6"}},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model of transformers."""
    path = tmp_path_factory.mktemp("files") / "m.safetensors"
    model = wrap(huggingface("vit"))
    structure = find_structure(model)
    mask = Mask.random(structure, 0.5, seed=0)
    checkpoint.save_pruned(prune_model(model, mask), path, mask=mask, structure=structure)
    return path


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_what_a_file_may_not_say(
    change: dict[str, Any], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a hostile file reached what builds models")

    for builder in ("build_transformers", "build_torchvision", "registered"):
        monkeypatch.setattr(f"mvp_ext.model.elsewhere.create.{builder}", never)
    kind, version = checkpoint._FORMAT, checkpoint._VERSION
    tensors, spec = storage.read(file, kind=kind, version=version)
    recipe = spec["recipe"]
    assert check_args(recipe) == recipe
    config = {**recipe["config"], **change["config"]} if isinstance(change.get("config"), dict) else None
    spec["recipe"] = {**recipe, **change, **({"config": config} if config else {})}
    storage.write_atomic(
        tmp_path / "m.safetensors", storage.to_bytes(tensors, spec, kind=kind, version=version)
    )
    with pytest.raises(FileFormatError, match="argument"):
        checkpoint.load_pruned(tmp_path / "m.safetensors")


def test_a_file_of_an_adapter_that_this_process_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    register_backbone(OWN)
    model = wrap(own(), OWN)
    structure = find_structure(model)
    mask = Mask.random(structure, 0.5, seed=0)
    checkpoint.save_pruned(prune_model(model, mask), tmp_path / "m", mask=mask, structure=structure)
    assert checkpoint.load_pruned(tmp_path / "m").mask == mask
    monkeypatch.setattr(adapters, "_REGISTERED", {})
    with pytest.raises(FileFormatError, match=r"own:ownnet.*register_backbone\(adapter\) first"):
        checkpoint.load_pruned(tmp_path / "m")
