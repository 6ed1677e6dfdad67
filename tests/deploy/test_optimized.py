"""``optimized``: the same function without batch norms, in a copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import Tensor, nn

import mvp_ext
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread")


def small(name: str, scope: str | None, **kwargs: Any) -> Any:
    """With every tensor filled, in train mode."""
    model = tiny_model(name, **kwargs)
    if scope is not None:
        prune_model(model, Mask.random(find_structure(model, scope), 0.4, seed=0, align=1))
    return model.train()


def norms(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def same(model: nn.Module, fast: nn.Module, images: Tensor) -> None:
    expected = model.eval()(images)
    got = fast(images)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *(("test_resnet", scope) for scope in (None, "inner", "all")),
        *(("test_vit", scope) for scope in (None, "heads", "mlp", "heads+mlp")),
    ],
)
def test_computes_the_same_in_a_copy(name: str, scope: str | None) -> None:
    model = small(name, scope)
    state = copy.deepcopy(model.state_dict())
    fast: Any = mvp_ext.optimized(model)
    assert type(fast) is type(model)
    assert not norms(fast)
    assert not any(part.training for part in fast.modules())
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in fast.parameters() if w.ndim == 4)
    # What was given is as it was.
    assert all(part.training for part in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    images = tiny_images(model)
    same(model, fast, images)
    # It still is timm's.
    with torch.no_grad():
        features = model.forward_features(images)
        torch.testing.assert_close(fast.forward_features(images), features, rtol=1e-4, atol=1e-4)
    assert len(fast.forward_intermediates(images)[1]) == len(model.forward_intermediates(images)[1])


def test_bfloat16_and_float64() -> None:
    model, images = small("test_resnet", "all"), tiny_images(tiny_model("test_resnet"))
    with torch.no_grad():
        expected = model.eval()(images)
        low = mvp_ext.optimized(model).bfloat16()(images.bfloat16())
    assert float((low - expected).abs().max()) < 0.1 * float(expected.abs().max())
    same(model.double(), mvp_ext.optimized(model.double()), images.double())


def test_norms_with_activations_keep_them() -> None:
    """timm's BatchNormAct2d, as in its other families."""
    torch.manual_seed(0)
    layers = import_timm().layers
    model = nn.Sequential(
        layers.ConvNormAct(3, 8, 3), layers.ConvNormAct(8, 4, 3, groups=2, bias=True, act_layer=nn.SiLU)
    )
    for norm in norms(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    fast = mvp_ext.optimized(model)
    assert not norms(fast)
    images = torch.randn(2, 3, 8, 8)
    same(model, fast, images)
    assert fast(images).min() > -0.3


class Odd(nn.Module):
    """Its norms read: a convolution that others read, too; one that runs twice; no convolution; one with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.twice, self.watched, self.plain = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))
        self.watched.register_forward_hook(lambda _m, _i, out: out + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        y = self.norms[0](y) + y
        y = self.norms[1](self.twice(self.twice(y)))
        y = self.norms[2](y.relu())
        y = self.norms[3](self.watched(y))
        return self.norms[4](self.plain(y))


def test_folds_no_norm_that_must_stay() -> None:
    torch.manual_seed(0)
    model = Odd()
    for norm in norms(model):
        norm.running_mean.normal_()
        norm.weight.data.uniform_(0.5, 1.5)
    fast = mvp_ext.optimized(model)
    assert len(norms(fast)) == 4
    same(model, fast, torch.randn(2, 3, 4, 4))


class Untraceable(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_says_so() -> None:
    with pytest.raises(ValueError, match=r"optimized: model: torch\.fx cannot trace it"):
        mvp_ext.optimized(Untraceable())


class Mixed(nn.Module):
    """Control flow where no batch norm is, beside a convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_has_no_norms_need_not_be_traceable() -> None:
    fast = mvp_ext.optimized(Mixed())
    assert not norms(fast)
