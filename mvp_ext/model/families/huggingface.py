"""Heads, neurons and filters of the vision models of Hugging Face's transformers (5.24)."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvp_ext.model.families.chain import chains, knows
from mvp_ext.model.families.parts import Rule, need_elementwise, need_plain, reader, writer
from mvp_ext.model.structure import Attribute, Probe, Slice, UnitLayer, UnsupportedModelError

_CLASSES = {
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


def _named(kind: str) -> list[str]:
    """The classes whose names end so."""
    return [f"transformers.models.{home}.modeling_{home}.{name}{kind}" for home, name in _CLASSES.items()]


def _head_layers(path: str, attn: Any) -> list[UnitLayer]:
    """The heads of an attention with linear layers for queries, keys and values."""
    implementation = getattr(attn.config, "_attn_implementation", None)
    if implementation not in _BY_HEAD:
        raise UnsupportedModelError(
            f"{path}: expected attn_implementation {', '.join(_BY_HEAD)}, got {implementation!r}"
        )
    count = _name_in(path, attn, "num_attention_heads", "num_heads")
    out = _name_in(path, attn, "o_proj", "out_proj")
    # Swin's table has a column for each head.
    table = "relative_position_bias.relative_position_bias_table"
    more = [Slice(f"{path}.{table}", 1)] if hasattr(attn, "relative_position_bias") else []
    heads = getattr(attn, count)
    slices: list[Slice] = []
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(attn, name)
        need_plain(f"{path}.{name}", linear, nn.Linear)
        slices += writer(f"{path}.{name}", linear, linear.out_features // heads)
    read = getattr(attn, out)
    need_plain(f"{path}.{out}", read, nn.Linear)
    slices += [*more, reader(f"{path}.{out}", read.in_features // heads)]
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


def _glu_layers(path: str, mlp: Any) -> list[UnitLayer]:
    """SwiGLU: values and gates from a layer each."""
    need_elementwise(f"{path}.act_fn", mlp.act_fn)
    for name in ("gate_proj", "up_proj", "down_proj"):
        need_plain(f"{path}.{name}", getattr(mlp, name), nn.Linear)
    made = [
        each for name in ("gate_proj", "up_proj") for each in writer(f"{path}.{name}", getattr(mlp, name))
    ]
    slices = (*made, reader(f"{path}.down_proj"))
    probe = Probe(f"{path}.down_proj", "input", dim=-1)
    return [UnitLayer(path, "neuron", mlp.down_proj.in_features, slices, probe)]


HUGGINGFACE = (
    Rule("huggingface", "heads", knows(*_named("Attention")), _head_layers, by_class=True),
    Rule("huggingface", "mlp", knows(*_named("SwiGLUFFN")), _glu_layers, by_class=True),
    *chains("huggingface", "mlp", dict.fromkeys(_named("MLP"), "fc1 activation_fn fc2")),
    *chains(
        "huggingface",
        "mlp",
        {"transformers.models.convnext.modeling_convnext.ConvNextLayer": "pwconv1 act pwconv2"},
    ),
    *chains(
        "huggingface",
        "inner",
        {
            f"transformers.models.resnet.modeling_resnet.ResNet{kind}Layer": "layer"
            for kind in ("Basic", "BottleNeck")
        },
    ),
)
