"""Files of pruned models: what is loaded is what was saved, and what is damaged is named, never loaded."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import tiny_images, tiny_model
from torch import nn

from mvp_ext import storage
from mvp_ext.model import checkpoint
from mvp_ext.model.checkpoint import load_pruned, read_pruned, save_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.storage import FileFormatError

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(
    name: str = "test_resnet", scope: str = "inner", **kwargs: Any
) -> tuple[nn.Module, Mask, Structure]:
    model = tiny_model(name, **kwargs)
    structure = find_structure(model, scope)
    mask = Mask.random(structure, 0.5, seed=0)
    return prune_model(model, mask).eval(), mask, structure


@pytest.mark.parametrize(
    ("name", "scope", "kwargs"),
    [
        ("test_resnet", "inner", {"num_classes": 7, "in_chans": 1}),
        ("test_resnet", "all", {"drop_path_rate": 0.1}),
        ("test_vit", "heads", {"img_size": 32, "num_classes": 0}),
        ("test_vit", "heads+mlp", {"global_pool": "avg", "depth": 2, "init_values": 0.1}),
        ("deit_tiny_distilled_patch16_224", "heads", {"depth": 1, "num_heads": 3, "img_size": 32}),
    ],
)
def test_round_trip(name: str, scope: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model, mask, structure = pruned(name, scope, **kwargs)
    extra = {"accuracy": 0.75, "classes": ["a", "ü"], "class_means": torch.randn(3, 4)}
    save_pruned(model, tmp_path / "m.safetensors", mask=mask, structure=structure, extra=extra)
    loaded = load_pruned(tmp_path / "m.safetensors")
    assert loaded.mask == mask
    assert loaded.structure == structure
    assert torch.equal(loaded.extra.pop("class_means"), extra.pop("class_means"))
    assert loaded.extra == extra
    assert not loaded.model.training
    x = tiny_images(model, batch=2)[:, : kwargs.get("in_chans", 3)]
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
    wanted = model.state_dict()
    state = loaded.model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], value) for key, value in wanted.items())


def test_loaded_model_can_be_trained_pruned_and_saved_again(tmp_path: Path) -> None:
    model, outer, structure = pruned("test_resnet", "all")
    model.reset_classifier(3)  # type: ignore[operator]
    save_pruned(model, tmp_path / "a", mask=outer, structure=structure)
    loaded = load_pruned(tmp_path / "a").model.train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.01, momentum=0.9)
    loaded(tiny_images(loaded)).square().sum().backward()
    optimizer.step()
    inner = Mask.random(find_structure(loaded, "all"), 0.5, seed=1, align=1)
    prune_model(loaded, inner, optimizer=optimizer)
    save_pruned(loaded, tmp_path / "a", mask=Mask.compose(outer, inner), structure=structure)
    x = tiny_images(loaded)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path / "a").model(x), loaded.eval()(x))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_keeps_dtype_and_costs_no_dense_weights(tmp_path: Path) -> None:
    model, mask, structure = pruned()
    save_pruned(model.bfloat16(), tmp_path / "m", mask=mask, structure=structure)
    loaded = load_pruned(tmp_path / "m").model
    assert loaded.fc.weight.dtype is torch.bfloat16  # type: ignore[union-attr]
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert (tmp_path / "m").stat().st_size < stored + 20_000


def test_read_pruned_builds_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask, structure = pruned()
    save_pruned(model, tmp_path / "m", mask=mask, structure=structure)
    monkeypatch.delattr(checkpoint, "create_empty")
    stored = read_pruned(tmp_path / "m")
    assert stored.mask == mask
    assert stored.create_args["name"] == "test_resnet"
    assert stored.versions.keys() == {"mvp_ext", "torch", "timm"}
    assert torch.equal(stored.state["fc.weight"], model.fc.weight)  # type: ignore[union-attr, arg-type]


# ---- what cannot be loaded is not written


def refuse(
    tmp_path: Path, message: str, model: nn.Module, mask: Mask, structure: Structure, **kwargs: Any
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        save_pruned(model, tmp_path / "m", mask=mask, structure=structure, **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_refuses_models_that_could_not_be_loaded(tmp_path: Path) -> None:
    model, mask, structure = pruned()
    other = Mask.random(structure, 0.25, seed=0)
    refuse(
        tmp_path,
        r"layer1\.0\.conv1\.weight: the mask leaves shape \(8, .* has \(16,",
        model,
        other,
        structure,
    )
    refuse(tmp_path, "is not JSON serializable", model, mask, structure, extra={"x": object()})
    refuse(tmp_path, "not JSON compliant", model, mask, structure, extra={"x": float("nan")})
    model.extra_head = nn.Linear(2, 2)
    refuse(tmp_path, r"'extra_head\.bias' is not in timm's model 'test_resnet'", model, mask, structure)
    nameless = Structure("resnet", structure.scope, None, structure.layers)
    refuse(tmp_path, "does not say which timm model it is", model, mask, nameless)


def test_refuses_arguments_that_are_not_json(tmp_path: Path) -> None:
    model, mask, structure = pruned(act_layer=nn.SiLU)
    refuse(tmp_path, "argument 'act_layer' of a model is none that a file may set", model, mask, structure)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask, structure = pruned()
    path = tmp_path / "m"
    save_pruned(model, path, mask=mask, structure=structure, extra={"which": "old"})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pruned(model, path, mask=mask, structure=structure, extra={"which": "new"})
    assert load_pruned(path).extra == {"which": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# ---- what is damaged is not loaded


def test_damage_is_named(tmp_path: Path) -> None:
    model, mask, structure = pruned()
    path = tmp_path / "m"
    save_pruned(model, path, mask=mask, structure=structure)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    weights = 8 + int.from_bytes(data[:8], "little")
    for at in torch.randint(len(data), (20,), generator=generator).tolist():
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        # A tensor whose name was hit is none of the model's.
        said = r"m: .*damaged" if at >= weights else r"m: .*(damaged|do not fit)"
        with pytest.raises(FileFormatError, match=said):
            load_pruned(path)
    for length in (0, 7, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match="m: damaged, truncated"):
            load_pruned(path)
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "none")


def test_other_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask, structure = pruned()
    path = tmp_path / "m"
    mask.save(path)
    with pytest.raises(FileFormatError, match=r"format 'mvp_ext.pruned_model', got 'mvp_ext.mask'"):
        load_pruned(path)
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(FileFormatError, match="m: not a file of mvp_ext"):
        load_pruned(path)
    torch.save(model.state_dict(), path)
    with pytest.raises(FileFormatError, match="m: damaged, truncated or not a safetensors file"):
        load_pruned(path)
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "_VERSION", 4)
        save_pruned(model, path, mask=mask, structure=structure)
    with pytest.raises(FileFormatError, match=r"m: format version 4 is newer than this mvp_ext reads \(3\)"):
        load_pruned(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"recipe": {"name": "resnet18"}},
            r"builds 'resnet18' with another structure \(layer1.0.conv1.weight: expected 32 places",
        ),
        ({"recipe": {"name": "no_such_model"}}, "has no model named 'no_such_model'"),
        ({"recipe": {"name": "test_resnet", "num_classes": 9}}, "the tensors do not fit"),
        ({"kept": {}}, "description is damaged"),
        ({"structure": {}}, "description is damaged"),
    ],
)
def test_a_description_that_does_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, mask, structure = pruned()
    path = tmp_path / "m"
    save_pruned(model, path, mask=mask, structure=structure)
    tensors, spec = storage.read(path, kind=checkpoint._FORMAT, version=checkpoint._VERSION)
    changed = storage.to_bytes(
        tensors, {**spec, **change}, kind=checkpoint._FORMAT, version=checkpoint._VERSION
    )
    storage.write_atomic(path, changed)
    with pytest.raises(FileFormatError, match=f"m: .*{message}"):
        load_pruned(path)
