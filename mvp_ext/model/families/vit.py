"""Heads and neurons of a transformer's blocks: the scopes ``heads``, ``mlp`` and ``heads+mlp``."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvp_ext.model.families.parts import Family, computes_as, is_elementwise
from mvp_ext.model.structure import Probe, Slice, UnitLayer, UnsupportedModelError
from mvp_ext.timm_compat import import_timm


def _block_layers(path: str, block: Any, scope: str) -> list[UnitLayer]:
    """The attention of one transformer block, its MLP, or both."""
    layers = []
    if "heads" in scope:
        layers.append(_head_layer(f"{path}.attn", block.attn))
    if "mlp" in scope:
        layers.append(_neuron_layer(f"{path}.mlp", block.mlp))
    return layers


def _head_layer(path: str, attn: Any) -> UnitLayer:
    """The heads of one attention module."""
    attention = import_timm().layers.Attention
    if not computes_as(attn, attention):
        raise UnsupportedModelError(
            f"{path} ({type(attn).__name__}): expected an attention that computes as timm's Attention does"
        )
    if not hasattr(attn, "attn_dim"):
        raise UnsupportedModelError(
            f"{path}: this timm's Attention cannot be narrower than its input; a newer timm can"
        )
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise UnsupportedModelError(
            f"{path}.norm ({type(attn.norm).__name__}): it normalises across heads (scale_norm)"
        )
    # q_norm and k_norm work inside one head and share their weights between heads: nothing of theirs is cut.
    heads, width = attn.num_heads, attn.head_dim
    _check_linear(f"{path}.qkv", attn.qkv)
    _check_linear(f"{path}.proj", attn.proj)
    slices = [Slice(f"{path}.qkv.weight", 0, width, 3)]
    if attn.qkv.bias is not None:
        slices.append(Slice(f"{path}.qkv.bias", 0, width, 3))
    if getattr(attn, "gate", None) is not None:
        _check_linear(f"{path}.gate", attn.gate)
        slices.append(Slice(f"{path}.gate.weight", 0, width))
        if attn.gate.bias is not None:
            slices.append(Slice(f"{path}.gate.bias", 0, width))
    slices.append(Slice(f"{path}.proj.weight", 1, width))
    return UnitLayer(path, "head", heads, tuple(slices), Probe(f"{path}.proj", "input", dim=-1, heads=heads))


def _neuron_layer(path: str, mlp: Any) -> UnitLayer:
    """The hidden neurons of one MLP."""
    if not computes_as(mlp, import_timm().layers.Mlp):
        raise UnsupportedModelError(
            f"{path} ({type(mlp).__name__}): expected an MLP that computes as timm's Mlp does"
        )
    if not isinstance(mlp.norm, nn.Identity):
        raise UnsupportedModelError(
            f"{path}.norm ({type(mlp.norm).__name__}): it normalises across hidden neurons"
        )
    if not is_elementwise(mlp.act):
        raise UnsupportedModelError(
            f"{path}.act: expected an activation without parameters, got {type(mlp.act).__name__}"
        )
    _check_linear(f"{path}.fc1", mlp.fc1)
    _check_linear(f"{path}.fc2", mlp.fc2)
    slices = [Slice(f"{path}.fc1.weight", 0)]
    if mlp.fc1.bias is not None:
        slices.append(Slice(f"{path}.fc1.bias", 0))
    slices.append(Slice(f"{path}.fc2.weight", 1))
    return UnitLayer(
        path, "neuron", mlp.fc1.out_features, tuple(slices), Probe(f"{path}.fc2", "input", dim=-1)
    )


def _check_linear(path: str, linear: nn.Module) -> None:
    if type(linear) is not nn.Linear:
        raise UnsupportedModelError(f"{path}: expected a plain Linear, got {type(linear).__name__}")


VIT = Family("vit", ("heads", "mlp", "heads+mlp"), frozenset({"attn", "mlp"}), _block_layers)
