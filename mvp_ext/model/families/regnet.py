"""Filters of RegNets and of timm's "bring your own blocks": bottlenecks of convolutions with their norms inside."""

from __future__ import annotations

from mvp_ext.model.families.chain import chain

_BYOB = "timm.models.byobnet."

REGNET = (
    chain("regnet", "inner", ("timm.models.regnet.Bottleneck",), "conv1", "conv2", "se", "conv3"),
    chain(
        "regnet",
        "inner",
        ("timm.models.regnet.PreBottleneck",),
        *("conv1", "norm2", "conv2", "se", "norm3", "conv3"),
    ),
    chain("regnet", "inner", ("torchvision.models.regnet.ResBottleneckBlock",), "f"),
    chain("byobnet", "inner", (f"{_BYOB}BasicBlock",), "conv1_kxk", "attn", "conv2_kxk"),
    chain(
        "byobnet",
        "inner",
        (f"{_BYOB}BottleneckBlock",),
        *("conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1"),
    ),
    chain("byobnet", "inner", (f"{_BYOB}DarkBlock",), "conv1_1x1", "attn", "conv2_kxk"),
    chain("byobnet", "inner", (f"{_BYOB}EdgeBlock",), "conv1_kxk", "attn", "conv2_1x1"),
    # The attention reads what the second one makes.
    chain("byobnet", "inner", (f"{_BYOB}SelfAttnBlock",), "conv1_1x1", "conv2_kxk"),
)
