"""Arithmetic on tensors that knows no model: one op a file, with its native kernels called from there.

Dimension letters: B batch, T target tasks, N voters, L layers, U units of all layers (concatenated), C channels,
H heads, D head dim, M rows.
"""

from mvp_ext.ops.device import backend_for
from mvp_ext.ops.importance import importance
from mvp_ext.ops.merge import merge
from mvp_ext.ops.meta_vote import meta_vote
from mvp_ext.ops.pack import pack, unpack
from mvp_ext.ops.pruned_attention import pruned_attention
from mvp_ext.ops.pruned_conv2d import pruned_conv2d
from mvp_ext.ops.pruned_linear import pruned_linear
from mvp_ext.ops.residual_add import residual_add
from mvp_ext.ops.vote import Vote, kept_units

__all__ = [
    "Vote",
    "backend_for",
    "importance",
    "kept_units",
    "merge",
    "meta_vote",
    "pack",
    "pruned_attention",
    "pruned_conv2d",
    "pruned_linear",
    "residual_add",
    "unpack",
]
