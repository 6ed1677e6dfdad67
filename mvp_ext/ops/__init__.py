"""Arithmetic on tensors that knows no model: the native kernels, their public functions and their references."""

from mvp_ext.ops.choice import ops_for
from mvp_ext.ops.functional import importance, meta_vote
from mvp_ext.ops.packing import merge, pack, unpack
from mvp_ext.ops.pruned import pruned_attention, pruned_conv2d, pruned_linear
from mvp_ext.ops.residual import residual_add
from mvp_ext.ops.vote import Vote, kept_units

__all__ = [
    "Vote",
    "importance",
    "kept_units",
    "merge",
    "meta_vote",
    "ops_for",
    "pack",
    "pruned_attention",
    "pruned_conv2d",
    "pruned_linear",
    "residual_add",
    "unpack",
]
