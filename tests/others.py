"""Small models of others than timm, in which every tensor matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvp_ext.model.elsewhere.adapter import Adapter
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.timm_compat import import_timm

_TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_VIT = {**_TRANSFORMER, "intermediate_size": 64}
_SWIN = {
    **{"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    "window_size": 4,
}
_CONVNEXT = {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2}
_RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2]}
# Name → class, values of its configuration, scopes.
HUGGINGFACE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "vit": ("ViTModel", _VIT, ("heads", "mlp", "heads+mlp")),
    "vit_classifier": ("ViTForImageClassification", {**_VIT, "num_labels": 5}, ("heads+mlp",)),
    "dinov2": ("Dinov2Model", _TRANSFORMER, ("heads+mlp",)),
    "dinov2_classifier": (
        "Dinov2ForImageClassification",
        {**_TRANSFORMER, "use_swiglu_ffn": True, "num_labels": 5},
        ("mlp", "heads+mlp"),
    ),
    "dinov2_registers": ("Dinov2WithRegistersModel", _TRANSFORMER, ("heads+mlp",)),
    "clip": ("CLIPVisionModel", _VIT, ("heads+mlp",)),
    "siglip": ("SiglipVisionModel", _VIT, ("heads", "heads+mlp")),
    "swin": ("SwinModel", _SWIN, ("heads", "heads+mlp")),
    "convnext": ("ConvNextModel", _CONVNEXT, ("mlp",)),
    "resnet": ("ResNetModel", {**_RESNET, "layer_type": "basic"}, ("inner",)),
    "resnet_classifier": ("ResNetForImageClassification", {**_RESNET, "num_labels": 5}, ("inner",)),
}


def huggingface(name: str) -> nn.Module:
    """One of ``HUGGINGFACE``, in eval mode; the test is skipped where transformers is not installed."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    kind, values, _ = HUGGINGFACE[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return randomised(cls(cls.config_class(**values)).eval())


def _torchvision(make: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        import_timm()
        from torchvision import models

        torch.manual_seed(0)
        return randomised(make(models).eval())

    return made


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "resnet18": (_torchvision(lambda m: m.resnet18(num_classes=5)), ("inner",)),
    "mobilenet_v3_small": (_torchvision(lambda m: m.mobilenet_v3_small(num_classes=5)), ("inner",)),
    "vit": (
        _torchvision(lambda m: m.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)),
        ("heads", "heads+mlp"),
    ),
    "swin": (
        _torchvision(lambda m: m.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=5)),
        ("mlp",),
    ),
}


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Weights, gains, shifts and statistics of which none is 0 or 1: a removed unit that is not quite removed shows."""
    draw = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
        gain = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
        p.copy_(scale * torch.randn(p.shape, generator=draw) + gain)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=draw))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=draw) + 0.5)
    return model


class OwnNet(nn.Module):
    """A user's own module: torchvision's MLP between ends of its own, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        import_timm()
        from torchvision.ops import MLP

        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.mlp = MLP(16, [32, 16], activation_layer=nn.GELU, inplace=None)
        self.out = nn.Linear(16, 5)

    def tokens(self, images: Tensor) -> Tensor:
        return self.stem(images).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        return self.out((x + self.mlp(x)).mean(1))


OWN = Adapter(Preprocessing(32), head="out", any_size=True, name="ownnet", build=OwnNet)


def own() -> nn.Module:
    """A user's own module; ``OWN`` says how it is used."""
    torch.manual_seed(0)
    return randomised(OwnNet().eval())
