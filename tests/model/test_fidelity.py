"""A file that would come back as another function is not written; whatever else changes, loads as it was.

What can act without being a tensor: numbers of a part, its kind, hooks, functions in place of methods, parts put in.
Each change below is made to every part that it applies to.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import nn

from mvp_ext.model.checkpoint import load_pruned, save_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.fidelity import difference
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.train.backbone import Backbone, load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [("test_resnet", "inner"), ("test_resnet", "all"), ("test_vit", "heads+mlp")]


def replaced(model: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, new)


def other_number(value: Any) -> Any:
    """Another value of the same kind that a layer of torch or timm would accept."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple) and value and all(isinstance(v, int) for v in value):
        return tuple(v + 1 for v in value)
    return None


def changes(model: nn.Module) -> Iterator[tuple[str, Callable[[nn.Module], None]]]:
    """(what it is, what makes it) for every part and everything of it that can act."""
    for name, module in model.named_modules():
        if not name:
            continue
        if not module._modules:
            for key, value in vars(module).items():
                if not key.startswith("_") and key != "training" and other_number(value) is not None:
                    yield (
                        f"{name}.{key}",
                        lambda m, n=name, k=key, v=value: setattr(m.get_submodule(n), k, other_number(v)),
                    )
            if isinstance(module, (nn.ReLU, nn.GELU)):
                yield f"{name} → Hardswish", lambda m, n=name: replaced(m, n, nn.Hardswish())
                yield f"{name} → ReLU6", lambda m, n=name: replaced(m, n, nn.ReLU6())
            if isinstance(module, (nn.MaxPool2d, nn.ReLU)):
                yield f"{name} → Identity", lambda m, n=name: replaced(m, n, nn.Identity())
        yield (
            f"{name} hook",
            lambda m, n=name: m.get_submodule(n).register_forward_hook(lambda _m, _i, out: 2 * out),
        )
        yield (
            f"{name} pre-hook",
            lambda m, n=name: m.get_submodule(n).register_forward_pre_hook(lambda _m, x: (2 * x[0],)),
        )

        def patch(m: nn.Module, n: str = name) -> None:
            part: Any = m.get_submodule(n)
            plain = part.forward
            part.forward = lambda *a, **k: 2 * plain(*a, **k)

        yield f"{name} forward", patch
    for key, value in (("scale", 0.01), ("num_heads", 1)):
        for name, module in model.named_modules():
            if hasattr(module, key) and isinstance(getattr(module, key), (int, float)):
                yield f"{name}.{key}", lambda m, n=name, k=key, v=value: setattr(m.get_submodule(n), k, v)

    def features(m: Any) -> None:
        plain = m.forward_features
        m.forward_features = lambda x: 2 * plain(x)

    yield "forward_features", features


def one_of_each(model: nn.Module) -> Iterator[tuple[str, Callable[[nn.Module], None]]]:
    """The last change of each kind: of the same thing of parts of the same type."""
    kinds = {}
    for what, change in changes(model):
        name, _, rest = what.partition(" ")
        owner, _, key = name.rpartition(".")
        path = name if rest else owner
        kind = type(model.get_submodule(path)) if path != "forward_features" else None
        kinds[kind, key if not rest else "", rest] = what, change
    yield from kinds.values()


@functools.lru_cache
def made(name: str, scope: str) -> tuple[nn.Module, Mask]:
    model = tiny_model(name)
    mask = Mask.random(find_structure(model, scope), 0.5, seed=0)
    return prune_model(model, mask).eval(), mask


def runs(model: nn.Module, images: torch.Tensor) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            return model(images)
    except Exception:
        return None


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_what_acts_is_kept_or_refused(name: str, scope: str, tmp_path: Path) -> None:
    plain, mask = made(name, scope)
    structure = find_structure(tiny_model(name), scope)
    images = tiny_images(plain)
    tried = acted = 0
    refused: list[str] = []
    before = runs(plain, images)
    for what, change in one_of_each(plain):
        model = copy.deepcopy(plain)
        change(model)
        now = runs(model, images)
        tried += 1
        acted += now is None or not torch.equal(now, before)
        path = tmp_path / f"{tried}"
        try:
            save_pruned(model, path, mask=mask, structure=structure)
        except ValueError as error:
            refused.append(str(error))
            continue
        assert now is not None, f"{what}: a model that does not run was written"
        again = runs(load_pruned(path).model, images)
        assert torch.equal(again, now), f"{what}: what was loaded is another function"
    assert all("save_pruned: " in message for message in refused)
    assert len(list(tmp_path.iterdir())) == tried - len(refused)
    assert tried > 40
    assert acted > 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: replaced(m, "maxpool", nn.Identity()),
            "part 'maxpool' is torch.nn.modules.linear.Identity",
        ),
        (lambda m: replaced(m, "layer1.0.act1", nn.Hardswish()), "part 'layer1.0.act1' is .*Hardswish"),
        (
            lambda m: setattr(m.layer2[0].conv1, "stride", (1, 1)),
            r"part 'layer2.0.conv1' .*stride = \(1, 1\)",
        ),
        (lambda m: setattr(m.layer1[0].bn1, "eps", 0.1), "part 'layer1.0.bn1' .*eps = 0.1"),
        (lambda m: m.layer3.register_forward_hook(lambda *a: None), "part 'layer3' has a forward hook"),
        (lambda m: setattr(m.fc, "forward", lambda x: x), "part 'fc' has a function of its own as 'forward'"),
    ],
)
def test_the_part_is_named(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    plain, mask = made("test_resnet", "inner")
    model = copy.deepcopy(plain)
    change(model)
    with pytest.raises(ValueError, match=message):
        save_pruned(
            model, tmp_path / "m", mask=mask, structure=find_structure(tiny_model("test_resnet"), "inner")
        )
    dense: Any = tiny_model("test_resnet")
    change(dense)
    with pytest.raises(ValueError, match=message):
        Backbone.wrap(dense).save(tmp_path / "b.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_act_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """Training mode, frozen weights, gradients, checkpointing and rates of dropout are not the function's."""
    plain, mask = made("test_resnet", "inner")
    model: Any = copy.deepcopy(plain)
    model.train()
    model.set_grad_checkpointing()
    for parameter in model.parameters():
        parameter.requires_grad = False
        parameter.grad = torch.ones_like(parameter)
    model.layer1[0].bn1.momentum = 0.5
    structure = find_structure(tiny_model("test_resnet"), "inner")
    state = torch.get_rng_state()
    save_pruned(model, tmp_path / "m", mask=mask, structure=structure)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    images = tiny_images(plain)
    assert torch.equal(runs(load_pruned(tmp_path / "m").model, images), runs(plain, images))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_output_without_numbers_is_not_that_of_another_model(value: float) -> None:
    plain = tiny_model("test_resnet").eval()
    broken: Any = copy.deepcopy(plain)
    with torch.no_grad():
        broken.fc.bias.fill_(value)
    for given, built in ((broken, plain), (plain, broken)):
        assert "'fc' computes something else" in str(difference(given, built, 3, [(64, 64)]))
    assert difference(broken, copy.deepcopy(broken), 3, [(64, 64)]) is None


def test_a_model_that_needs_more_pixels_is_tried_on_more() -> None:
    """inception_v3 runs on no image of 64."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(70), nn.ReLU())
    other = copy.deepcopy(model)
    assert difference(model, other, 3, [(64, 64), (80, 80)]) is None
    assert "does not run on images (2, 3, 64, 64)" in str(difference(model, other, 3, [(64, 64)]))
    with torch.no_grad():
        other[0].bias.add_(1)
    assert "computes something else" in str(difference(model, other, 3, [(64, 64), (80, 80)]))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    plain, mask = made("test_resnet", "inner")
    model: Any = copy.deepcopy(plain)
    model.layer1[0].conv1.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.weight: expected finite numbers"):
        save_pruned(
            model, tmp_path / "m", mask=mask, structure=find_structure(tiny_model("test_resnet"), "inner")
        )


def test_a_backbone_is_the_same_function_when_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("test_vit").eval()
    Backbone.wrap(model).save(tmp_path / "b.safetensors")
    images = tiny_images(model)
    assert torch.equal(runs(load_backbone(tmp_path / "b.safetensors").model, images), runs(model, images))
