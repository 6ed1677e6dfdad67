"""Structures as values, and where the units of a slice lie."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_model

from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.structure import Slice, Structure, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")


def structure_of(name: str, scope: str | None = None, **kwargs: int) -> Structure:
    with torch.device("meta"):
        return find_structure(create_model(name, **kwargs), scope)


def test_places_are_part_by_part() -> None:
    places = Slice("qkv", 0, block=2, repeat=3).places(torch.tensor([0, 2]), total=3)
    assert places.tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]
    assert places.dtype is torch.int64
    assert Slice("w", 0).places(torch.tensor([3, 5]), total=9).tolist() == [3, 5]


def test_is_a_value() -> None:
    a, b = structure_of("resnet18"), structure_of("resnet18", num_classes=3)
    assert a == b
    assert hash(a) == hash(b)
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != structure_of("resnet18", "all").fingerprint
    assert a.fingerprint != structure_of("resnet34").fingerprint
    assert Structure.from_dict(json.loads(json.dumps(a.to_dict()))) == a


def test_from_dict_refuses_another_description() -> None:
    data = structure_of("test_vit").to_dict()
    for broken in ({}, {**data, "surplus": 1}, {**data, "layers": [{"name": "x"}]}):
        with pytest.raises(ValueError, match=r"Structure\.from_dict"):
            Structure.from_dict(broken)


def test_layers_by_name() -> None:
    structure = structure_of("test_resnet")
    assert structure["layer1.0.conv1"] is structure.layers[0]
    with pytest.raises(KeyError, match=r"no layer of units named 'conv9'; there are layer1\.0\.conv1, "):
        structure["conv9"]


def test_check_knows_the_model_and_no_other() -> None:
    structure = structure_of("test_resnet")
    model = tiny_model("test_resnet")
    structure.check(model)
    with pytest.raises(
        UnsupportedModelError, match=r"layer1\.0\.conv1\.weight: expected a plain tensor, got none"
    ):
        structure.check(tiny_model("test_vit"))
    model.layer1[0].conv1 = torch.nn.Conv2d(3, 2, 1)  # type: ignore[index, union-attr]
    with pytest.raises(
        UnsupportedModelError, match="expected 32 places in dimension 0 for 32 units, got shape"
    ):
        structure.check(model)
