"""Models by name."""

from __future__ import annotations

import sys

import pytest

from mvp_ext.model.create import create_model
from mvp_ext.model.structure import UnsupportedModelError


def test_create_model_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ValueError, match=r"has no model named 'resnet8'; close names: .*resnet18"):
        create_model("resnet8")
    with pytest.raises(UnsupportedModelError, match="ScaledStdConv2d"):
        create_model("nf_resnet26")
    assert create_model("test_resnet", img_size=32, num_classes=3).num_classes == 3
    assert create_model("test_vit", img_size=32).patch_embed.img_size == (32, 32)
