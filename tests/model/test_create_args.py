"""What a file says of its model never reaches timm unless it is a named value of a known kind and range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from mvp_ext import storage
from mvp_ext.model import checkpoint
from mvp_ext.model.create_args import check_args
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.storage import FileFormatError
from mvp_ext.timm_compat import import_timm
from mvp_ext.train import backbone as backbones
from mvp_ext.train.backbone import Backbone, load_backbone

HOSTILE = [
    {"checkpoint_path": "evil.pth"},
    {"pretrained": True},
    {"pretrained_cfg": {"file": "evil"}},
    {"pretrained_cfg_overlay": {"url": "http://example.org"}},
    {"cache_dir": "/"},
    {"scriptable": True},
    {"features_only": True},
    {"block": "os.system"},
    {"layers": [2000, 2000, 2000, 2000]},
    {"layers": 10**9},
    {"depth": 10**6},
    {"depth": True},
    {"num_classes": 10**12},
    {"num_classes": "5"},
    {"embed_dim": 2**40},
    {"img_size": [64, 64, 64]},
    {"global_pool": "a;b"},
    {"drop_rate": float("nan")},
    {"init_values": None},
    {"name": "hf-hub:someone/model"},
    {"name": "local-dir:folder"},
    {"name": 5},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned model's file and a backbone's."""
    folder, model = tmp_path_factory.mktemp("files"), tiny_model("test_resnet")
    Backbone.wrap(model).save(folder / "b.safetensors")
    structure = find_structure(model)
    mask = Mask.random(structure, 0.5, seed=0)
    small = prune_model(model, mask)
    checkpoint.save_pruned(small, folder / "m.safetensors", mask=mask, structure=structure)
    return folder


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_what_a_file_may_not_say(
    change: dict[str, Any], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"name": "test_resnet", "num_classes": 5, "in_chans": 3}
    assert check_args(good) == good
    with pytest.raises(ValueError, match=r"argument '\w+' of a model"):
        check_args({**good, **change})
    if any(value != value for value in change.values()):
        # JSON has no NaN.
        return

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a hostile file reached timm")

    # The same through files.
    monkeypatch.setattr(import_timm(), "create_model", never)
    for name, kind, version, load in (
        ("m.safetensors", checkpoint._FORMAT, checkpoint._VERSION, checkpoint.load_pruned),
        ("b.safetensors", backbones._KIND, backbones._VERSION, load_backbone),
    ):
        tensors, spec = storage.read(files / name, kind=kind, version=version)
        spec["recipe"] = {**spec["recipe"], **change}
        storage.write_atomic(tmp_path / name, storage.to_bytes(tensors, spec, kind=kind, version=version))
        with pytest.raises(FileFormatError, match="argument"):
            load(tmp_path / name)


def test_a_description_without_a_name_is_refused() -> None:
    for arguments in ({}, [], None, "resnet18"):
        with pytest.raises(ValueError, match="expected the arguments of a model with its name"):
            check_args(arguments)
