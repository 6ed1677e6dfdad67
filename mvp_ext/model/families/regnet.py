"""Filters of RegNets and of timm's "bring your own blocks": bottlenecks of convolutions with their norms inside."""

from __future__ import annotations

from mvp_ext.model.families.chain import chains

REGNET = chains(
    "regnet",
    "inner",
    {
        "timm.models.regnet.Bottleneck": "conv1 conv2 se conv3",
        "timm.models.regnet.PreBottleneck": "conv1 norm2 conv2 se norm3 conv3",
        "torchvision.models.regnet.ResBottleneckBlock": "f",
        "timm.models.byobnet.BasicBlock": "conv1_kxk attn conv2_kxk",
        "timm.models.byobnet.BottleneckBlock": "conv1_1x1 conv2_kxk conv2b_kxk attn conv3_1x1",
        "timm.models.byobnet.DarkBlock": "conv1_1x1 attn conv2_kxk",
        "timm.models.byobnet.EdgeBlock": "conv1_kxk attn conv2_1x1",
        # The attention reads what the second one makes.
        "timm.models.byobnet.SelfAttnBlock": "conv1_1x1 conv2_kxk",
        "timm.models.xception_aligned.XceptionModule": "stack",
    },
)
