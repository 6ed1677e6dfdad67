"""Heads, neurons and filters of Hugging Face's vision models (``transformers`` 5.24).

A class is looked up where transformers has loaded it: a model cannot be of a class that is not loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from mvp_ext.model.families.parts import Rule, computes_as, need_elementwise, need_plain, reader, writer
from mvp_ext.model.structure import Attribute, Probe, Slice, UnitLayer, UnsupportedModelError

_BACKBONES = {
    "vit": "ViT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "clip": "CLIP",
    "siglip": "Siglip",
    "swin": "Swin",
    "convnext": "ConvNext",
    "resnet": "ResNet",
}
# Implementations of attention in which no head sees another.
_BY_HEAD = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def _is(*kinds: str, of: Iterable[str] = _BACKBONES) -> Callable[[nn.Module], bool]:
    """Whether a module computes as a class of transformers whose name ends so, of one of these models."""

    def knows(module: nn.Module) -> bool:
        classes = []
        for folder in of:
            prefix = _BACKBONES[folder]
            source = sys.modules.get(f"transformers.models.{folder}.modeling_{folder}")
            classes += [getattr(source, prefix + kind) for kind in kinds if hasattr(source, prefix + kind)]
        return computes_as(module, *classes)

    return knows


def _head_layers(path: str, attn: Any) -> list[UnitLayer]:
    """The heads of an attention with linear layers for queries, keys and values."""
    implementation = getattr(attn.config, "_attn_implementation", None)
    if implementation not in _BY_HEAD:
        raise UnsupportedModelError(
            f"{path}: expected attn_implementation {', '.join(_BY_HEAD)}, got {implementation!r}"
        )
    count = _name_in(path, attn, "num_attention_heads", "num_heads")
    out = _name_in(path, attn, "o_proj", "out_proj")
    heads, width = getattr(attn, count), attn.head_dim
    slices: list[Slice] = []
    for name in ("q_proj", "k_proj", "v_proj"):
        need_plain(f"{path}.{name}", getattr(attn, name), nn.Linear)
        slices += writer(f"{path}.{name}", getattr(attn, name), width)
    need_plain(f"{path}.{out}", getattr(attn, out), nn.Linear)
    slices.append(reader(f"{path}.{out}", width))
    # Swin's table has a column for each head.
    if hasattr(attn, "relative_position_bias"):
        slices.append(Slice(f"{path}.relative_position_bias.relative_position_bias_table", 1))
    probe = Probe(f"{path}.{out}", "input", dim=-1, heads=heads)
    return [UnitLayer(path, "head", heads, tuple(slices), probe, attributes=(Attribute(path, count),))]


def _name_in(path: str, module: nn.Module, *names: str) -> str:
    """The one of these names that the module has."""
    for name in names:
        if hasattr(module, name):
            return name
    raise UnsupportedModelError(
        f"{path}: expected {' or '.join(names)}, got a {type(module).__name__} of another version"
    )


def _neurons(*writers: str, act: str, out: str) -> Callable[[str, Any], list[UnitLayer]]:
    """The hidden neurons between linear layers of these names."""

    def layers(path: str, block: Any) -> list[UnitLayer]:
        need_elementwise(f"{path}.{act}", getattr(block, act))
        for name in (*writers, out):
            need_plain(f"{path}.{name}", getattr(block, name), nn.Linear)
        own = [each for name in writers for each in writer(f"{path}.{name}", getattr(block, name))]
        slices = (*own, reader(f"{path}.{out}"))
        units = getattr(block, out).in_features
        return [UnitLayer(path, "neuron", units, slices, Probe(f"{path}.{out}", "input", dim=-1))]

    return layers


def _inner_layers(path: str, block: Any) -> list[UnitLayer]:
    """The convolutions of a ResNet's layer but its last."""
    for i, part in enumerate(block.layer):
        place = f"{path}.layer.{i}"
        need_plain(f"{place}.convolution", part.convolution, nn.Conv2d)
        need_plain(f"{place}.normalization", part.normalization, nn.BatchNorm2d)
        if part.convolution.groups != 1 or not _is("ConvLayer", of=["resnet"])(part):
            raise UnsupportedModelError(
                f"{place}: expected a convolution of one group, its normalisation and activation, got "
                f"{type(part).__name__} (groups = {part.convolution.groups})"
            )
        if i < len(block.layer) - 1:
            need_elementwise(f"{place}.activation", part.activation)
    layers = []
    for i in range(len(block.layer) - 1):
        place, after = f"{path}.layer.{i}", f"{path}.layer.{i + 1}.convolution"
        conv, norm = block.layer[i].convolution, block.layer[i].normalization
        slices = (
            *writer(f"{place}.convolution", conv),
            *writer(f"{place}.normalization", norm),
            reader(after),
        )
        probe = Probe(after, "input", dim=1)
        layers.append(UnitLayer(f"{place}.convolution", "filter", conv.out_channels, slices, probe))
    return layers


HUGGINGFACE = (
    Rule("huggingface", "heads", _is("Attention"), _head_layers),
    Rule("huggingface", "mlp", _is("MLP"), _neurons("fc1", act="activation_fn", out="fc2")),
    Rule(
        "huggingface",
        "mlp",
        _is("SwiGLUFFN"),
        _neurons("gate_proj", "up_proj", act="act_fn", out="down_proj"),
    ),
    Rule("huggingface", "mlp", _is("Layer", of=["convnext"]), _neurons("pwconv1", act="act", out="pwconv2")),
    Rule("huggingface", "inner", _is("BasicLayer", "BottleNeckLayer", of=["resnet"]), _inner_layers),
)
