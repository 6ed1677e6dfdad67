"""Pruned models do what timm's own tests (its tests/test_models.py) ask of each of its models."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import Tensor, nn

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.scatter_block import ScatterBlock
from mvp_ext.model.surgery import prune_model
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread")

# test_resnet has blocks of both kinds, with and without a shortcut.
CASES = [
    ("test_resnet", "inner"),
    ("test_resnet", "all"),
    ("test_vit", "heads"),
    ("test_vit", "mlp"),
    ("test_vit", "heads+mlp"),
]


def pruned(name: str, scope: str) -> Any:
    model = tiny_model(name, **({"depth": 2} if name == "test_vit" else {}))
    mask = Mask.random(find_structure(model, scope), 0.4, seed=0, align=1)
    model = prune_model(model, mask)
    assert any(isinstance(part, ScatterBlock) for part in model.modules()) == (scope == "all")
    return model


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def model(request: pytest.FixtureRequest) -> Any:
    """In eval mode; what records it must not change it."""
    model = pruned(*request.param).eval()
    before = copy.deepcopy(model.state_dict())
    yield model
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def same(one: Any, other: Any, images: Tensor) -> None:
    torch.testing.assert_close(one(images), other(images), rtol=1e-4, atol=1e-4)


def test_forward(model: Any) -> None:
    images = tiny_images(model)
    outputs = model(images)
    assert outputs.shape == (4, 5)
    assert torch.isfinite(outputs).all()


@pytest.mark.parametrize("case", CASES)
def test_backward(case: tuple[str, str]) -> None:
    model = pruned(*case).train()
    outputs = model(tiny_images(model))
    outputs.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_default_configuration(case: tuple[str, str]) -> None:
    model, images = pruned(*case).eval(), tiny_images(pruned(*case), batch=2)
    names = model.state_dict().keys()
    assert {f"{model.default_cfg[key]}.weight" for key in ("classifier", "first_conv")} <= names
    with torch.no_grad():
        features = model.forward_features(images)
        torch.testing.assert_close(model.forward_head(features), model(images))
        assert features.shape[1 if features.ndim == 4 else 2] == model.num_features
        model.reset_classifier(0)
        assert model(images).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(images).shape == features.shape


@torch.no_grad()
def test_intermediates(model: Any) -> None:
    images = tiny_images(model)
    last, features = model.forward_intermediates(images)
    torch.testing.assert_close(last, model.forward_features(images))
    channels = [info["num_chs"] for info in model.feature_info]
    assert [feature.shape[1] for feature in features] == channels
    assert all(torch.isfinite(feature).all() for feature in features)


def test_script(model: Any, tmp_path: Path) -> None:
    """With the eager model's state dict; what is saved needs torch alone."""
    scripted = torch.jit.script(model)
    assert scripted.state_dict().keys() == model.state_dict().keys()
    same(scripted, model, tiny_images(model))
    scripted.save(tmp_path / "model")
    runs_without_mvp_ext("torch.jit.load", tmp_path, model)


def test_trace(model: Any, tmp_path: Path) -> None:
    images = tiny_images(model)
    traced = torch.jit.trace(model, images)
    same(traced, model, images + 1)
    traced.save(tmp_path / "model")
    runs_without_mvp_ext("torch.jit.load", tmp_path, model)


def test_fx(model: Any) -> None:
    """As timm traces its models, and torch does where timm's own lets it; gradients flow in what is traced."""
    features = import_timm().models._features_fx
    images = tiny_images(model)
    _, nodes = features.get_graph_node_names(model)
    traced = features.create_feature_extractor(copy.deepcopy(model), return_nodes=[nodes[-1]])
    same(lambda x: traced(x)[nodes[-1]], model, images)
    traced.train()(images)[nodes[-1]].mean().backward()
    assert all(p.grad is not None for p in traced.parameters())
    assert targets(traced).isdisjoint(ours())
    if not hasattr(model, "patch_embed"):
        graph = torch.fx.symbolic_trace(model)
        same(graph, model, images)
        assert targets(graph).isdisjoint(ours())


def test_features_by_graph(model: Any) -> None:
    timm = import_timm()
    images, indices = tiny_images(model), tuple(range(len(model.feature_info)))
    extracted = timm.models.FeatureGraphNet(copy.deepcopy(model), out_indices=indices)(images)
    channels = [info["num_chs"] for info in model.feature_info]
    assert [feature.shape[1 if feature.ndim == 4 else 2] for feature in extracted] == channels
    if extracted[-1].ndim == 4:
        expected = model.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(extracted, expected, rtol=1e-4, atol=1e-4)


def test_export(model: Any, tmp_path: Path) -> None:
    """Any batch size, into torch's core operators; what is saved needs torch alone."""
    images = tiny_images(model)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert targets(program.graph_module).isdisjoint(ours())
    core = program.run_decompositions()
    assert targets(core.graph_module).isdisjoint(ours())
    for module in (program.module(), core.module()):
        same(module, model, images)
        same(module, model, images[:2])
    torch.export.save(program, tmp_path / "model")
    runs_without_mvp_ext("(lambda path: torch.export.load(path).module())", tmp_path, model)


def test_strict_export() -> None:
    """The other way in which torch.export records."""
    model = pruned("test_resnet", "all").eval()
    program = torch.export.export(model, (tiny_images(model),), strict=True)
    assert targets(program.graph_module).isdisjoint(ours())
    same(program.module(), model, tiny_images(model))


def test_other_ways_of_running_keep_the_fused_op() -> None:
    """torch.compile runs here, so it may use this package's op."""
    model = pruned("test_resnet", "all").eval()
    seen: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(targets(graph))
        return graph

    with torch.no_grad():
        same(torch.compile(model, backend=backend, fullgraph=True), model, tiny_images(model))
    assert seen[0] & ours()


def targets(graph: torch.fx.GraphModule) -> set[str]:
    """Of the calls of a graph and of its parts."""
    parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    return {str(node.target) for part in parts for node in part.graph.nodes}


def ours() -> set[str]:
    """The names that this package's ops have as targets."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mvp_ext::")}
    assert names
    plain = {name.replace("::", ".") for name in names}
    return plain | {f"{name}.default" for name in plain}


def runs_without_mvp_ext(load: str, folder: Path, model: nn.Module) -> None:
    """``folder/model``, opened by ``load`` in a process that has no mvp_ext, computes what the model does.

    Asked of the one kind of model that has a part of this package; a process takes seconds.
    """
    if not any(isinstance(part, ScatterBlock) for part in model.modules()):
        return
    images = tiny_images(model)
    with torch.no_grad():
        torch.save((images, model(images)), folder / "expected.pt")
    code = f"""
import sys
sys.modules["mvp_ext"] = None
import torch
torch.set_num_threads(1)
images, expected = torch.load("expected.pt")
torch.testing.assert_close({load}("model")(images), expected, rtol=1e-4, atol=1e-4)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
