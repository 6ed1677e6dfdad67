"""Small timm models of every kind of network that ``find_structure`` accepts, and of those that it refuses."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvp_ext.timm_compat import import_timm

_PLAIN = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
_WINDOWS = {"img_size": 64, "depths": (1, 2), "embed_dim": 24, "num_heads": (2, 2), "window_size": 4}
_STAGES = {"depths": (1, 1, 1, 1), "embed_dims": (24, 24, 48, 48), "num_heads": (2, 2, 2, 2)}

# Name → the arguments that make it small.
ACCEPTED: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "seresnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "ecaresnet26t": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "resnetblur18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "resnext50_32x4d": {"layers": (1, 1, 1, 1), "cardinality": 4},
    "test_byobnet": {},
    "test_efficientnet": {},
    "test_convnext3": {},
    "vit_tiny_patch16_224": _PLAIN,
    "vit_giant_patch14_dinov2": {**_PLAIN, "img_size": 28},
    "vit_base_patch32_clip_224": {**_PLAIN, "img_size": 64},
    "vit_base_patch16_siglip_224": _PLAIN,
    "vit_pe_core_tiny_patch16_384": _PLAIN,
    "flexivit_small": _PLAIN,
    "deit_tiny_distilled_patch16_224": _PLAIN,
    "deit3_small_patch16_224": _PLAIN,
    "naflexvit_base_patch16_gap": {"depth": 1, "embed_dim": 48, "num_heads": 3},
    "vit_small_patch16_dinov3_qkvb": _PLAIN,
    "eva02_tiny_patch14_224": {**_PLAIN, "img_size": 28},
    "vit_srelpos_small_patch16_224": _PLAIN,
    "samvit_base_patch16_224": {**_PLAIN, "img_size": 64},
    "beit_base_patch16_224": _PLAIN,
    "eva_giant_patch14_224": {**_PLAIN, "img_size": 28},
    "vit_small_patch16_rope_224": _PLAIN,
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 1, "embed_dim": 64},
    "cait_xxs24_224": {"img_size": 32, "depth": 1, "embed_dim": 48},
    "convit_tiny": {"img_size": 32, "depth": 2, "embed_dim": 64},
    "swin_tiny_patch4_window7_224": _WINDOWS,
    "swinv2_tiny_window8_256": _WINDOWS,
    "swinv2_cr_tiny_ns_224": {**_WINDOWS, "window_size": None},
    "twins_svt_small": {"img_size": 64, **_STAGES},
    "davit_tiny": {**_STAGES},
    "hiera_tiny_224": {"img_size": 64, "stages": (1, 1, 1, 1), "embed_dim": 24, "num_heads": 1},
    "mobilevit_xxs": {},
    "test_maxvit": {"img_size": 64},
    "pit_ti_distilled_224": {"img_size": 32},
}
# Name → the arguments that make it small; none can be cut in any scope.
REFUSED: dict[str, dict[str, Any]] = {
    "nf_resnet26": {},
    "resnetv2_50x1_bit": {},
    "mambaout_femto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)},
}


def family_model(name: str, *, num_classes: int = 4, **kwargs: Any) -> nn.Module:
    """timm's own, in eval mode; ``kwargs`` beside those that make it small."""
    arguments = {**ACCEPTED.get(name, REFUSED.get(name, {})), **kwargs}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    return import_timm().create_model(name, num_classes=num_classes, **arguments).eval()
