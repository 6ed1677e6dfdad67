"""Scope `stream`: channels go from all that write and read a residual stream, exactly, or the model is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import nn

from mvp_ext.model.checkpoint import load_pruned, save_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.model.surgery import masked_model, prune_model
from mvp_ext.pruning.scores import CRITERIA, score_units

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"layers": (2, 1, 1, 2), "channels": (8, 16, 16, 24)}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("test_resnet", {}),
    ("resnet18", SMALL),
    ("resnet50", SMALL),
    ("resnet18d", SMALL),
    ("seresnet18", SMALL),
    ("resnet18", {**SMALL, "replace_stem_pool": True}),
    ("resnet18", {**SMALL, "global_pool": "catavgmax"}),
]


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_equals_the_masked_dense_model(name: str, kwargs: dict[str, Any]) -> None:
    """In eval and in train mode, cut once and cut again."""
    for seed in range(2):
        model = tiny_model(name, **kwargs).double()
        x = tiny_images(model, batch=3, seed=seed).double()
        for keep in (0.6, 0.5):
            mask = Mask.random(find_structure(model, "stream"), keep, seed, align=1)
            masked = masked_model(model, mask)
            prune_model(model, mask)
            for training in (False, True):
                with torch.no_grad():
                    expected, got = (copy.deepcopy(m).train(training)(x) for m in (masked, model))
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        model.reset_classifier(3)
        assert model.float()(x.float()).shape == (3, 3)


def test_saved_and_loaded_it_is_the_same(tmp_path: Any) -> None:
    model = tiny_model("resnet18", **SMALL).eval()
    structure = find_structure(model, "stream")
    mask = Mask.random(structure, 0.5, 0, align=1)
    prune_model(model, mask, structure=structure)
    save_pruned(model, tmp_path / "m.safetensors", mask=mask, structure=structure)
    x = tiny_images(model)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path / "m.safetensors").model.eval()(x), model(x))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_score(criterion: str) -> None:
    model = tiny_model("test_resnet")
    structure = find_structure(model, "stream")
    batches = [(tiny_images(model), torch.arange(4))]
    scores = score_units(model, structure, criterion, batches, image_shape=(3, 64, 64))
    assert all(len(scores[layer.name].unique()) > layer.units // 3 for layer in structure)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet50_gn", {"channels": (32, 32, 32, 32)}, r"bn1: .* got GroupNorm"),
        ("ecaresnet26t", {}, r"layer1\.0\.se: .* got EcaModule"),
        ("resnetblur18", {}, r"maxpool\.1: .* got BlurPool2d"),
        ("resnet18", {"num_classes": 0}, r"fc: expected a layer that reads the stream"),
    ],
)
def test_refuses_by_the_name_of_the_part(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_structure(tiny_model(name, **{**SMALL, **kwargs}), "stream")


def test_refuses_what_was_cut_in_scope_all() -> None:
    model: nn.Module = tiny_model("test_resnet")
    prune_model(model, Mask.random(find_structure(model, "all"), 0.5, 0))
    with pytest.raises(UnsupportedModelError, match=r"layer1\.0: .* cut in scope `all`"):
        find_structure(model, "stream")
