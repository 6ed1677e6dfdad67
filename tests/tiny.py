"""Tiny supported models for the tests, and images that they take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvp_ext.model.create import create_model


def tiny_model(name: str, **kwargs: object) -> nn.Module:
    """``test_resnet`` (BasicBlocks and a Bottleneck, pooled shortcuts, deep stem) or ``test_vit``; 5 classes.

    Every tensor matters: fresh models hide mistakes, because their batch norms start as the identity with shift 0 (and
    timm's last ones with scale 0), so that a masked unit looks like a removed one. test_vit gets 4 heads, not 2, and
    images of 64 px.
    """
    torch.manual_seed(1)
    if name == "test_vit":
        kwargs = {"num_heads": 4, "img_size": 64, **kwargs}
    model = create_model(name, **{"num_classes": 5, **kwargs})  # type: ignore[arg-type]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.normal_()
    return model


def tiny_images(model: nn.Module, batch: int = 4, seed: int = 2) -> Tensor:
    """float32 [batch, 3, s, s], s the side that the model was made for, or a small one if it takes any."""
    side = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 64
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))
