"""Expanded channels of inverted residuals: a 1 × 1 convolution widens, a depthwise one filters, another narrows."""

from __future__ import annotations

from mvp_ext.model.families.chain import chains

_BLOCKS = "timm.models._efficientnet_blocks"

EFFICIENTNET = chains(
    "efficientnet",
    "inner",
    {
        f"{_BLOCKS}.InvertedResidual": "conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl",
        # Without a convolution in front nothing is inside of it, and it stays whole.
        f"{_BLOCKS}.DepthwiseSeparableConv": "conv_s2d bn_s2d conv_dw bn1 aa se conv_pw",
        f"{_BLOCKS}.UniversalInvertedResidual": "pw_exp dw_mid se pw_proj",
        f"{_BLOCKS}.EdgeResidual": "conv_exp bn1 aa se conv_pwl",
        "torchvision.models.mobilenetv2.InvertedResidual": "conv",
        "torchvision.models.mobilenetv3.InvertedResidual": "block",
        "torchvision.models.mnasnet._InvertedResidual": "layers",
        "torchvision.models.efficientnet.MBConv": "block",
        "torchvision.models.efficientnet.FusedMBConv": "block",
        "torchvision.models.maxvit.MBConv": "layers",
        "timm.models.rexnet.LinearBottleneck": "conv_exp conv_dw se act_dw conv_pwl",
        # Beside the depthwise convolution is a batch norm: what both make is added.
        "timm.models.repghost.RepGhostBottleneck": "ghost1.primary_conv ghost1.fusion_bn ghost1.cheap_operation "
        "ghost1.relu conv_dw bn_dw se ghost2.primary_conv.0",
        "timm.models.maxxvit.MbConvBlock": "conv1_1x1 norm1 conv2_kxk se_early norm2 se conv3_1x1",
        "timm.models.vitamin.MbConvLNBlock": "conv1_1x1 act1 conv2_kxk act2 conv3_1x1",
        "timm.models.tiny_vit.MBConv": "conv1 act1 conv2 act2 conv3",
        "timm.models.tiny_vit.PatchMerging": "conv1 act1 conv2 act2 conv3",
        "timm.models.efficientvit_mit.MBConv": "inverted_conv depth_conv point_conv",
        "timm.models.efficientvit_mit.ConvBlock": "conv1 conv2",
        "timm.models.efficientvit_mit.FusedMBConv": "spatial_conv point_conv",
        "timm.models.efficientvit_msra.PatchMerging": "conv1 act conv2 act se conv3",
        "timm.models.shvit.PatchMerging": "conv1 act1 conv2 act2 se conv3",
        "timm.models.metaformer.SepConv": "pwconv1 act1 dwconv act2 pwconv2",
    },
)
