"""Expanded channels of inverted residuals: a 1 × 1 convolution widens, a depthwise one filters, another narrows."""

from __future__ import annotations

from mvp_ext.model.families.chain import chain

_TIMM = "timm.models._efficientnet_blocks."
_VISION = "torchvision.models."

EFFICIENTNET = (
    chain(
        "efficientnet",
        "inner",
        (f"{_TIMM}InvertedResidual",),
        *("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl"),
    ),
    # Without the convolution in front there is nothing inside it, and it stays whole.
    chain(
        "efficientnet",
        "inner",
        (f"{_TIMM}DepthwiseSeparableConv",),
        *("conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw"),
    ),
    chain(
        "efficientnet",
        "inner",
        (f"{_TIMM}UniversalInvertedResidual",),
        *("pw_exp", "dw_mid", "se", "pw_proj"),
    ),
    chain("efficientnet", "inner", (f"{_TIMM}EdgeResidual",), "conv_exp", "bn1", "aa", "se", "conv_pwl"),
    chain("efficientnet", "inner", (f"{_VISION}mobilenetv2.InvertedResidual",), "conv"),
    chain("efficientnet", "inner", (f"{_VISION}mnasnet._InvertedResidual",), "layers"),
    chain("efficientnet", "inner", (f"{_VISION}maxvit.MBConv",), "layers"),
    chain(
        "efficientnet",
        "inner",
        tuple(
            _VISION + name
            for name in ("mobilenetv3.InvertedResidual", "efficientnet.MBConv", "efficientnet.FusedMBConv")
        ),
        "block",
    ),
    chain(
        "rexnet",
        "inner",
        ("timm.models.rexnet.LinearBottleneck",),
        *("conv_exp", "conv_dw", "se", "act_dw", "conv_pwl"),
    ),
    chain(
        "maxvit",
        "inner",
        ("timm.models.maxxvit.MbConvBlock",),
        *("conv1_1x1", "norm1", "conv2_kxk", "se_early", "norm2", "se", "conv3_1x1"),
    ),
    chain(
        "vitamin",
        "inner",
        ("timm.models.vitamin.MbConvLNBlock",),
        *("conv1_1x1", "act1", "conv2_kxk", "act2", "conv3_1x1"),
    ),
    chain(
        "tiny_vit",
        "inner",
        ("timm.models.tiny_vit.MBConv", "timm.models.tiny_vit.PatchMerging"),
        *("conv1", "act1", "conv2", "act2", "conv3"),
    ),
    chain(
        "efficientvit",
        "inner",
        ("timm.models.efficientvit_mit.MBConv",),
        *("inverted_conv", "depth_conv", "point_conv"),
    ),
    chain("efficientvit", "inner", ("timm.models.efficientvit_mit.ConvBlock",), "conv1", "conv2"),
    chain(
        "efficientvit", "inner", ("timm.models.efficientvit_mit.FusedMBConv",), "spatial_conv", "point_conv"
    ),
    chain(
        "efficientvit",
        "inner",
        ("timm.models.efficientvit_msra.PatchMerging",),
        *("conv1", "act", "conv2", "act", "se", "conv3"),
    ),
    chain(
        "shvit",
        "inner",
        ("timm.models.shvit.PatchMerging",),
        *("conv1", "act1", "conv2", "act2", "se", "conv3"),
    ),
    chain("xception", "inner", ("timm.models.xception_aligned.XceptionModule",), "stack"),
    chain(
        "metaformer",
        "inner",
        ("timm.models.metaformer.SepConv",),
        *("pwconv1", "act1", "dwconv", "act2", "pwconv2"),
    ),
)
